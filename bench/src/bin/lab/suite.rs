//! `lab test`: every test there is, and one line of totals at the end.
//!
//! Unit, property and command-line tests run on this machine; kernel cases in a VM of each kernel;
//! power cuts from outside a VM. Knows how test programs report, not what they test.

use std::fmt;
use std::ops::AddAssign;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::kernel::Line;
use crate::programs::{self, Program};
use crate::setup::{self, Lab};
use crate::vm::{self, Mode, Vm};
use crate::{powercut, sh};

/// What to run.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Kernel of the kernel cases; both unless given
    #[arg(long, value_enum)]
    kernel: Option<Line>,
    /// Only tests whose name has this in it
    #[arg(long, value_name = "TEXT")]
    filter: Option<String>,
    /// Run the kernel cases on this machine instead of in a VM: needs root and ublk
    #[arg(long)]
    host: bool,
    /// The kernel cases on the 7.x kernel only
    #[arg(long)]
    quick: bool,
    /// Cases that repeat something do so to the end, however long that takes
    #[arg(long)]
    full: bool,
}

/// How many tests ended how.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    pub(crate) passed: u64,
    pub(crate) failed: u64,
    pub(crate) skipped: u64,
}

impl AddAssign for Tally {
    fn add_assign(&mut self, other: Tally) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} passed, {} failed, {} skipped", self.passed, self.failed, self.skipped)
    }
}

/// Tests of a phase on this machine, from a warm build.
const HOST_LIMIT: Duration = Duration::from_secs(3600);
/// Kernel cases of one kernel.
const CASES_LIMIT: Duration = Duration::from_secs(1800);

/// Runs everything that `options` ask for; whether all of it passed.
pub(crate) fn run(options: &Options) -> Result<bool> {
    let mut phases = Vec::new();
    let mut phase = |name: String, run: &mut dyn FnMut() -> Result<Tally>| -> Result<()> {
        println!("\n== {name}");
        let start = Instant::now();
        let tally = run()?;
        phases.push((name, tally, start.elapsed()));
        Ok(())
    };
    let filter = options.filter.as_deref();
    phase("tests on this machine".into(), &mut || host_tests(filter))?;
    phase("examples in the documentation".into(), &mut || doc_tests(filter))?;
    if options.host {
        phase("kernel cases on this machine".into(), &mut || cases_here(options))?;
    } else {
        let lab = setup::ensure()?;
        let mut programs = programs::build()?;
        let cases = programs::build_cases()?;
        for line in lines(options) {
            let release = lab.kernel(line)?.release;
            phase(format!("power cut, kernel {release}"), &mut || {
                powercut::run(&lab, line, &programs, filter)
            })?;
        }
        let any = any_case(&cases, filter)?;
        programs.push(cases);
        for line in lines(options).into_iter().filter(|_| any) {
            let release = lab.kernel(line)?.release;
            phase(format!("kernel cases, kernel {release}"), &mut || {
                cases_in_vm(&lab, line, &programs, options)
            })?;
        }
    }
    Ok(summarise(&phases))
}

fn lines(options: &Options) -> Vec<Line> {
    match options.kernel {
        Some(line) => vec![line],
        None if options.quick => vec![Line::Seven],
        None => Line::ALL.to_vec(),
    }
}

fn summarise(phases: &[(String, Tally, Duration)]) -> bool {
    println!();
    let mut total = Tally::default();
    for (name, tally, time) in phases {
        println!("{name:<45} {tally}  ({} s)", time.as_secs());
        total += *tally;
    }
    println!("\n{total}");
    total.failed == 0
}

/// Unit, property and command-line tests: everything but the kernel cases.
fn host_tests(filter: Option<&str>) -> Result<Tally> {
    if sh::which("cargo-nextest").is_ok() {
        let words =
            ["nextest", "run", "--workspace", "--cargo-profile", "lab", "--no-fail-fast", "--no-tests=pass"];
        let mut command = programs::cargo(&words);
        command
            .args(["--status-level=fail", "--final-status-level=fail", "-E", "not binary(vm)"])
            .args(filter);
        let (status, said) = sh::tee(&mut command, HOST_LIMIT)?;
        return settle("cargo nextest", status.success(), nextest(&said, filter.is_some()));
    }
    // Without nextest: every target of the workspace but the kernel cases, by name.
    let mut command = programs::cargo(&["test", "--workspace", "--quiet", "--no-fail-fast"]);
    command.args(programs::PROFILE).args(["--lib", "--bins"]);
    for name in programs::test_targets()?.iter().filter(|name| *name != "vm") {
        command.args(["--test", name]);
    }
    let (status, said) = sh::tee(command.args(filter), HOST_LIMIT)?;
    settle("cargo test", status.success(), libtest(&said))
}

