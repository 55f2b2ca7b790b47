// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `lab test`: runs all tests and prints totals.
//!
//! Unit, property and command-line tests run on this machine, kernel cases in a VM per kernel,
//! power cuts from outside a VM. `tally` parses the output of test programs.

use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};

use loopbench::sh;

use crate::kernel::Line;
use crate::programs::{self, Program};
use crate::setup::{self, Lab};
use crate::tally::{Tally, failed_names, libtest, nextest, seen};
use crate::vm::{self, Mode, Sink, Vm};

use crate::powercut;

/// What to run.
#[derive(clap::Args, Default)]
pub(crate) struct SuiteOptions {
    /// Kernel to run kernel cases on [default: both]
    #[arg(long, value_enum)]
    kernel: Option<Line>,
    /// Run only tests whose name contains TEXT
    #[arg(long, value_name = "TEXT")]
    filter: Option<String>,
    /// Run the kernel cases on this machine instead of in a VM: needs root and ublk
    #[arg(long)]
    host: bool,
    /// Run kernel cases on the 7.x kernel only
    #[arg(long)]
    quick: bool,
    /// Run the long kernel cases at full length: a thousand rounds instead of two minutes
    #[arg(long)]
    full: bool,
}

/// Time limit of a phase on this machine, with a warm build.
const HOST_LIMIT: Duration = Duration::from_secs(3600);
/// Time limit of the kernel cases of one VM: with other VMs on two cores they take 40 minutes.
const CASES_LIMIT: Duration = Duration::from_secs(3600);

/// The work of one VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Share {
    line: Line,
    cases: Cases,
}

/// A subset of the kernel cases.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cases {
    /// All that match the user's filter.
    All,
    /// Cases that depend on the kernel.
    Kernel,
    /// Cases of private loop devices, which take half of the time.
    Private,
    /// All other cases.
    Others,
    /// Cases that count instructions, or measure a time that other work must not change, in
    /// `icount`.
    Counted,
}

/// The test programs of the kernel cases: of ublk devices, and of the kernel's loop devices. The
/// second also runs on this machine.
const VM: &str = "vm";
const KERNEL_LOOP: &str = "kernel_loop";
/// Cases of the second that depend on the kernel.
const LIFETIME: &str = "lifetime::";
/// Prefix of the names of cases of private loop devices.
const PRIVATE: &str = "private";
/// Those of them that run with the others, so that both VMs end at the same time.
const WITH_OTHERS: [&str; 3] = ["private::mapped", "private::builders", "private::partitions"];
/// Cases that a default run skips on the older kernel: names, claims and the command line do not
/// depend on the kernel, and private loop devices need a newer one.
const NOT_OF_THE_KERNEL: [&str; 9] = [
    PRIVATE,
    "commands::",
    "claims::",
    "many::",
    "errors::",
    "recovery_state::",
    "resize::",
    "verify::one_queue",
    "shutdown::",
];

impl Cases {
    /// Command lines of the kernel cases.
    fn commands(self, filter: Option<&str>) -> Vec<Vec<&str>> {
        let skipping = |names: &[&'static str]| names.iter().flat_map(|name| ["--skip", *name]).collect();
        let all: Vec<(&str, Vec<&str>)> = match self {
            Cases::All => [VM, KERNEL_LOOP].map(|program| (program, filter.into_iter().collect())).into(),
            Cases::Kernel => vec![(VM, skipping(&NOT_OF_THE_KERNEL)), (KERNEL_LOOP, vec![LIFETIME])],
            // Counted cases are meaningless on emulated CPUs that share a core.
            Cases::Private => {
                let counted = ["private::figures::calls", "private::figures::last_close"];
                vec![(VM, [vec![PRIVATE], skipping(&counted), skipping(&WITH_OTHERS)].concat())]
            }
            // libtest-mimic takes one filter.
            Cases::Others => {
                let moved = WITH_OTHERS.map(|name| (VM, vec![name]));
                let all = [(VM, skipping(&[PRIVATE]))].into_iter().chain(moved);
                all.chain([(KERNEL_LOOP, vec![LIFETIME])]).collect()
            }
            Cases::Counted => vec![(VM, vec!["private::figures", "--skip", "private::figures::set_up"])],
        };
        let command = |(program, words)| [vec![program, "--test-threads=1"], words].concat();
        all.into_iter().map(command).collect()
    }

    /// One shell command for all of them, with the highest exit status: a crash must not go unseen.
    fn shell_command(self, filter: Option<&str>) -> String {
        let commands = self.commands(filter);
        let each =
            commands.iter().map(|words| format!("{}; s=$?; [ $s -le $max ] || max=$s", sh::quote(words)));
        format!("max=0; {}; (exit $max)", each.collect::<Vec<_>>().join("; "))
    }

    fn mode(self) -> Mode {
        if self == Cases::Counted { Mode::Icount } else { Mode::Smp }
    }

    fn name(self) -> &'static str {
        match self {
            Cases::All | Cases::Kernel => "",
            Cases::Private => ", private loop devices",
            Cases::Others => ", all others",
            Cases::Counted => ", instructions counted",
        }
    }
}

