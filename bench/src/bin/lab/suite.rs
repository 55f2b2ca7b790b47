// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `lab test`: runs all tests and prints totals.
//!
//! Unit, property and command-line tests run on this machine, kernel cases in VMs (`shares`), power
//! cuts from outside a VM; three of these jobs at a time (`lanes`). `tally` parses the output of
//! test programs.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use loopbench::sh;

use crate::kernel::Line;
use crate::programs::{self, Program};
use crate::setup::{self, Lab};
use crate::tally::{Tally, failed_names, libtest, nextest, seen};
use crate::vm::{self, Sink, Vm};

use crate::powercut;

mod lanes;
mod shares;

use shares::{Cases, KERNEL_LOOP, Share, VM, shares};

/// What to run.
#[derive(clap::Args, Default)]
pub(crate) struct SuiteOptions {
    /// Kernel to run kernel cases on [default: all that the cases need]
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
    /// Run variants of kernel cases too, and the long cases at full length
    #[arg(long)]
    full: bool,
}

/// Time limit of a phase on this machine, with a warm build.
const HOST_LIMIT: Duration = Duration::from_secs(3600);
/// Time limit of the kernel cases of one VM: with other VMs on two cores they take 40 minutes.
const CASES_LIMIT: Duration = Duration::from_secs(3600);
/// Jobs that run at the same time. A VM seldom keeps one core busy: its guest waits.
const LANES: usize = 3;

/// A part of the run that is reported separately.
struct Phase {
    name: String,
    tally: Tally,
    time: Duration,
}

impl Phase {
    /// Announces the phase on `sink` and runs `body`. Its error is a failed test: other phases keep
    /// their results.
    fn run(name: String, sink: Sink<'_>, body: impl FnOnce(Sink<'_>) -> Result<Tally>) -> Result<Phase> {
        sink(format!("\n== {name}\n").as_bytes());
        let start = Instant::now();
        let tally = match body(sink) {
            Ok(tally) => tally,
            Err(error) if sh::interrupted().is_err() => return Err(error),
            Err(error) => {
                let mut tally = Tally::default();
                tally.fail(&format!("{error:#}"));
                tally
            }
        };
        Ok(Phase { name, tally, time: start.elapsed() })
    }
}

/// A part of the run that waits for no other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Job {
    /// Unit, property and command-line tests, on this machine.
    Host,
    /// Examples in the documentation.
    Docs,
    /// Power cuts of a VM.
    PowerCut(Line),
    /// Kernel cases in a VM.
    Cases(Share),
}

/// Runs the tests that `options` select; returns whether all passed.
pub(crate) fn run(options: &SuiteOptions) -> Result<bool> {
    let phases = if options.host {
        let out: Sink<'_> = &mut vm::to_stdout;
        vec![
            Phase::run("tests on this machine".into(), out, |sink| host_tests(options, None, sink))?,
            Phase::run("examples in the documentation".into(), out, |sink| doc_tests(options, sink))?,
            Phase::run("kernel cases on this machine".into(), out, |_| cases_here(options))?,
        ]
    } else {
        with_vms(options)?
    };
    Ok(summarise(&phases))
}

/// Builds all that the jobs need, and runs them.
fn with_vms(options: &SuiteOptions) -> Result<Vec<Phase>> {
    let lab = setup::ensure_all()?;
    let tests = programs::build_tests()?;
    let cases = [find(&tests, VM)?.clone(), find(&tests, KERNEL_LOOP)?.clone()];
    let mut any = false;
    for program in &cases {
        any |= any_case(program, options.filter.as_deref())?;
    }
    let mut programs = programs::build()?;
    programs.extend(cases);
    let jobs = jobs(options, any);
    let tools = lab.tools();
    let results = lanes::run(LANES, &jobs, &vm::to_stdout, |job, sink| match *job {
        Job::Host => {
            Phase::run("tests on this machine".into(), sink, |sink| host_tests(options, Some(&tools), sink))
        }
        Job::Docs => {
            Phase::run("examples in the documentation".into(), sink, |sink| doc_tests(options, sink))
        }
        Job::PowerCut(line) => {
            Phase::run(format!("power cut, {}", lab.kernel(line)?.release), sink, |sink| {
                powercut::run(&lab, line, &programs, options.filter.as_deref(), sink)
            })
        }
        Job::Cases(share) => {
            let release = lab.kernel(share.line)?.release;
            Phase::run(format!("kernel cases, {release}{}", share.cases.name()), sink, |sink| {
                cases_in_vm(&lab, share, &programs, options, sink)
            })
        }
    });
    results.into_iter().collect()
}