fn doc_tests(filter: Option<&str>) -> Result<Tally> {
    let mut command = programs::cargo(&["test", "--doc", "--package", "loopengine", "--quiet"]);
    command.args(programs::PROFILE);
    if let Some(filter) = filter {
        command.args(["--", filter]);
    }
    let (status, said) = sh::tee(&mut command, HOST_LIMIT)?;
    settle("cargo test --doc", status.success(), libtest(&said))
}

fn cases_in_vm(lab: &Lab, line: Line, programs: &[Program], options: &Options) -> Result<Tally> {
    let machine = Vm { limit: CASES_LIMIT, ..Vm::new(lab.kernel(line)?, Mode::Smp) };
    let full = if options.full { "export LOOPENGINE_VM_FULL=1; " } else { "" };
    let mut words = vec!["vm", "--test-threads=1"];
    words.extend(options.filter.as_deref());
    let (first, said) = cases_once(lab, &machine, programs, &format!("{full}{}", sh::quote(&words)))?;
    let names = failed_names(&said);
    if names.is_empty() || names.len() > SECOND_TRIES_MAX || names.len() as u64 != first.failed {
        return Ok(first);
    }
    // An emulated machine that shares its two cores now and then misses a deadline of a case. What
    // fails for a reason of its own fails again; what does not is named.
    println!("lab: once more, in a machine of their own: {}", names.join(", "));
    let again: Vec<String> = names.iter().map(|name| sh::quote(&["vm", "--exact", name])).collect();
    let (second, said) = cases_once(lab, &machine, programs, &format!("{full}{}", again.join("; ")))?;
    let failed = failed_names(&said);
    if (second.passed + second.failed) as usize != names.len() {
        return Ok(first);
    }
    for name in names.iter().filter(|name| !failed.contains(name)) {
        println!("lab: passed only at the second try: {name}");
    }
    Ok(Tally { passed: first.passed + second.passed, failed: second.failed, skipped: first.skipped })
}

/// Cases that are given a second try at the most: more than these fail for a reason.
const SECOND_TRIES_MAX: usize = 6;

fn cases_once(lab: &Lab, machine: &Vm, programs: &[Program], command: &str) -> Result<(Tally, String)> {
    let mut said = Vec::new();
    let result = machine.run(lab, programs, command, &mut |bytes| {
        vm::to_stdout(bytes);
        said.extend_from_slice(bytes);
    });
    let said = String::from_utf8_lossy(&said).into_owned();
    let tally = match result {
        // The status is the last command's; the tallies tell all.
        Ok(status) => {
            let failed_before_the_last = libtest(&said).is_some_and(|tally| tally.failed > 0);
            cases("the kernel cases", status == 0 && !failed_before_the_last, &said)?
        }
        Err(error) if sh::interrupted().is_err() => return Err(error),
        Err(error) => {
            // One case took the VM with it: those before it count, those after it are not known.
            println!("lab: {error:#}");
            let mut tally = seen(&said);
            tally.failed += 1;
            tally
        }
    };
    Ok((tally, said))
}

/// The names below the last "failures:" of each run.
fn failed_names(said: &str) -> Vec<String> {
    let mut names = Vec::new();
    let mut listing = false;
    for line in said.lines() {
        match line.strip_prefix("    ") {
            _ if line == "failures:" => listing = true,
            Some(name) if listing && name.contains("::") && !name.contains(' ') => {
                names.push(name.to_owned())
            }
            _ if line.starts_with("test result: ") => listing = false,
            _ => {}
        }
    }
    names
}

/// Whether a filter leaves any of the kernel cases: booting a VM for none would take a while.
fn any_case(cases: &Program, filter: Option<&str>) -> Result<bool> {
    let mut list = Command::new(&cases.path);
    list.args(["--list", "--format=terse"]).args(filter);
    let said = sh::capture(&mut list, Duration::from_secs(60))?;
    Ok(filter.is_none() || said.contains(": test"))
}

fn cases_here(options: &Options) -> Result<Tally> {
    let programs = programs::build()?;
    let cases_program = programs::build_cases()?;
    let engine = programs.iter().find(|program| program.name == "loopengine");
    let engine = engine.context("cargo built no program named loopengine")?;
    let mut command = Command::new(&cases_program.path);
    command.arg("--test-threads=1").args(options.filter.as_deref());
    command.env("LOOPENGINE", &engine.path).env("LOOPENGINE_VM_CASES", "1");
    let (status, said) = sh::tee(&mut command, CASES_LIMIT)?;
    cases("the kernel cases", status.success(), &said)
}