/// A part of the run that is reported separately.
struct Phase {
    name: String,
    tally: Tally,
    time: Duration,
}

impl Phase {
    /// Announces the phase on `sink` and runs `body`.
    fn run(name: String, sink: Sink<'_>, body: impl FnOnce(Sink<'_>) -> Result<Tally>) -> Result<Phase> {
        sink(format!("\n== {name}\n").as_bytes());
        let start = Instant::now();
        let tally = body(sink)?;
        Ok(Phase { name, tally, time: start.elapsed() })
    }
}

/// Runs the tests that `options` select; returns whether all passed.
pub(crate) fn run(options: &SuiteOptions) -> Result<bool> {
    let filter = options.filter.as_deref();
    let out: Sink<'_> = &mut vm::to_stdout;
    let mut phases = vec![
        Phase::run("tests on this machine".into(), out, |_| host_tests(filter))?,
        Phase::run("examples in the documentation".into(), out, |_| doc_tests(filter))?,
    ];
    if options.host {
        phases.push(Phase::run("kernel cases on this machine".into(), out, |_| cases_here(options))?);
    } else {
        phases.extend(in_vms(options)?);
    }
    Ok(summarise(&phases))
}

/// Runs kernel cases and power cuts in parallel VMs: one VM seldom keeps two cores busy. Prints the
/// output of the first VM as it arrives, and that of the others when they end.
fn in_vms(options: &SuiteOptions) -> Result<Vec<Phase>> {
    let lab = setup::ensure_all()?;
    let mut programs = programs::build()?;
    let cases = [VM, KERNEL_LOOP].map(programs::build_cases);
    let cases = cases.into_iter().collect::<Result<Vec<_>>>()?;
    let mut any = false;
    for program in &cases {
        any |= any_case(program, options.filter.as_deref())?;
    }
    programs.extend(cases);
    let run = |share: Share, sink: Sink<'_>| one_vm(&lab, share, &programs, any, options, sink);
    let (first, others) = shares(options);
    std::thread::scope(|scope| {
        let others: Vec<_> = others
            .into_iter()
            .map(|share| {
                scope.spawn(move || {
                    let mut said = Vec::new();
                    let phases = run(share, &mut |bytes| said.extend_from_slice(bytes));
                    (said, phases)
                })
            })
            .collect();
        let mut phases = run(first, &mut vm::to_stdout)?;
        for other in others {
            let (said, more) = other.join().map_err(|_| anyhow!("the thread of a VM panicked"))?;
            vm::to_stdout(&said);
            phases.extend(more?);
        }
        Ok(phases)
    })
}

fn one_vm(
    lab: &Lab,
    share: Share,
    programs: &[Program],
    any: bool,
    options: &SuiteOptions,
    sink: Sink<'_>,
) -> Result<Vec<Phase>> {
    let Share { line, cases } = share;
    let release = lab.kernel(line)?.release;
    let filter = options.filter.as_deref();
    let mut phases = Vec::new();
    if matches!(cases, Cases::All | Cases::Kernel | Cases::Others) {
        phases.push(Phase::run(format!("power cut, {release}"), sink, |sink| {
            powercut::run(lab, line, programs, filter, sink)
        })?);
    }
    if any {
        phases.push(Phase::run(format!("kernel cases, {release}{}", cases.name()), sink, |sink| {
            cases_in_vm(lab, share, programs, options, sink)
        })?);
    }
    Ok(phases)
}

