// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The command line: one file per subcommand, and what they share.
//!
//! Knows the control client, the configuration and the terminal. It uses the engine only through
//! its interface: `serve` starts it; `features` and `doctor` query what the kernel supports.

mod attach;
mod attach_run;
mod backend_choice;
mod complete;
mod configured_devices;
mod create;
mod csi;
mod daemon;
mod detach;
mod doctor;
mod examples;
mod features;
mod find;
#[cfg(test)]
mod fresh;
mod fuse_drivers;
mod generate;
mod image;
mod install;
mod instance;
mod instance_mount;
mod limit;
mod list;
mod losetup;
mod metrics;
mod mount;
mod mount_loop;
mod oci;
mod out;
mod pages;
mod partitions;
mod pool_options;
mod pool_use;
mod recover;
mod release_mounts;
mod reload;
mod resize;
mod run;
mod serve;
mod stats;
mod table;
mod top;
mod watchers;

use std::ffi::{OsStr, OsString};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};

use crate::config::{RUN_DIR, number, size};
use crate::error::{Error, Kind, Result};

pub use mount_loop::main as mount_loop;

/// Serve image files as private block devices.
///
/// 'loopengine serve' runs the daemon. It serves image files as block devices over ublk and
/// io_uring. On a machine without the ublk driver it uses the kernel's loop driver; without both, it
/// serves files over FUSE. Each of these devices belongs to an instance, which has its own limits,
/// device numbers and worker threads. A private pool of loop devices belongs to a user, a command or
/// a container.
///
/// All other commands call the daemon through the sockets in its run directory.
#[derive(Debug, Parser)]
#[command(name = "loopengine", version, propagate_version = true)]
struct Cli {
    /// Directory of the daemon's sockets and device names.
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
    Serve(serve::ServeArgs),
    #[command(subcommand)]
    Instance(instance::InstanceCommand),
    Attach(attach::AttachArgs),
    Create(create::CreateArgs),
    Detach(detach::DetachArgs),
    Resize(resize::ResizeArgs),
    Recover(recover::RecoverArgs),
    List(list::ListArgs),
    Find(find::FindArgs),
    Stats(stats::StatsArgs),
    Top(top::TopArgs),
    Metrics(metrics::MetricsArgs),
    Run(run::RunArgs),
    Mount(mount::MountArgs),
    Umount(mount::Umount),
    Losetup(losetup::LosetupArgs),
    Mounter(run::mounter::MounterArgs),
    MountMaker(run::mount_processes::MountMaker),
    MountAttacher(run::mount_processes::MountAttacher),
    ReleaseMounts(release_mounts::ReleaseMountsArgs),
    Limit(limit::LimitArgs),
    Csi(csi::CsiArgs),
    Features(features::FeaturesArgs),
    Doctor(doctor::DoctorArgs),
    Install(install::InstallArgs),
    #[command(subcommand)]
    Oci(oci::OciCommand),
    PodmanSetup(oci::podman::PodmanArgs),
    Generate(generate::GenerateArgs),
}

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

/// The exit codes of commands that run another program, as with env(1).
const RUN_FAILED: u8 = 125;
const NOT_EXECUTABLE: u8 = 126;
const COMMAND_NOT_FOUND: u8 = 127;

/// Prints why `program` cannot run. Returns the exit code.
fn cannot_run(program: &OsStr, error: io::Error) -> u8 {
    let (code, hint) = match error.kind() {
        io::ErrorKind::NotFound => (COMMAND_NOT_FOUND, "give the path of a program, or a name in $PATH"),
        _ => (NOT_EXECUTABLE, "give a program that this user can execute"),
    };
    out::message(format_args!(
        "{}",
        Error::os(error, format!("cannot run {}", program.display())).hint(hint)
    ));
    code
}

/// The command line as a clap command.
pub fn command() -> clap::Command {
    accept_negative(examples::add(Cli::command()))
}

