//! `loopengine release-mounts`: when the machine goes down, the service manager has it unmount what lies on
//! the daemon's devices before it stops the daemon.
//!
//! Knows how to tell that the machine goes down, and in which order to unmount. Does not stop devices.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::mount::UnmountFlags;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::control::SOCKET;
use crate::error::{Error, Kind, Result};
use crate::instance::stop::disks_of;
use crate::sys::usage::{self, Disks};

/// For what uses the file systems to end.
const LIMIT: Duration = Duration::from_secs(30);
const PAUSE: Duration = Duration::from_millis(200);
/// How deep images may lie on file systems in other images.
const STACKED_MAX: usize = 8;

/// When the machine goes down: unmount what lies on the daemon's devices, and stop swapping to them.
///
/// For the systemd unit, which runs it before each stop of the daemon. While the machine stays up it does
/// nothing: devices wait for the next daemon.
#[derive(Debug, clap::Args)]
#[command(hide = true)]
pub(super) struct Args {
    /// Also while the machine stays up.
    #[arg(long)]
    now: bool,
}

impl Args {
    pub(super) fn run(self, run_dir: &Path) -> Result<()> {
        if !self.now && !goes_down() {
            return Ok(());
        }
        enter_first_mounts()?;
        let run_dir = run_dir.canonicalize().unwrap_or_else(|_| run_dir.to_owned());
        // Without a daemon I/O waits, and so would an unmount.
        UnixStream::connect(run_dir.join(SOCKET)).map_err(|error| {
            Error::os(error, format!("no daemon serves {}: nothing is unmounted", run_dir.display()))
        })?;
        let (mut disks, unknown) = disks_of(&run_dir);
        unknown
            .iter()
            .for_each(|error| eprintln!("loopengine: {error}: what is mounted from it stays mounted"));
        let until = Instant::now() + LIMIT;
        loop {
            let (mounts, swaps) = uses(&mut disks);
            let failed: Vec<String> = swaps
                .iter()
                .filter_map(|node| failure(node, usage::swapoff(node)))
                .chain(mounts.iter().rev().filter_map(|target| {
                    failure(
                        target,
                        rustix::mount::unmount(target, UnmountFlags::NOFOLLOW).map_err(Into::into),
                    )
                }))
                .collect();
            if failed.is_empty() {
                return Ok(());
            }
            if Instant::now() >= until {
                // What is written is safe at least.
                disks.nodes().iter().for_each(|node| drop(usage::write_back(node)));
                let message = format!("still in use when the daemon is stopped: {}", failed.join(", "));
                return Err(Error::new(Kind::Busy, message)
                    .hint("stop what uses it before loopengine.service: order it After=loopengine.service"));
            }
            std::thread::sleep(PAUSE);
        }
    }
}

fn failure(what: &Path, done: std::io::Result<()>) -> Option<String> {
    done.err().map(|error| format!("{} ({error})", what.display()))
}

/// Sees and unmounts what the first process of the machine sees. systemd starts each command of a unit like ours in
/// a mount namespace of its own, also one with `+`: what is unmounted in there stays mounted for all others.
fn enter_first_mounts() -> Result<()> {
    let entered = std::fs::File::open("/proc/1/ns/mnt")
        .and_then(|first| Ok(move_into_link_name_space(first.as_fd(), Some(LinkNameSpaceType::Mount))?));
    entered.map_err(|error| {
        Error::os(error, "cannot enter the mount namespace of process 1: nothing is unmounted")
    })
}

/// Whether the service manager stops everything. (`systemctl is-system-running` says "starting" when that
/// happens during the boot.)
fn goes_down() -> bool {
    let asked = Command::new("systemctl")
        .args(["show", "--property=Job", "--property=ActiveState", "shutdown.target"])
        .output();
    asked.is_ok_and(|answer| shuts_down(&String::from_utf8_lossy(&answer.stdout)))
}

fn shuts_down(state: &str) -> bool {
    let pending = |line: &str| line.strip_prefix("Job=").is_some_and(|job| !matches!(job, "" | "0"));
    state.lines().any(|line| line == "ActiveState=active" || pending(line))
}

/// Where file systems are mounted that need these disks, oldest first, and what is swapped to on them.
fn uses(disks: &mut Disks) -> (Vec<PathBuf>, Vec<PathBuf>) {
    let mut targets: Vec<PathBuf> = Vec::new();
    let mut swaps = disks.swaps();
    for _ in 0..STACKED_MAX {
        targets.clear();
        for mount in usage::mounts() {
            let below = targets.iter().any(|target| mount.target.starts_with(target));
            if (below || disks.hold(&mount)) && mount.target != Path::new("/") {
                targets.push(mount.target);
            }
        }
        // Images on these file systems, used through the kernel's loop driver.
        if !disks.extend(Disks::backed_by(|file| targets.iter().any(|target| file.starts_with(target)))) {
            break;
        }
    }
    let below = |file: &PathBuf| targets.iter().any(|target| file.starts_with(target));
    swaps.extend(usage::swaps().into_iter().filter(below));
    (targets, swaps)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_goes_down_when_its_shutdown_is_queued_or_reached() {
        assert!(shuts_down("Job=812\nActiveState=inactive\n"));
        assert!(shuts_down("ActiveState=active\n"));
        for up in ["ActiveState=inactive\n", "Job=0\nActiveState=inactive\n", "Job=\n", ""] {
            assert!(!shuts_down(up), "{up:?}");
        }
    }
}
