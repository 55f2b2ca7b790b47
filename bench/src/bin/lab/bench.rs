// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `lab bench` and `lab gate`: run `loopbench` in a VM; `lab profile` uses it.
//!
//! Boots the VM (for `icount` a sealed machine), records revision and versions, and writes the
//! report.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use loopbench::job::Job;
use loopbench::outcome::Outcome;
use loopbench::raw::Facts;
use loopbench::{collect, daemon, gate, raw, render, run, sh};

use crate::kernel::Line;
use crate::programs::Program;
use crate::sealed::{self, Out, Sealed};
use crate::vm::{self, Mode, Vm};
use crate::{programs, setup};

/// What to measure and where.
#[derive(clap::Args)]
pub(crate) struct BenchOptions {
    /// Fewer jobs, shorter rounds, fewer devices: both modes take less than a quarter of an hour
    #[arg(long)]
    quick: bool,
    /// CPUs of the VM [default: both kinds, one after the other]
    #[arg(long, value_enum)]
    mode: Option<Mode>,
    /// Kernel of the VM
    #[arg(long, value_enum, default_value = "7")]
    kernel: Line,
    /// Let idle CPUs of the VM spin instead of sleep, so that wake-ups cost about as much as on
    /// hardware
    #[arg(long)]
    idle_poll: bool,
    /// Measure on this machine instead of in a VM: needs root and ublk
    #[arg(long, conflicts_with_all = ["kernel", "mode", "idle_poll"])]
    host: bool,
    /// Continue an interrupted run: measure only what is missing
    #[arg(long)]
    resume: bool,
    /// Directory of the results, with one directory per mode [default:
    /// results/DATE-lab-MODE-KERNEL]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Time limit of a VM
    #[arg(long, value_name = "SECONDS", default_value_t = 7200)]
    timeout: u64,
    /// Options of `loopbench run`; see `loopbench run --help`
    #[arg(last = true, value_name = "OPTION")]
    more: Vec<String>,
}

/// How to use the measurements.
#[derive(clap::Args)]
pub(crate) struct Gate {
    /// Write the measurements to the baseline instead of comparing them
    #[arg(long)]
    pub(crate) accept: bool,
}

/// The machine on which `loopbench` runs.
pub(crate) struct Stage<'a> {
    mode: Option<Mode>,
    kernel: Line,
    idle_poll: bool,
    pub(crate) limit: Duration,
    programs: &'a [Program],
    /// Notes for the manifest.
    notes: Vec<Note>,
    /// Plugin of a sealed machine, in QEMU's format.
    pub(crate) plugin: Option<String>,
}