fn find<'a>(tests: &'a [Program], name: &str) -> Result<&'a Program> {
    let program = tests.iter().find(|program| program.name == name);
    program.with_context(|| format!("cargo built no test program named {name}"))
}

/// The jobs of a run, the longest first. `any_case`: whether the filter matches a kernel case.
fn jobs(options: &SuiteOptions, any_case: bool) -> Vec<Job> {
    let shares = shares(options);
    // A power cut needs ublk, and runs once on each kernel.
    let cut = |share: &Share| match share.cases {
        Cases::All | Cases::Kernel | Cases::Others if share.line.has_ublk() => {
            Some(Job::PowerCut(share.line))
        }
        _ => None,
    };
    let cuts: Vec<Job> = shares.iter().filter_map(cut).collect();
    let mut jobs = vec![Job::Host];
    if any_case {
        jobs.extend(shares.into_iter().map(Job::Cases));
    }
    jobs.extend(cuts);
    jobs.push(Job::Docs);
    jobs
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

/// Runs unit, property and command-line tests: all but the kernel cases. `tools`: a directory of
/// programs that this machine need not have.
fn host_tests(options: &SuiteOptions, tools: Option<&Path>, sink: Sink<'_>) -> Result<Tally> {
    let filter = options.filter.as_deref();
    let with_tools = |command: &mut Command| {
        command.envs(tools.map(|tools| ("LOOPENGINE_LAB_TOOLS", tools)));
    };
    if sh::which("cargo-nextest").is_ok() {
        let words =
            ["nextest", "run", "--workspace", "--cargo-profile", "lab", "--no-fail-fast", "--no-tests=pass"];
        let mut command = programs::cargo(&words);
        command
            .args(["--status-level=fail", "--final-status-level=fail", "-E", "not binary(vm)"])
            .args(filter);
        with_tools(&mut command);
        let (success, said) = pass_on(&mut command, sink)?;
        return reconcile("cargo nextest", success, nextest(&said, filter.is_some()));
    }
    // Without nextest: all targets but the kernel cases, by name.
    let mut command = programs::cargo(&["test", "--workspace", "--quiet", "--no-fail-fast"]);
    command.args(programs::PROFILE).args(["--lib", "--bins"]);
    for name in programs::test_targets()?.iter().filter(|name| *name != "vm") {
        command.args(["--test", name]);
    }
    with_tools(&mut command);
    let (success, said) = pass_on(command.args(filter), sink)?;
    reconcile("cargo test", success, libtest(&said))
}

/// Runs `command` and passes its output on when it ends.
fn pass_on(command: &mut Command, sink: Sink<'_>) -> Result<(bool, String)> {
    let output = sh::output(command, HOST_LIMIT)?;
    let said = [output.stdout, output.stderr].concat();
    sink(&said);
    Ok((output.status.success(), String::from_utf8_lossy(&said).into_owned()))
}

fn doc_tests(options: &SuiteOptions, sink: Sink<'_>) -> Result<Tally> {
    let mut command = programs::cargo(&["test", "--doc", "--workspace", "--quiet"]);
    command.args(programs::PROFILE);
    if let Some(filter) = &options.filter {
        command.args(["--", filter]);
    }
    let (success, said) = pass_on(&mut command, sink)?;
    reconcile("cargo test --doc", success, libtest(&said))
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
    let tests = programs::build_tests()?;
    let cases_program = find(&tests, VM)?;
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
