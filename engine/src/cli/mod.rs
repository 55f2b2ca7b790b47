//! The command line: one file a subcommand, and what they share.
//!
//! Knows the control client, the configuration and the terminal. Of the engine it knows the
//! interface only: `serve` starts it, `features` and `doctor` ask it what the kernel grants.

mod attach;
mod complete;
mod configured;
mod create;
mod daemon;
mod detach;
mod doctor;
mod examples;
mod features;
mod find;
mod fuse;
pub mod generate;
mod image;
mod install;
mod instance;
mod limit;
mod list;
pub mod losetup;
mod man;
mod mount;
mod mount_loop;
pub(crate) mod number;
mod oci;
mod out;
mod partitions;
mod pool;
mod private;
mod recover;
mod release_mounts;
mod reload;
mod remote;
mod resize;
mod run;
mod serve;
pub(crate) mod size;
mod stats;
mod table;
mod wanted;
mod watched;

use std::ffi::{OsStr, OsString};
use std::io;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};

use crate::config::RUN_DIR;
use crate::error::{Error, Kind, Result};

#[cfg(test)]
pub(crate) use attach::plain;
pub use mount_loop::main as mount_loop;

/// Serves image files as fast, private block devices.
///
/// A daemon, started with 'loopengine serve', serves image files as block devices over ublk and
/// io_uring, or as files over FUSE where there is no ublk driver. Devices belong to instances, each with limits, numbers and worker threads of its own.
/// All other commands talk to the daemon over a socket in its run directory.
#[derive(Debug, Parser)]
#[command(name = "loopengine", version, propagate_version = true)]
struct Cli {
    /// Directory with the daemon's socket and the names of its devices.
    #[arg(
        long,
        global = true,
        value_name = "DIR",
        env = "LOOPENGINE_RUN_DIR",
        default_value = RUN_DIR,
        hide_env_values = true
    )]
    run_dir: PathBuf,

    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Serve(serve::Args),
    #[command(subcommand)]
    Instance(instance::Command),
    Attach(attach::Args),
    Create(create::Args),
    Detach(detach::Args),
    Resize(resize::Args),
    Recover(recover::Args),
    List(list::Args),
    Find(find::Args),
    Stats(stats::Args),
    Run(private::Args),
    Mount(mount::Args),
    Umount(mount::Umount),
    Losetup(losetup::Args),
    Mounter(private::mounter::Args),
    MountMaker(private::mount_processes::Maker),
    MountAttacher(private::mount_processes::Attacher),
    ReleaseMounts(release_mounts::Args),
    Limit(limit::Args),
    Features(features::Args),
    Doctor(doctor::Args),
    Install(install::Args),
    #[command(subcommand)]
    Oci(oci::Command),
    PodmanSetup(oci::podman::Args),
    Generate(generate::Args),
}

/// What the exit codes mean, for the manual pages.
pub(crate) const EXIT_CODES: &[(u8, &str)] = &[
    (0, "Success."),
    (1, "Failure: input or output failed, or a bug."),
    (2, "Wrong usage or invalid input."),
    (3, "The image, instance or device does not exist."),
    (4, "It exists already, or is in use."),
    (5, "A limit is reached: devices, space, memory."),
    (6, "Permission denied."),
    (7, "Not supported by this kernel, file system or device."),
    (8, "The daemon, the ublk driver or FUSE cannot be reached."),
    (9, "No answer before the deadline. The state of the device is unknown."),
];

/// The exit code of a failure.
fn exit_code(kind: Kind) -> u8 {
    match kind {
        Kind::Io | Kind::Internal => 1,
        Kind::Invalid => 2,
        Kind::NotFound => 3,
        Kind::Exists | Kind::Busy => 4,
        Kind::Quota => 5,
        Kind::Denied => 6,
        Kind::Unsupported => 7,
        Kind::Unavailable => 8,
        Kind::Deadline => 9,
    }
}

/// What they mean instead where a command is run, as with env(1), for the manual pages.
pub(crate) const RUN_EXIT_CODES: &[(u8, &str)] = &[
    (RUN_FAILED, "loopengine itself failed: the command was not run, or its device could not be detached."),
    (NOT_EXECUTABLE, "The command was found, but cannot be executed."),
    (COMMAND_NOT_FOUND, "The command was not found."),
];

const RUN_FAILED: u8 = 125;
const NOT_EXECUTABLE: u8 = 126;
const COMMAND_NOT_FOUND: u8 = 127;

/// Says why `program` does not run. Answers the exit code.
fn cannot_run(program: &OsStr, error: io::Error) -> u8 {
    let (code, hint) = match error.kind() {
        io::ErrorKind::NotFound => (COMMAND_NOT_FOUND, "give a program that exists, by its path or in $PATH"),
        _ => (NOT_EXECUTABLE, "give a program that this user may execute"),
    };
    eprintln!("loopengine: {}", Error::os(error, format!("cannot run {}", program.display())).hint(hint));
    code
}

/// The whole command line, as clap describes it.
pub(crate) fn command() -> clap::Command {
    examples::add(Cli::command())
}

