// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `cargo lab`: kernels in VMs, and the tests and measurements that need them.
//!
//! ```text
//!  setup ── kernel ──┐
//!  programs ─────────┴─ vm ──┬─ lab vm CMD
//!                            ├─ lab demo
//!                            ├─ lab test
//!                            ├─ lab hostile
//!                            └─ lab bench in smp: loopbench
//!  both ── initrd ── sealed ───── lab bench in icount, lab gate, lab profile: loopbench
//!  steps, cargo_tools ──────┬──── lab ci (all checks), lab docs (the book), lab release
//!  debian_root ─────────────┴──── lab package
//! ```
//! This file knows the command line only. The lab uses the public programs, never internals of the
//! engine.

#![forbid(unsafe_code)]

mod bench;
mod book;
mod cache;
mod cargo_tools;
mod ci;
mod debian_root;
mod demo;
mod hostile;
mod initrd;
mod kernel;
mod package;
mod powercut;
mod profile;
mod programs;
mod release;
mod sealed;
mod setup;
mod steps;
mod suite;
mod tally;
mod tenants;
mod vm;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use clap::{Parser, Subcommand};
use loopbench::{collect, render, sh, store};

use crate::vm::{Mode, Vm};

/// Boots kernels in VMs, tests and measures loopengine, checks and documents a change.
#[derive(Parser)]
#[command(name = "lab", bin_name = "cargo lab", version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Install what is missing: QEMU, fio, file system tools, virtme-ng, three kernels
    Setup {
        /// Fetch the newest kernels again
        #[arg(long)]
        upgrade: bool,
    },
    /// Run a command as root in a throw-away VM with the freshly built programs on PATH
    ///
    /// A single word is a line for the shell; several words are a program and its arguments. Prints
    /// the output and returns the exit status of the command; 125 if the lab itself failed.
    Vm(VmArguments),
    /// Show loopengine at work: two instances, file systems in images, a comparison with kernel loop
    Demo(demo::DemoOptions),
    /// Measure loopengine, kernel loop, FUSE and others side by side, and write a report
    Bench(bench::BenchOptions),
    /// Fail if an I/O costs more instructions than the committed baseline
    Gate(bench::Gate),
    /// Show which functions execute the instructions of an I/O, beside kernel loop
    ///
    /// Runs each JOB on the TARGETs and on kernel loop in the machine of `gate`, with a plugin of
    /// QEMU that counts instructions. Prints instructions per I/O by layer and by function, and the
    /// difference to what fio measures: exit status 1 if it is over 2 %.
    Profile(profile::ProfileOptions),
    /// Rewrite the report of a result from its raw files
    Report {
        /// Directory below results/
        dir: PathBuf,
    },
    /// Run all tests: unit tests on this machine, kernel cases in VMs
    Test(suite::SuiteOptions),
    /// Run hostile clients of all kinds in a VM, beside a well-behaved tenant and root
    ///
    /// Fails if a call of the well-behaved clients takes more than 2 s, if data differ, if the
    /// daemon does not return to its former number of descriptors and threads and its former
    /// memory, if SIGTERM does not end it in time, or if the kernel warns.
    Hostile(hostile::HostileOptions),
    /// Run all checks that a change must pass, as .ci/run does
    ///
    /// Formatting, set-up, clippy, licenses, rustdoc, benches, instructions per I/O, hostile
    /// clients for two minutes, all tests. Takes about 40 minutes on two cores.
    Ci(ci::CiOptions),
    /// Build the book of all documentation with mdbook, and check its links
    Docs(book::BookOptions),
    /// Build packages: Debian package, RPM, static tarball, container image
    ///
    /// Needs root, on Debian 12 or 13. The programs are built in a small system of Debian 12.
    Package(package::PackageOptions),
    /// Check that this tree can be released, and print the manual steps of a release
    Release(release::ReleaseOptions),
    /// Make or remove a file system in memory, for tests and measurements; needs root
    Store(store::Options),
    /// Guest side of the power cut tests
    #[command(hide = true, subcommand)]
    PowerCut(powercut::guest::Boot),
    /// Guest side of the hostile clients
    #[command(hide = true, subcommand)]
    HostileGuest(hostile::guest::Role),
}