/// The share whose output is printed as it arrives, and the others.
fn shares(options: &SuiteOptions) -> (Share, Vec<Share>) {
    let all = |line| Share { line, cases: Cases::All };
    let seven = |cases| Share { line: Line::Seven, cases };
    let everyday = options.filter.is_none() && !options.full;
    let cases = if everyday { Cases::Kernel } else { Cases::All };
    let older =
        (options.kernel.is_none() && !options.quick).then_some(Share { line: Line::SixTwelve, cases });
    match options.kernel {
        Some(Line::SixTwelve) => (all(Line::SixTwelve), vec![]),
        // Several filters of libtest are alternatives, so no second one can narrow the user's.
        _ if options.filter.is_some() => (seven(Cases::All), older.into_iter().collect()),
        _ => {
            let others = [seven(Cases::Private), seven(Cases::Counted)];
            (seven(Cases::Others), others.into_iter().chain(older).collect())
        }
    }
}

fn summarise(phases: &[Phase]) -> bool {
    // Last, because CI may show only the end of its output.
    for Phase { name, tally, .. } in phases {
        for message in &tally.messages {
            println!("\nfailed, {name}:\n{message}");
        }
    }
    println!();
    let mut total = Tally::default();
    for Phase { name, tally, time } in phases {
        println!("{name:<45} {tally}  ({} s)", time.as_secs());
        total += tally.clone();
    }
    println!("\n{total}");
    total.failed == 0
}

/// Runs unit, property and command-line tests: all but the kernel cases.
fn host_tests(filter: Option<&str>) -> Result<Tally> {
    if sh::which("cargo-nextest").is_ok() {
        let words =
            ["nextest", "run", "--workspace", "--cargo-profile", "lab", "--no-fail-fast", "--no-tests=pass"];
        let mut command = programs::cargo(&words);
        command
            .args(["--status-level=fail", "--final-status-level=fail", "-E", "not binary(vm)"])
            .args(filter);
        let (status, said) = sh::tee(&mut command, HOST_LIMIT)?;
        return reconcile("cargo nextest", status.success(), nextest(&said, filter.is_some()));
    }
    // Without nextest: all targets but the kernel cases, by name.
    let mut command = programs::cargo(&["test", "--workspace", "--quiet", "--no-fail-fast"]);
    command.args(programs::PROFILE).args(["--lib", "--bins"]);
    for name in programs::test_targets()?.iter().filter(|name| *name != "vm") {
        command.args(["--test", name]);
    }
    let (status, said) = sh::tee(command.args(filter), HOST_LIMIT)?;
    reconcile("cargo test", status.success(), libtest(&said))
}

fn doc_tests(filter: Option<&str>) -> Result<Tally> {
    let mut command = programs::cargo(&["test", "--doc", "--workspace", "--quiet"]);
    command.args(programs::PROFILE);
    if let Some(filter) = filter {
        command.args(["--", filter]);
    }
    let (status, said) = sh::tee(&mut command, HOST_LIMIT)?;
    reconcile("cargo test --doc", status.success(), libtest(&said))
}

fn cases_in_vm(
    lab: &Lab,
    Share { line, cases }: Share,
    programs: &[Program],
    options: &SuiteOptions,
    sink: Sink<'_>,
) -> Result<Tally> {
    let machine = Vm { limit: CASES_LIMIT, ..Vm::new(lab.kernel(line)?, cases.mode()) };
    let full = if options.full { "export LOOPENGINE_VM_FULL=1; " } else { "" };
    let command = format!("{full}{}", cases.shell_command(options.filter.as_deref()));
    let (first, said) = cases_once(lab, &machine, programs, &command, sink)?;
    let names = failed_names(&said);
    if names.is_empty() || names.len() > SECOND_TRIES_MAX || names.len() as u64 != first.failed {
        return Ok(first);
    }
    // An emulated machine on shared cores sometimes misses a deadline. A real failure fails again;
    // a case that passes on the retry is named.
    sink(format!("lab: retrying in another VM: {}\n", names.join(", ")).as_bytes());
    let again = |name| [VM, KERNEL_LOOP].map(|program| sh::quote(&[program, "--exact", name])).join("; ");
    let again: Vec<String> = names.iter().map(|name| again(name)).collect();
    let (second, said) = cases_once(lab, &machine, programs, &format!("{full}{}", again.join("; ")), sink)?;
    let failed = failed_names(&said);
    if (second.passed + second.failed) as usize != names.len() {
        return Ok(first);
    }
    for name in names.iter().filter(|name| !failed.contains(name)) {
        sink(format!("lab: passed only on the retry: {name}\n").as_bytes());
    }
    Ok(Tally { passed: first.passed + second.passed, skipped: first.skipped, ..second })
}