/// The program.
pub fn main() -> ExitCode {
    complete::answer_shell();
    let words: Vec<OsString> = std::env::args_os().collect();
    let parsed = command().try_get_matches().and_then(|matches| Cli::from_arg_matches(&matches));
    let cli = match parsed {
        Ok(cli) => cli,
        Err(error) => return misused(&error, &words),
    };
    match cli.command.run(cli.run_dir) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("loopengine: {error}");
            ExitCode::from(if runs_command(&words) { RUN_FAILED } else { exit_code(error.kind()) })
        }
    }
}

/// Says what is wrong with the command line, or prints the help that it asks for.
fn misused(error: &clap::Error, words: &[OsString]) -> ExitCode {
    match words.last() {
        // Programs that call it know losetup's ways.
        Some(last) if error.use_stderr() && is_losetup(words) => {
            eprint!("{}", losetup::usage_error(error, last));
            ExitCode::FAILURE
        }
        _ if error.use_stderr() && runs_command(words) => {
            let _ = error.print();
            ExitCode::from(RUN_FAILED)
        }
        _ => error.exit(),
    }
}

/// Whether these words, of which the first is the program, ask for the subcommand losetup.
fn is_losetup(words: &[OsString]) -> bool {
    operands(words).next().is_some_and(|word| word == "losetup")
}

/// Whether these words have a command run, whose exit status becomes ours.
fn runs_command(words: &[OsString]) -> bool {
    let mut operands = operands(words);
    match (operands.next().and_then(OsStr::to_str), operands.next()) {
        (Some("run"), _) => true,
        (Some("instance"), Some(word)) => word == "open",
        (Some("attach"), _) => {
            words.iter().any(|word| word == "--run" || word.as_encoded_bytes().starts_with(b"--run="))
        }
        _ => false,
    }
}

/// The words that are no options.
fn operands(words: &[OsString]) -> impl Iterator<Item = &OsStr> {
    let mut words = words.iter().skip(1);
    std::iter::from_fn(move || {
        loop {
            let word = words.next()?;
            if word == "--run-dir" {
                words.next();
            } else if !word.as_encoded_bytes().starts_with(b"-") {
                return Some(word.as_os_str());
            }
        }
    })
}

impl Command {
    fn run(self, run_dir: PathBuf) -> Result<u8> {
        let done = match self {
            Command::Attach(args) => return args.run(&run_dir),
            Command::Run(args) => return args.run(&run_dir),
            Command::Instance(command) => return command.run(&run_dir),
            Command::Doctor(args) => return args.run(&run_dir),
            Command::Losetup(args) => return remote::run(args, &run_dir),
            Command::Serve(args) => args.run(&run_dir),
            Command::Create(args) => args.run(),
            Command::Detach(args) => args.run(&run_dir),
            Command::Resize(args) => args.run(&run_dir),
            Command::Recover(args) => args.run(&run_dir),
            Command::List(args) => args.run(&run_dir),
            Command::Find(args) => args.run(&run_dir),
            Command::Stats(args) => args.run(&run_dir),
            Command::Mount(args) => args.run(&run_dir),
            Command::Umount(args) => args.run(&run_dir),
            Command::Mounter(args) => args.run(),
            Command::MountMaker(args) => args.run(),
            Command::MountAttacher(args) => args.run(),
            Command::ReleaseMounts(args) => args.run(&run_dir),
            Command::Limit(args) => args.run(&run_dir),
            Command::Features(args) => args.run(),
            Command::Install(args) => args.run(),
            Command::Oci(command) => command.run(&run_dir),
            Command::PodmanSetup(args) => args.run(&run_dir),
            Command::Generate(args) => args.run(),
        };
        done.map(|()| 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clap_finds_no_mistake() {
        command().debug_assert();
    }

    #[test]
    fn whose_usage_it_is() {
        let asks = |line: &str| is_losetup(&line.split(' ').map(OsString::from).collect::<Vec<_>>());
        for line in ["x losetup", "x losetup -Z", "x --run-dir /r losetup -f", "x --run-dir=/r losetup"] {
            assert!(asks(line), "{line}");
        }
        for line in ["x", "x --bad", "x list losetup", "x --run-dir losetup list", "x --run-dir"] {
            assert!(!asks(line), "{line}");
        }
    }

    #[test]
    fn whose_exit_status_it_is() {
        let runs = |line: &str| runs_command(&line.split(' ').map(OsString::from).collect::<Vec<_>>());
        for line in
            ["x run -- true", "x attach a --run true", "x attach --run=true a", "x instance open true"]
        {
            assert!(runs(line), "{line}");
        }
        for line in ["x", "x attach run", "x instance create open", "x --run-dir run list"] {
            assert!(!runs(line), "{line}");
        }
    }

    #[test]
    fn every_exit_code_is_explained() {
        let kinds = [
            Kind::Invalid,
            Kind::NotFound,
            Kind::Exists,
            Kind::Busy,
            Kind::Quota,
            Kind::Denied,
            Kind::Unsupported,
            Kind::Unavailable,
            Kind::Deadline,
            Kind::Io,
            Kind::Internal,
        ];
        for kind in kinds {
            let code = exit_code(kind);
            assert!(code != 0 && EXIT_CODES.iter().any(|(known, _)| *known == code));
        }
    }
}
