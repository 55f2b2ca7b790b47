// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Processes: what they are called, which devices they have open, and what is mounted where they are.
//!
//! Reads /proc and follows no link to a file of theirs, so that nobody's file system can make it wait. Sees
//! what the caller may see: root, all. Does not know whose devices these are.

use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FileType, StatxFlags, statx};
use serde::{Deserialize, Serialize};
use zlink::introspect::CustomType;

use crate::sys::printable;

use super::mntns::{self, Mount};

/// A process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, CustomType)]
pub struct Process {
    /// Its number.
    pub pid: u32,
    /// Name of its program.
    pub command: String,
}

impl fmt::Display for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "pid {} ({})", self.pid, self.command)
    }
}

impl Process {
    /// None: there is no process of this number.
    pub fn of(pid: u32) -> Option<Process> {
        let command = fs::read(format!("/proc/{pid}/comm")).ok()?;
        // Anybody can call himself anything; terminals obey control characters.
        Some(Process { pid, command: printable(&String::from_utf8_lossy(command.trim_ascii_end())) })
    }
}

/// When a process started, in clock ticks since boot.
pub fn started(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field is the program's name, which may have any bytes. This is the 22nd.
    stat.rsplit_once(')')?.1.split_ascii_whitespace().nth(19)?.parse().ok()
}

/// The container that a process is in: the 64 hexadecimal digits in its cgroup's name, by which podman,
/// docker, containerd and CRI-O call it.
pub fn container(pid: u32) -> Option<String> {
    container_in(&fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?)
}

fn container_in(cgroup: &str) -> Option<String> {
    let mut words = cgroup.split(|c: char| !c.is_ascii_hexdigit());
    words.rfind(|word| word.len() == 64).map(str::to_owned)
}

/// A device that a process has open.
#[derive(Debug)]
pub struct Open {
    /// Which process.
    pub pid: u32,
    /// The device's name where it was opened.
    pub name: PathBuf,
    /// Its number; none: a regular file, of FUSE.
    pub rdev: Option<u64>,
}

/// Devices, and files of FUSE, of this name that processes have open; this one excepted.
pub fn open_devices(is_named: impl Fn(&Path) -> bool) -> Vec<Open> {
    let own = std::process::id();
    let files = pids().filter(|pid| *pid != own).flat_map(|pid| {
        let files = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
        files.map(move |file| (pid, file.path()))
    });
    files.filter_map(|(pid, file)| open_device(pid, &file, &is_named)).collect()
}

fn open_device(pid: u32, file: &Path, is_named: &dyn Fn(&Path) -> bool) -> Option<Open> {
    let name = fs::read_link(file).ok().filter(|name| name.is_absolute() && is_named(name))?;
    // What is cached will do: no server of FUSE is asked.
    let stat = statx(CWD, file, AtFlags::STATX_DONT_SYNC, StatxFlags::TYPE).ok()?;
    let rdev = match FileType::from_raw_mode(stat.stx_mode.into()) {
        FileType::BlockDevice => Some(rustix::fs::makedev(stat.stx_rdev_major, stat.stx_rdev_minor)),
        FileType::RegularFile => None,
        _ => return None,
    };
    Some(Open { pid, name, rdev })
}

/// A process that has a lock of an open file on this file, which is named as in /proc/locks.
pub fn with_lock_on(file: &str) -> Option<u32> {
    let named = |line: &str| {
        line.starts_with("lock:") && line.contains(" OFDLCK ") && line.split(' ').any(|word| word == file)
    };
    pids().find(|pid| {
        let files = fs::read_dir(format!("/proc/{pid}/fdinfo")).into_iter().flatten().flatten();
        files
            .map(|file| fs::read_to_string(file.path()).unwrap_or_default())
            .any(|text| text.lines().any(named))
    })
}

/// A process in whose mount namespace the file system with this number, as in mountinfo, is mounted.
pub fn with_mount(number: &str) -> Option<Process> {
    let sees = |pid: &u32| {
        let table = fs::read(format!("/proc/{pid}/mountinfo")).unwrap_or_default();
        String::from_utf8_lossy(&table).lines().any(|line| line.split(' ').nth(2) == Some(number))
    };
    pids().find(sees).and_then(Process::of)
}

/// What is mounted anywhere: the table of each mount namespace once, that of the first process first.
pub fn mounts() -> Vec<Mount> {
    let mut seen = BTreeSet::new();
    let fresh = pids().filter(|pid| match fs::read_link(format!("/proc/{pid}/ns/mnt")) {
        Ok(namespace) => seen.insert(namespace),
        // One that we may not look into.
        Err(_) => false,
    });
    let tables = fresh.filter_map(|pid| fs::read(format!("/proc/{pid}/mountinfo")).ok());
    // One name that is not UTF-8 must not hide all others.
    let parse = |table: Vec<u8>| -> Vec<Mount> {
        String::from_utf8_lossy(&table).lines().filter_map(mntns::parse).collect()
    };
    tables.flat_map(parse).collect()
}

fn pids() -> impl Iterator<Item = u32> {
    let all = fs::read_dir("/proc").into_iter().flatten().flatten();
    let mut pids: Vec<u32> = all.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
    pids.sort_unstable();
    pids.into_iter()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_is_there_and_started_before_now() {
        let pid = std::process::id();
        assert!(Process::of(pid).is_some_and(|own| own.pid == pid && !own.command.is_empty()));
        let uptime = fs::read_to_string("/proc/uptime").unwrap();
        let uptime: f64 = uptime.split(' ').next().unwrap().parse().unwrap();
        let started = started(pid).unwrap();
        assert!(started > 0 && started as f64 / 100.0 < uptime + 1.0, "{started} {uptime}");
        assert_eq!((Process::of(u32::MAX), super::started(u32::MAX)), (None, None));
        assert!(mounts().iter().any(|mount| mount.target == Path::new("/proc")));
    }

    #[test]
    fn containers_by_their_cgroup() {
        let id = "0123456789abcdef".repeat(4);
        for cgroup in [
            format!("0::/machine.slice/libpod-{id}.scope/container\n"),
            format!("12:pids:/docker/{id}\n"),
            format!("0::/kubepods.slice/kubepods-pod1a.slice/cri-containerd-{id}.scope"),
        ] {
            assert_eq!(container_in(&cgroup).as_deref(), Some(id.as_str()), "{cgroup}");
        }
        assert_eq!(container_in("0::/user.slice/user-1000.slice/session-3.scope\n"), None);
    }
}
