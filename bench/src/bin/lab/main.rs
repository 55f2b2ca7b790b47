//! `cargo lab`: a kernel with ublk for everyone, and the tests and figures that need one.
//!
//! ```text
//!  setup ── kernel ──┐
//!  programs ─────────┴─ vm ──┬─ lab vm CMD
//!                            ├─ lab demo
//!                            ├─ lab test
//!                            ├─ lab hostile
//!                            └─ lab bench in smp: loopbench
//!  both ── initrd ── sealed ───── lab bench in icount, lab gate: loopbench
//! ```
//! This file knows the command line only. The lab uses the public programs, never the engine's insides.

mod bench;
mod cache;
mod demo;
mod hostile;
mod initrd;
mod kernel;
mod powercut;
mod programs;
mod sealed;
mod setup;
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

/// The laboratory of loopengine: boots a kernel with ublk, runs the tests, takes the figures.
#[derive(Parser)]
#[command(name = "lab", bin_name = "cargo lab", version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Install what is missing: QEMU, fio, file system tools, virtme-ng, two kernels
    Setup {
        /// Fetch the kernels anew, in case there are newer ones
        #[arg(long)]
        upgrade: bool,
    },
    /// Run a command as root in a throw-away VM with the freshly built programs on PATH
    ///
    /// One word is a line for the shell; several are a program and its arguments. Output and exit
    /// status come back; 125 means that the lab itself failed.
    Vm(VmArguments),
    /// Serve two instances, put real file systems into real images, and show a short table
    Demo(demo::Options),
    /// Measure loopengine, kernel loop, FUSE and others side by side: figures and report of the README
    Bench(bench::Options),
    /// Fail if an I/O costs more instructions than the committed baseline says
    Gate(bench::Gate),
    /// Write the report of a result anew, from its raw files
    Report {
        /// Directory below results/
        dir: PathBuf,
    },
    /// Run every test: on this machine, and in a VM of each kernel
    Test(suite::Options),
    /// Run hostile clients of all kinds in a VM, beside a tenant and root, who must not notice
    ///
    /// Each call of the two is to be answered within 2 s. Data have to compare equal; descriptors,
    /// threads and memory of the daemon have to stay bounded and come back; SIGTERM has to end it
    /// in time; the kernel may not warn.
    Hostile(hostile::Options),
    /// Make a file system in memory, for tests and figures: inside a VM, or anywhere as root
    Store(store::Options),
    /// The guest's half of the power cuts
    #[command(hide = true, subcommand)]
    PowerCut(powercut::guest::Round),
    /// The guest's half of the campaign of hostile clients
    #[command(hide = true, subcommand)]
    HostileGuest(hostile::guest::Role),
}

#[derive(clap::Args)]
struct VmArguments {
    /// Kernel to boot
    #[arg(long, value_enum, default_value = "7")]
    kernel: kernel::Line,
    /// What its CPUs are like
    #[arg(long, value_enum, default_value = "smp")]
    mode: Mode,
    /// Memory, as QEMU takes it
    #[arg(long, default_value = "3G")]
    memory: String,
    /// Raw image that the VM sees as a disk, /dev/vda first; it keeps what is written to it
    #[arg(long, value_name = "FILE")]
    disk: Vec<PathBuf>,
    /// Directory that the VM may write to
    #[arg(long, value_name = "DIR")]
    share: Vec<PathBuf>,
    /// Seconds after which the VM is ended
    #[arg(long, value_name = "SECONDS", default_value_t = vm::LIMIT.as_secs())]
    timeout: u64,
    /// CPUs spin instead of sleeping: wake-ups get as cheap as on hardware
    #[arg(long)]
    idle_poll: bool,
    /// What to run
    #[arg(last = true, required = true, value_name = "CMD")]
    command: Vec<String>,
}

/// Exit code of a failure of the lab itself while it ran a user's command, as of ssh or xargs.
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
        Command::PowerCut(round) => powercut::guest::run(&round).map(|()| 0),
        Command::Hostile(options) => Ok(u8::from(!hostile::run(&options)?)),
        Command::HostileGuest(role) => Ok(u8::from(!hostile::guest::run(&role)?)),
        Command::Demo(options) => demo::run(&options),
        Command::Bench(options) => bench::bench(&options),
        Command::Gate(options) => bench::gate(&options),
        Command::Report { dir } => {
            render::write(&collect::result(&dir)?, &dir).map(|()| 0)
        }
        Command::Test(options) => Ok(u8::from(!suite::run(&options)?)),
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