/// Shell commands that report a crash of the test program itself.
const CRASH_REPORT: &str = include_str!("crash.sh");
/// If more cases fail, none is retried.
const SECOND_TRIES_MAX: usize = 6;

fn cases_once(
    lab: &Lab,
    machine: &Vm,
    programs: &[Program],
    command: &str,
    sink: Sink<'_>,
) -> Result<(Tally, String)> {
    let mut said = Vec::new();
    let command = format!(
        "ulimit -c unlimited; echo /run/core.%e >/proc/sys/kernel/core_pattern\n\
         {command}\nstatus=$?\n{CRASH_REPORT}\n(exit $status)"
    );
    let result = machine.run(lab, programs, &command, &mut |bytes| {
        sink(bytes);
        said.extend_from_slice(bytes);
    });
    let said = String::from_utf8_lossy(&said).into_owned();
    let tally = match result {
        // The exit status is that of the last command; the tallies cover all.
        Ok(status) => {
            let failed_before_the_last = libtest(&said).is_some_and(|tally| tally.failed > 0);
            cases("the kernel cases", status == 0 && !failed_before_the_last, &said)?
        }
        Err(error) if sh::interrupted().is_err() => return Err(error),
        Err(error) => {
            // A case crashed the VM: count the cases before it.
            sink(format!("lab: {error:#}\n").as_bytes());
            let mut tally = seen(&said);
            tally.fail(&format!("{error:#}"));
            tally
        }
    };
    Ok((tally, said))
}

/// Whether a kernel case matches the filter: otherwise no VM is booted.
fn any_case(cases: &Program, filter: Option<&str>) -> Result<bool> {
    let mut list = Command::new(&cases.path);
    list.args(["--list", "--format=terse"]).args(filter);
    let said = sh::capture(&mut list, Duration::from_secs(60))?;
    Ok(filter.is_none() || said.contains(": test"))
}

fn cases_here(options: &SuiteOptions) -> Result<Tally> {
    let programs = programs::build()?;
    let cases_program = programs::build_cases(VM)?;
    let engine = programs.iter().find(|program| program.name == "loopengine");
    let engine = engine.context("cargo built no program named loopengine")?;
    let mut command = Command::new(&cases_program.path);
    command.arg("--test-threads=1").args(options.filter.as_deref());
    command.env("LOOPENGINE", &engine.path).env("LOOPENGINE_VM_CASES", "1");
    let (status, said) = sh::tee(&mut command, CASES_LIMIT)?;
    cases("the kernel cases", status.success(), &said)
}

/// Fails if all kernel cases were skipped.
fn cases(what: &str, success: bool, said: &str) -> Result<Tally> {
    let mut tally = reconcile(what, success, libtest(said))?;
    if tally.passed == 0 && tally.failed == 0 && tally.skipped > 0 {
        tally.fail("all kernel cases were skipped, for the reasons above");
    }
    Ok(tally)
}

/// The tally, with a failure added if only the exit status reports one.
fn reconcile(what: &str, success: bool, tally: Option<Tally>) -> Result<Tally> {
    match tally {
        Some(tally) if success || tally.failed > 0 => Ok(tally),
        Some(mut tally) => {
            tally.fail(&format!("{what} ended with an error that no test reports: see above"));
            Ok(tally)
        }
        None if success => Ok(Tally::default()),
        None => bail!("{what} failed before it ran a test: see above"),
    }
}

#[cfg(test)]
mod tests;