#[derive(clap::Args)]
struct VmArguments {
    /// Kernel to boot
    #[arg(long, value_enum, default_value = "7")]
    kernel: kernel::Line,
    /// CPUs of the VM
    #[arg(long, value_enum, default_value = "smp")]
    mode: Mode,
    /// Memory, in the format of QEMU
    #[arg(long, default_value = "3G")]
    memory: String,
    /// Raw image that the VM gets as a disk, /dev/vda first; writes change FILE
    #[arg(long, value_name = "FILE")]
    disk: Vec<PathBuf>,
    /// Directory that the VM can write to
    #[arg(long, value_name = "DIR")]
    share: Vec<PathBuf>,
    /// Time limit of the VM
    #[arg(long, value_name = "SECONDS", default_value_t = vm::LIMIT.as_secs())]
    timeout: u64,
    /// Let idle CPUs spin instead of sleep, so that wake-ups cost about as much as on hardware
    #[arg(long)]
    idle_poll: bool,
    /// Command to run as root
    #[arg(last = true, required = true, value_name = "CMD")]
    command: Vec<String>,
}

/// Exit code if the lab itself fails while it runs a user's command, as with env(1).
const LAB_FAILED: u8 = 125;
const INTERRUPTED: u8 = 130;

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let failure = if matches!(arguments.command, Command::Vm(_)) { LAB_FAILED } else { 1 };
    match sh::watch_signals().and_then(|()| run(arguments.command)) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("lab: {error:#}");
            ExitCode::from(if sh::interrupted().is_err() { INTERRUPTED } else { failure })
        }
    }
}

fn run(command: Command) -> Result<u8> {
    match command {
        Command::Setup { upgrade } => {
            if upgrade {
                setup::forget_kernels()?;
            }
            setup::report(&setup::ensure_all()?)?;
            Ok(0)
        }
        Command::Vm(arguments) => run_vm(arguments),
        Command::Store(options) => store::run(&options).map(|()| 0),
        Command::PowerCut(boot) => powercut::guest::run(&boot).map(|()| 0),
        Command::Hostile(options) => Ok(u8::from(!hostile::run(&options)?)),
        Command::HostileGuest(role) => Ok(u8::from(!hostile::guest::run(&role)?)),
        Command::Demo(options) => demo::run(&options),
        Command::Bench(options) => bench::bench(&options),
        Command::Gate(options) => bench::gate(&options),
        Command::Profile(options) => profile::run(&options),
        Command::Report { dir } => render::write(&collect::result(&dir)?, &dir).map(|()| 0),
        Command::Test(options) => Ok(u8::from(!suite::run(&options)?)),
        Command::Ci(options) => ci::run(&options).map(|()| 0),
        Command::Docs(options) => book::run(&options).map(|()| 0),
        Command::Package(options) => package::run(&options).map(|()| 0),
        Command::Release(options) => Ok(u8::from(!release::run(&options)?)),
    }
}

fn run_vm(arguments: VmArguments) -> Result<u8> {
    let lab = setup::ensure()?;
    let programs = programs::build()?;
    let machine = Vm {
        memory: arguments.memory,
        disks: arguments.disk,
        shares: arguments.share,
        limit: Duration::from_secs(arguments.timeout),
        idle_poll: arguments.idle_poll,
        ..Vm::new(lab.kernel(arguments.kernel)?, arguments.mode)
    };
    let line = match arguments.command.as_slice() {
        [line] => line.clone(),
        words => sh::quote(words),
    };
    let status = machine.run(&lab, &programs, &line, &mut vm::to_stdout)?;
    Ok(u8::try_from(status).unwrap_or(LAB_FAILED))
}