impl<'a> Stage<'a> {
    /// A VM without notes.
    pub(crate) fn new(mode: Mode, kernel: Line, programs: &'a [Program]) -> Stage<'a> {
        Stage {
            mode: Some(mode),
            kernel,
            idle_poll: false,
            limit: Duration::from_secs(900),
            programs,
            notes: Vec::new(),
            plugin: None,
        }
    }
}

/// Name and value of a note for the manifest.
type Note = (&'static str, String);

/// The CPU of this machine, which has its own field in the manifest.
const HOST_CPU: &str = "host-cpu";

/// Memory of the VM, which holds the images of all targets.
const MEMORY: &str = "6G";

/// Measures and writes reports; returns the exit code.
pub(crate) fn bench(options: &BenchOptions) -> Result<u8> {
    // Before the build, which needs some of it.
    if !options.host {
        setup::ensure_all()?;
    }
    // Link-time optimisation takes as long as a short run, and changes a 4K read by 0.25 %.
    let programs = if options.quick { programs::build()? } else { programs::build_release()? };
    let modes = match (options.host, options.mode) {
        (true, _) => vec![None],
        (false, Some(mode)) => vec![Some(mode)],
        (false, None) => vec![Some(Mode::Icount), Some(Mode::Smp)],
    };
    let date = today()?;
    for mode in modes {
        let place = match mode {
            None => "host".to_owned(),
            Some(mode) if options.idle_poll => format!("lab-{}-poll-{}", mode.name(), options.kernel.name()),
            Some(mode) => format!("lab-{}-{}", mode.name(), options.kernel.name()),
        };
        let out = match &options.out {
            Some(out) => out.join(&place),
            None => programs::workspace().join("results").join(format!("{date}-{place}")),
        };
        let stage = Stage {
            mode,
            kernel: options.kernel,
            idle_poll: options.idle_poll,
            limit: Duration::from_secs(options.timeout),
            programs: &programs,
            notes: notes(options, mode)?,
            plugin: None,
        };
        let quick = options.quick.then_some("--quick");
        let words: Vec<&str> = quick.into_iter().chain(options.more.iter().map(String::as_str)).collect();
        let start = Instant::now();
        let outcome = measure(&stage, &words, &out, options.resume)?;
        render::write(&outcome, &out)?;
        if outcome.manifest.complete {
            raw::pack(&out)?;
        }
        println!("\n{}", render::terminal(&outcome));
        println!("{} min; written to {}\n", start.elapsed().as_secs().div_ceil(60), out.display());
    }
    Ok(0)
}

/// Options of a run that the gate compares.
pub(crate) const GATE_WORDS: [&str; 8] =
    ["--rounds", "1", "--run-ms", "1000", "--attaches", "0", "--idle", "0"];

/// Measures a few jobs in `icount` and compares with the baseline; returns the exit code.
pub(crate) fn gate(options: &Gate) -> Result<u8> {
    let out = tempfile::tempdir()?;
    setup::ensure_all()?;
    // The profile of the lab, which other steps of CI have built already.
    let programs = programs::build()?;
    let stage = Stage::new(Mode::Icount, Line::Seven, &programs);
    let jobs: Vec<&str> = gate::JOBS.iter().map(|job: &&Job| job.name).collect();
    let (jobs, targets) = (jobs.join(","), gate::TARGETS.join(","));
    let words = [&["--jobs", &jobs, "--targets", &targets], &GATE_WORDS[..]].concat();
    let outcome = measure(&stage, &words, out.path(), false)?;
    gate::run(&outcome, &programs::workspace().join(gate::BASELINE), options.accept)
}

/// Runs `loopbench` with `words` on the stage, and collects its raw files.
pub(crate) fn measure(stage: &Stage<'_>, words: &[&str], out: &Path, resume: bool) -> Result<Outcome> {
    if resume {
        raw::unpack(out)?;
    } else {
        raw::remove(out)?;
    }
    let raw = out.join(raw::DIRECTORY);
    fs::create_dir_all(&raw).with_context(|| format!("cannot make {}", raw.display()))?;
    let out = out.canonicalize()?;
    let line = |out: &str| {
        let mode = stage.mode.map_or("host", Mode::name);
        let mut line: Vec<String> =
            ["run", "--raw-only", "--mode", mode, "--out", out].map(str::to_owned).into();
        line.extend(resume.then(|| "--resume".to_owned()));
        line.extend(words.iter().map(|word| (*word).to_owned()));
        line
    };
    let notes = stage.notes.iter().flat_map(|(key, value)| ["--note".to_owned(), format!("{key}={value}")]);
    let status = match stage.mode {
        None => here(stage, &[line(&out.to_string_lossy()), notes.collect()].concat())?,
        Some(Mode::Icount) => sealed(stage, &line(&format!("/{SEALED_OUT}")), &raw)?,
        Some(Mode::Smp) => {
            let lab = setup::ensure_all()?;
            let machine = Vm {
                shares: vec![out.clone()],
                limit: stage.limit,
                at_once: true,
                idle_poll: stage.idle_poll,
                memory: MEMORY.into(),
                ..Vm::new(lab.kernel(stage.kernel)?, Mode::Smp)
            };
            let line = [vec!["loopbench".to_owned()], line(&out.to_string_lossy()), notes.collect()].concat();
            machine.run(&lab, &with_peers(stage.programs), &sh::quote(&line), &mut vm::to_stdout)?
        }
    };
    if status != 0 && !raw.join(raw::FACTS).exists() {
        bail!("loopbench failed with status {status}");
    }
    if status != 0 {
        println!(
            "loopbench ended early with status {status}: to continue, run the same command with --resume"
        );
    }
    collect::collect(&raw)
}

/// Directory of the result in a sealed machine.
const SEALED_OUT: &str = "out";

/// Runs `line` in the sealed machine and writes each raw file to `into` as it arrives. Notes and
/// date are added outside, since they differ between runs.
fn sealed(stage: &Stage<'_>, line: &[String], into: &Path) -> Result<i32> {
    let lab = setup::ensure_all()?;
    let machine = Sealed {
        kernel: lab.kernel(stage.kernel)?,
        memory: MEMORY.into(),
        limit: stage.limit,
        idle_poll: stage.idle_poll,
        plugin: stage.plugin.clone(),
    };
    let mut tree = sealed::tree(&lab, &machine.kernel, stage.programs)?;
    // Raw files of the run that is resumed.
    for entry in fs::read_dir(into)? {
        let entry = entry?;
        tree.file(
            &format!("{SEALED_OUT}/raw/{}", entry.file_name().to_string_lossy()),
            fs::read(entry.path())?,
        );
    }
    let date = today()?;
    let mut keep = |name: &str, bytes: &[u8]| match name {
        raw::FACTS => {
            let mut facts: Facts = serde_json::from_slice(bytes)?;
            facts.manifest.date.clone_from(&date);
            for (key, value) in &stage.notes {
                match *key {
                    HOST_CPU => facts.manifest.host_cpu.clone_from(value),
                    _ => drop(facts.manifest.notes.insert((*key).to_owned(), value.clone())),
                }
            }
            raw::keep(into, name, &serde_json::to_vec(&facts)?)
        }
        _ => raw::keep(into, name, bytes),
    };
    let line = format!("loopbench {}", sh::quote(line));
    machine.run(&lab, tree, &line, Out { text: &mut vm::to_stdout, file: &mut keep })
}

fn here(stage: &Stage<'_>, line: &[String]) -> Result<i32> {
    if !daemon::can_run_here() {
        bail!("--host needs root and ublk: run it as root, or without --host in a VM");
    }
    let mut command = programs::with_engine(stage.programs, "loopbench")?;
    let (status, _) = sh::tee(command.args(line), stage.limit)?;
    Ok(status.code().unwrap_or(1))
}

/// Adds peers that may be installed outside the VM's PATH.
fn with_peers(programs: &[Program]) -> Vec<Program> {
    let mut programs = programs.to_vec();
    if let Ok(path) = sh::which("rublk") {
        programs.push(Program { name: "rublk".into(), path });
    }
    programs
}

/// Notes for the manifest.
fn notes(options: &BenchOptions, mode: Option<Mode>) -> Result<Vec<Note>> {
    let git = |words: &[&str]| said(Command::new("git").args(words).current_dir(programs::workspace()));
    let first = |said: Result<String>| said.ok().and_then(|said| Some(said.lines().next()?.to_owned()));
    // Changes of results do not change what is measured.
    let dirty = git(&["status", "--porcelain", "--", ".", ":!results"]).map_or(true, |said| !said.is_empty());
    let revision = git(&["rev-parse", "HEAD"]).unwrap_or_else(|_| "unknown".into());
    let cpu = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let mut words: Vec<String> = std::env::args().skip(1).collect();
    // The directory of the result does not matter for repeating the run.
    if let Some(at) = words.iter().position(|word| word == "--out") {
        words.drain(at..words.len().min(at + 2));
    }
    let mut notes = vec![
        ("revision", format!("{revision}{}", if dirty { " with changes" } else { "" })),
        ("command", format!("cargo lab {}", sh::quote(&words))),
        (HOST_CPU, run::cpu_model(&cpu).unwrap_or("unknown").to_owned()),
        ("qemu", first(said(Command::new("qemu-system-x86_64").arg("--version"))).unwrap_or_default()),
        (
            "build",
            if options.quick { "cargo build --profile lab" } else { "cargo build --release" }.to_owned(),
        ),
    ];
    match mode {
        Some(Mode::Icount) => notes.push(("machine", "sealed".to_owned())),
        Some(Mode::Smp) => notes.push(("virtme-ng", setup::VIRTME.to_owned())),
        None => {}
    }
    Ok(notes)
}

/// Date in names of result directories.
fn today() -> Result<String> {
    said(Command::new("date").args(["-u", "+%F"]))
}

fn said(command: &mut Command) -> Result<String> {
    Ok(sh::capture(command, Duration::from_secs(60))?.trim().to_owned())
}
