// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `loopbench`: compares loopengine with the kernel's loop driver, FUSE and others, with fio.
//!
//! This file knows the command line only. `cargo lab bench` runs it in a VM of the lab.

#![forbid(unsafe_code)]

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::{Parser, Subcommand};
use loopbench::plan::{Choice, describe};
use loopbench::{collect, compare, gate, passthrough, raw, render, run, sh};

/// Compares loop devices of all kinds with fio.
///
/// Sets up each target, runs each job on each target in every round, and writes a report with
/// ratios, intervals, and everything needed to repeat the run. Needs fio, and root for most
/// targets. A target that cannot be set up is reported with the reason, and the run continues.
#[derive(Parser)]
#[command(name = "loopbench", version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Measure, and write a report
    Run {
        #[command(flatten)]
        choice: Choice,
        /// Directory for the result: result.json, result.csv, report.md, report.html, plots/,
        /// raw.tar.gz
        #[arg(long, value_name = "DIR", default_value = "loopbench-result")]
        out: PathBuf,
        /// Continue an interrupted run: measure only what DIR lacks
        #[arg(long)]
        resume: bool,
        /// Write no report
        #[arg(long, hide = true)]
        raw_only: bool,
    },
    /// Describe jobs, targets and duration of a run
    Plan {
        #[command(flatten)]
        choice: Choice,
    },
    /// Rewrite the report of a result from its raw files
    Report {
        /// Directory of the result
        dir: PathBuf,
    },
    /// Compare two results; exit status 1 if a row became slower
    Compare {
        /// Directory of the older result, or its result.json
        old: PathBuf,
        /// Directory of the newer result, or its result.json
        new: PathBuf,
    },
    /// Fail if an I/O costs more instructions than the baseline; for results in `icount`
    Gate {
        /// Directory of the result
        dir: PathBuf,
        /// The committed baseline
        #[arg(long, value_name = "FILE", default_value = gate::BASELINE)]
        baseline: PathBuf,
        /// Write the result to the baseline instead of comparing it
        #[arg(long)]
        accept: bool,
    },
    /// Serve the target 'fuse passthrough'
    #[command(hide = true)]
    Passthrough { directory: PathBuf, images: Vec<PathBuf> },
    /// Rewrite the figures in documents from the results that they link
    Figures {
        /// Directory of the repository
        #[arg(long, value_name = "DIR", default_value = ".")]
        root: PathBuf,
        /// Documents with tables of results
        #[arg(value_name = "FILE", default_values = render::figures::DOCUMENTS)]
        files: Vec<PathBuf>,
    },
}

const FAILED: u8 = 1;
const INTERRUPTED: u8 = 130;

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match sh::watch_signals().and_then(|()| execute(arguments.command)) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("loopbench: {error:#}");
            ExitCode::from(if sh::interrupted().is_err() { INTERRUPTED } else { FAILED })
        }
    }
}

fn execute(command: Command) -> Result<u8> {
    match command {
        Command::Plan { choice } => {
            say(&describe(&choice.plan()?)?);
            Ok(0)
        }
        Command::Run { choice, out, resume, raw_only } => {
            if raw::exist(&out) && !resume {
                bail!(
                    "{} contains a result: give another directory, or continue with --resume",
                    out.display()
                );
            }
            raw::unpack(&out)?;
            let complete = run::run(&choice.plan()?, &out.join(raw::DIRECTORY), resume)?;
            if !raw_only {
                let outcome = sh::uninterrupted(|| report(&out))?;
                if complete {
                    raw::pack(&out)?;
                }
                say(&format!("\n{}\nwritten to {}\n", render::terminal(&outcome), out.display()));
            }
            if !complete {
                println!("interrupted: continue with --resume");
            }
            Ok(if complete { 0 } else { INTERRUPTED })
        }
        Command::Report { dir } => {
            say(&format!("{}\nwritten to {}\n", render::terminal(&report(&dir)?), dir.display()));
            Ok(0)
        }
        Command::Compare { old, new } => {
            let comparison = compare::compare(&render::read(&old)?, &render::read(&new)?)?;
            say(&comparison.to_string());
            Ok(u8::from(comparison.slower()))
        }
        Command::Passthrough { directory, images } => {
            passthrough::serve(&directory, &images)?;
            Ok(0)
        }
        Command::Figures { root, files } => {
            for file in files.iter().map(|file| root.join(file)) {
                let text = std::fs::read_to_string(&file).with_context(|| file.display().to_string())?;
                let text =
                    render::figures::refreshed(&text, &root).with_context(|| file.display().to_string())?;
                std::fs::write(&file, text).with_context(|| file.display().to_string())?;
            }
            Ok(0)
        }
        Command::Gate { dir, baseline, accept } => gate::run(&collect::result(&dir)?, &baseline, accept),
    }
}

/// Prints to standard output; a closed pipe is no error.
fn say(text: &str) {
    let _ = std::io::stdout().write_all(text.as_bytes());
}

fn report(dir: &std::path::Path) -> Result<loopbench::outcome::Outcome> {
    let outcome = collect::result(dir)?;
    render::write(&outcome, dir)?;
    Ok(outcome)
}