/// Kernel cases may be skipped, but not all of them.
fn cases(what: &str, success: bool, said: &str) -> Result<Tally> {
    let mut tally = settle(what, success, libtest(said))?;
    if tally.passed == 0 && tally.failed == 0 && tally.skipped > 0 {
        println!("lab: every kernel case was skipped, for the reasons above: that counts as a failure");
        tally.failed = 1;
    }
    Ok(tally)
}

/// A tally that agrees with the exit status of what was run.
fn settle(what: &str, success: bool, tally: Option<Tally>) -> Result<Tally> {
    match tally {
        Some(tally) if success || tally.failed > 0 => Ok(tally),
        Some(tally) => Ok(Tally { failed: 1, ..tally }),
        None if success => Ok(Tally::default()),
        None => bail!("{what} failed before it ran a test: see above"),
    }
}

/// Sum of lines such as "test result: ok. 3 passed; 0 failed; 1 ignored; …".
fn libtest(said: &str) -> Option<Tally> {
    let results: Vec<&str> =
        said.lines().filter_map(|line| line.trim().strip_prefix("test result: ")).collect();
    let mut total = Tally::default();
    for result in &results {
        total += Tally {
            passed: before(result, "passed"),
            failed: before(result, "failed"),
            skipped: before(result, "ignored"),
        };
    }
    (!results.is_empty()).then_some(total)
}

/// nextest's "Summary [ 0.1s] 12 tests run: 11 passed (1 slow), 1 failed, 2 skipped". What a filter
/// leaves out it calls skipped too.
fn nextest(said: &str, filtered: bool) -> Option<Tally> {
    let line = said.lines().rev().find(|line| line.trim_start().starts_with("Summary ["))?;
    Some(Tally {
        passed: before(line, "passed"),
        failed: before(line, "failed") + before(line, "timed out"),
        skipped: if filtered { 0 } else { before(line, "skipped") },
    })
}

/// Tally of single lines "test NAME ... ok", for a run that never came to its end.
fn seen(said: &str) -> Tally {
    let count = |end: &str| {
        said.lines().filter(|line| line.starts_with("test ") && line.trim_end().ends_with(end)).count() as u64
    };
    Tally { passed: count("... ok"), failed: count("... FAILED"), skipped: count("... ignored") }
}

/// The number before `word` in `text`; 0 if there is none.
fn before(text: &str, word: &str) -> u64 {
    let Some((head, _)) = text.split_once(&format!(" {word}")) else {
        return 0;
    };
    head.rsplit(' ').next().and_then(|number| number.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tally(passed: u64, failed: u64, skipped: u64) -> Tally {
        Tally { passed, failed, skipped }
    }

    #[test]
    fn totals_are_read_from_every_kind_of_program() {
        let said = "running 3 tests\ntest result: ok. 2 passed; 0 failed; 1 ignored; 0 measured; 4 filtered out; x\n\
            test result: FAILED. 5 passed; 1 failed; 0 ignored; 0 measured\n";
        assert_eq!(libtest(said), Some(tally(7, 1, 1)));
        assert_eq!(libtest("error: no such thing"), None);
        let summary = "     Summary [   0.093s] 12 tests run: 11 passed (1 slow), 1 failed, 3 skipped\n";
        assert_eq!(nextest(summary, false), Some(tally(11, 1, 3)));
        assert_eq!(nextest(summary, true), Some(tally(11, 1, 0)));
        assert_eq!(nextest("", false), None);
        let cut = "test a ... ok\ntest b ... FAILED\ntest c ... ignored\ntest d ...";
        assert_eq!(seen(cut), tally(1, 1, 1));
    }

    #[test]
    fn a_bad_exit_status_never_passes() {
        assert_eq!(settle("x", false, Some(tally(3, 0, 0))).unwrap(), tally(3, 1, 0));
        assert_eq!(settle("x", true, Some(tally(3, 0, 1))).unwrap(), tally(3, 0, 1));
        assert!(settle("x", false, None).is_err());
    }

    #[test]
    fn all_cases_skipped_is_a_failure() {
        let said = "test result: ok. 0 passed; 0 failed; 9 ignored; 0 measured; 0 filtered out\n";
        assert_eq!(cases("x", true, said).unwrap(), tally(0, 1, 9));
    }

    #[test]
    fn the_last_line_is_the_plain_one() {
        assert_eq!(tally(3, 0, 1).to_string(), "3 passed, 0 failed, 1 skipped");
    }
}
