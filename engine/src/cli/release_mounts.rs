// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `loopengine release-mounts`: unmounts file systems on devices of the daemon when the machine
//! shuts down, before systemd stops the daemon.
//!
//! Knows how to detect a shutdown and the order of unmounts. Does not stop devices.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::mount::UnmountFlags;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use super::out;
use crate::control::SOCKET;
use crate::error::{Error, Kind, Result};
use crate::instance::stop::disks_of;
use crate::sys::usage::{self, Disks};

/// Time for users of the file systems to end.
const LIMIT: Duration = Duration::from_secs(30);
const PAUSE: Duration = Duration::from_millis(200);
/// Maximum nesting of images on file systems in other images.
const STACKED_MAX: usize = 8;

/// At a shutdown of the machine, unmount all file systems on devices of the daemon, and disable
/// swap on them.
///
/// The systemd unit runs this before each stop of the daemon. Without a shutdown it does nothing:
/// devices wait for the next daemon.
#[derive(Debug, clap::Args)]
#[command(hide = true)]
pub(super) struct ReleaseMountsArgs {
    /// Act even if the machine does not shut down.
    #[arg(long)]
    now: bool,
}

impl ReleaseMountsArgs {
    pub(super) fn run(self, run_dir: &Path) -> Result<()> {
        if !self.now && !is_shutting_down() {
            return Ok(());
        }
        enter_first_mounts()?;
        let run_dir = run_dir.canonicalize().unwrap_or_else(|_| run_dir.to_owned());
        // Without a daemon, I/O would block, and an unmount with it.
        UnixStream::connect(run_dir.join(SOCKET)).map_err(|error| {
            Error::os(error, format!("cannot unmount anything: no daemon serves {}", run_dir.display()))
        })?;
        let (mut disks, unknown) = disks_of(&run_dir);
        unknown.iter().for_each(|error| out::message(format_args!("{error}: its file systems stay mounted")));
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
                // Flush the written data at least.
                disks.nodes().iter().for_each(|node| drop(usage::write_back(node)));
                let message = format!("cannot unmount before the daemon stops: {}", failed.join(", "));
                return Err(Error::new(Kind::Busy, message)
                    .hint("order the units that use these file systems After=loopengine.service"));
            }
            std::thread::sleep(PAUSE);
        }
    }
}

fn failure(what: &Path, done: std::io::Result<()>) -> Option<String> {
    done.err().map(|error| format!("{} ({error})", what.display()))
}

/// Enters the mount namespace of process 1. systemd runs each command of a sandboxed unit in a
/// mount namespace of its own, even with `+`; an unmount there has no effect elsewhere.
fn enter_first_mounts() -> Result<()> {
    let entered = std::fs::File::open("/proc/1/ns/mnt")
        .and_then(|first| Ok(move_into_link_name_space(first.as_fd(), Some(LinkNameSpaceType::Mount))?));
    entered.map_err(|error| {
        Error::os(error, "cannot unmount anything: cannot enter the mount namespace of process 1")
    })
}

/// True if the service manager shuts the machine down. (`systemctl is-system-running` reports
/// "starting" for a shutdown during boot.)
fn is_shutting_down() -> bool {
    let asked = Command::new("systemctl")
        .args(["show", "--property=Job", "--property=ActiveState", "shutdown.target"])
        .output();
    asked.is_ok_and(|answer| shuts_down(&String::from_utf8_lossy(&answer.stdout)))
}

fn shuts_down(state: &str) -> bool {
    let pending = |line: &str| line.strip_prefix("Job=").is_some_and(|job| !matches!(job, "" | "0"));
    state.lines().any(|line| line == "ActiveState=active" || pending(line))
}

/// Mount points of file systems on these disks, oldest first, and swap areas on them.
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
        // Kernel loop devices on images in these file systems.
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
    fn detects_a_queued_or_active_shutdown() {
        assert!(shuts_down("Job=812\nActiveState=inactive\n"));
        assert!(shuts_down("ActiveState=active\n"));
        for up in ["ActiveState=inactive\n", "Job=0\nActiveState=inactive\n", "Job=\n", ""] {
            assert!(!shuts_down(up), "{up:?}");
        }
    }
}