/// Lets options take '-5': their parsers refuse it with a reason that fits.
fn accept_negative(command: clap::Command) -> clap::Command {
    if command.get_name() == "losetup" {
        return command;
    }
    let command = command.mut_args(|arg| match arg.get_value_names() {
        Some([name]) if ["N", "SIZE", "N|none", "SIZE|none"].contains(&name.as_str()) => {
            let is_option = arg.get_long().is_some();
            arg.allow_hyphen_values(is_option)
        }
        _ => arg,
    });
    command.mut_subcommands(accept_negative)
}

/// Entry point of the program.
pub fn main() -> ExitCode {
    complete::answer_shell();
    let words: Vec<OsString> = std::env::args_os().collect();
    let parsed = command().try_get_matches().and_then(|matches| Cli::from_arg_matches(&matches));
    let cli = match parsed {
        Ok(cli) => cli,
        Err(error) => return usage_failure(&error, &words),
    };
    let run_dir = cli.run_dir.clone();
    match cli.command.run(cli.run_dir) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            out::message(format_args!("{}", for_run_dir(&error.to_string(), &run_dir)));
            ExitCode::from(if runs_command(&words) { RUN_FAILED } else { exit_code(error.kind()) })
        }
    }
}

/// A message whose commands work for this run directory, too.
fn for_run_dir(message: &str, run_dir: &Path) -> String {
    let inherited = std::env::var_os("LOOPENGINE_RUN_DIR").is_some_and(|named| *run_dir == *named);
    match inherited || run_dir == Path::new(RUN_DIR) {
        true => message.to_owned(),
        false => message.replace("'loopengine ", &format!("'loopengine --run-dir {} ", run_dir.display())),
    }
}

/// Prints the usage error or the requested help.
fn usage_failure(error: &clap::Error, words: &[OsString]) -> ExitCode {
    match words.last() {
        // Callers expect losetup's messages and exit code.
        Some(last) if error.use_stderr() && is_losetup(words) => {
            let _ = write!(io::stderr(), "{}", losetup::usage_error(error, last));
            ExitCode::FAILURE
        }
        _ if error.use_stderr() && runs_command(words) => {
            let _ = error.print();
            ExitCode::from(RUN_FAILED)
        }
        _ => error.exit(),
    }
}

/// True if these words, starting with the program name, call the subcommand losetup.
fn is_losetup(words: &[OsString]) -> bool {
    operands(words).next().is_some_and(|word| word == "losetup")
}

/// True if these words run another program, whose exit status becomes ours.
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

/// The words that are not options.
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
            Command::Losetup(args) => return losetup::remote::run(args, &run_dir),
            Command::Serve(args) => args.run(&run_dir),
            Command::Create(args) => args.run(),
            Command::Detach(args) => args.run(&run_dir),
            Command::Resize(args) => args.run(&run_dir),
            Command::Recover(args) => args.run(&run_dir),
            Command::List(args) => args.run(&run_dir),
            Command::Find(args) => args.run(&run_dir),
            Command::Stats(args) => args.run(&run_dir),
            Command::Top(args) => args.run(&run_dir),
            Command::Metrics(args) => args.run(&run_dir),
            Command::Mount(args) => args.run(&run_dir),
            Command::Umount(args) => args.run(&run_dir),
            Command::Mounter(args) => args.run(),
            Command::MountMaker(args) => args.run(),
            Command::MountAttacher(args) => args.run(),
            Command::ReleaseMounts(args) => args.run(&run_dir),
            Command::Limit(args) => args.run(&run_dir),
            Command::Csi(args) => args.run(&run_dir),
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
    fn clap_accepts_the_definition() {
        command().debug_assert();
    }

    #[test]
    fn recognizes_losetup() {
        let asks = |line: &str| is_losetup(&line.split(' ').map(OsString::from).collect::<Vec<_>>());
        for line in ["x losetup", "x losetup -Z", "x --run-dir /r losetup -f", "x --run-dir=/r losetup"] {
            assert!(asks(line), "{line}");
        }
        for line in ["x", "x --bad", "x list losetup", "x --run-dir losetup list", "x --run-dir"] {
            assert!(!asks(line), "{line}");
        }
    }

    #[test]
    fn recognizes_commands_that_run_a_program() {
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
    fn documents_every_exit_code() {
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
            assert!(code != 0 && pages::man::EXIT_CODES.iter().any(|(known, _)| *known == code));
        }
    }
}
