// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Resources of the daemon, their bounds, and warnings in the kernel's log.

use std::fmt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

use loopbench::sh;

/// Resources of a daemon.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Footprint {
    fds: u64,
    threads: u64,
    /// Private memory in use, in KiB.
    rss_anon: u64,
    /// ublk disks of the whole machine.
    disks: u64,
}

/// Upper bounds. 24 users at a time have 64 devices and 16 pools each; a device takes a few
/// descriptors and tens of KiB, a pool takes a few threads.
const MOST: Footprint = Footprint { fds: 8192, threads: 2048, rss_anon: 512 << 10, disks: 1024 };
/// Accepted increase after all clients have ended. Descriptors: a connection that is just closing.
/// Threads: idle threads of the runtime. Memory: free memory that the allocator keeps.
const SLACK: Footprint = Footprint { fds: 4, threads: 4, rss_anon: 48 << 10, disks: 2 };

impl Footprint {
    /// Resources of the process `pid`.
    pub(super) fn of(pid: u32) -> Result<Footprint> {
        let status =
            std::fs::read_to_string(format!("/proc/{pid}/status")).context("the daemon has ended")?;
        let number = |key: &str| {
            status.lines().find_map(|line| line.strip_prefix(key)?.split_whitespace().next()?.parse().ok())
        };
        Ok(Footprint {
            fds: count(format!("/proc/{pid}/fd")),
            threads: number("Threads:").context("no threads")?,
            rss_anon: number("RssAnon:").unwrap_or_default(),
            disks: count("/sys/class/ublk-char"),
        })
    }

    /// The maximum of each resource.
    pub(super) fn max(self, other: Footprint) -> Footprint {
        Footprint {
            fds: self.fds.max(other.fds),
            threads: self.threads.max(other.threads),
            rss_anon: self.rss_anon.max(other.rss_anon),
            disks: self.disks.max(other.disks),
        }
    }

    /// Whether the resources are within the upper bounds.
    pub(super) fn bounded(self) -> bool {
        self.within(MOST)
    }

    /// Whether the resources are back at their former level.
    pub(super) fn is_back_to(self, before: Footprint) -> bool {
        self.within(Footprint {
            fds: before.fds + SLACK.fds,
            threads: before.threads + SLACK.threads,
            rss_anon: before.rss_anon + SLACK.rss_anon,
            disks: before.disks + SLACK.disks,
        })
    }

    fn within(self, bound: Footprint) -> bool {
        self.max(bound) == bound
    }
}

impl fmt::Display for Footprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Footprint { fds, threads, rss_anon, disks } = self;
        write!(f, "{fds} descriptors, {threads} threads, {rss_anon} KiB, {disks} disks")
    }
}

fn count(directory: impl AsRef<Path>) -> u64 {
    std::fs::read_dir(directory).map_or(0, |entries| entries.count() as u64)
}

/// Markers of warnings in the kernel's log, without stalls that the emulator can cause.
const WARNINGS: [&str; 8] = [
    "blocked for more than",
    "circular locking",
    "INFO: possible",
    "WARNING:",
    "BUG:",
    "Oops",
    "general protection",
    "refcount_t:",
];

/// Warnings in the kernel's log.
pub(super) fn kernel_warnings() -> Result<Vec<String>> {
    let log = sh::capture(&mut Command::new("dmesg"), Duration::from_secs(20))?;
    Ok(warnings(&log))
}

fn warnings(log: &str) -> Vec<String> {
    let warns =
        |line: &&str| WARNINGS.iter().any(|warning| line.contains(warning)) && !line.contains("soft lockup");
    log.lines().filter(warns).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn detects_leftover_resources() {
        let before = Footprint { fds: 40, threads: 10, rss_anon: 9000, disks: 0 };
        assert!(before.is_back_to(before));
        assert!(!Footprint { fds: 45, ..before }.is_back_to(before));
        assert!(!Footprint { threads: 20, ..before }.is_back_to(before));
        assert!(!Footprint { fds: 524_288, ..before }.bounded());
    }

    #[test]
    fn warnings_are_found_in_a_log() {
        let log = "[1.0] ublk: loaded\n[2.0] INFO: task x:1 blocked for more than 30 seconds.\n\
                   [3.0] WARNING: CPU: 0 PID: 1 at fs/x.c:1\n[4.0] Warning: unmaintained\n";
        assert_eq!(warnings(log).len(), 2);
    }
}
