//! The command line: one file a subcommand, and what they share.
//!
//! Knows the control client, the configuration and the terminal. Of the engine it knows the
//! interface only: `serve` starts it, `features` and `doctor` ask it what the kernel grants.

mod attach;
mod create;
mod daemon;
mod detach;
mod doctor;
mod examples;
mod features;
pub mod generate;
mod image;
mod instance;
mod list;
mod man;
mod out;
mod reload;
mod resize;
mod run;
mod serve;
mod size;
mod stats;
mod table;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};

use crate::config::RUN_DIR;
use crate::error::{Kind, Result};

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
    List(list::Args),
    Stats(stats::Args),
    Features(features::Args),
    Doctor(doctor::Args),
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

/// The whole command line, as clap describes it.
pub(crate) fn command() -> clap::Command {
    examples::add(Cli::command())
}

/// The program.
pub fn main() -> ExitCode {
    let cli = match Cli::from_arg_matches(&command().get_matches()) {
        Ok(cli) => cli,
        Err(error) => error.exit(),
    };
    match cli.command.run(cli.run_dir) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("loopengine: {error}");
            ExitCode::from(exit_code(error.kind()))
        }
    }
}

impl Command {
    fn run(self, run_dir: PathBuf) -> Result<u8> {
        let done = match self {
            Command::Attach(args) => return args.run(&run_dir),
            Command::Doctor(args) => return args.run(&run_dir),
            Command::Serve(args) => args.run(&run_dir),
            Command::Instance(command) => command.run(&run_dir),
            Command::Create(args) => args.run(),
            Command::Detach(args) => args.run(&run_dir),
            Command::Resize(args) => args.run(&run_dir),
            Command::List(args) => args.run(&run_dir),
            Command::Stats(args) => args.run(&run_dir),
            Command::Features(args) => args.run(),
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
