// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `loopbench`: measures loopengine, the kernel's loop driver, FUSE and others by fio, side by side.
//!
//! This file knows the command line only. `cargo lab bench` runs it in a VM of the lab.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Result, bail};
use clap::{Parser, Subcommand};
use loopbench::plan::{Choice, describe};
use loopbench::{collect, compare, gate, raw, render, run, sh};

/// Measures loop devices of every kind side by side, by fio.
///
/// Each target is set up, each job runs on each target in every round, and what comes out is a
/// report with ratios, their intervals, and all it takes to do it again. Needs fio, and root for
/// most targets; one that cannot be set up here is named with the reason, and the rest goes on.
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
        /// Directory for the result: result.json, result.csv, report.md, report.html, plots/, raw.tar.gz
        #[arg(long, value_name = "DIR", default_value = "loopbench-result")]
        out: PathBuf,
        /// Go on where a run was interrupted: what is in DIR is not measured again
        #[arg(long)]
        resume: bool,
        /// Leave the report to somebody else
        #[arg(long, hide = true)]
        raw_only: bool,
    },
    /// Say what would be run, on what, and for how long
    Plan {
        #[command(flatten)]
        choice: Choice,
    },
    /// Write the report of a result anew, from its raw files
    Report {
        /// Directory of the result
        dir: PathBuf,
    },
    /// Say what became slower, with intervals; exit status 1 if something did
    Compare {
        /// Directory of the older result, or its result.json
        old: PathBuf,
        /// The newer one
        new: PathBuf,
    },
    /// Fail if an I/O costs more instructions than the baseline says: of a result taken in `icount`
    Gate {
        /// Directory of the result
        dir: PathBuf,
        /// The committed baseline
        #[arg(long, value_name = "FILE", default_value = gate::BASELINE)]
        baseline: PathBuf,
        /// Make the result the new baseline
        #[arg(long)]
        accept: bool,
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
                bail!("{} holds a result: name another directory, or go on with --resume", out.display());
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
                println!("interrupted: --resume goes on where this ended");
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
        Command::Gate { dir, baseline, accept } => gate::run(&collect::result(&dir)?, &baseline, accept),
    }
}

/// On standard output; that nobody reads it to its end is no failure.
fn say(text: &str) {
    let _ = std::io::stdout().write_all(text.as_bytes());
}

fn report(dir: &std::path::Path) -> Result<loopbench::outcome::Outcome> {
    let outcome = collect::result(dir)?;
    render::write(&outcome, dir)?;
    Ok(outcome)
}
