//! The /dev of a command with loop devices of its own.
//!
//! ```text
//! /dev               a file system in memory that the daemon made, and keeps the links below in
//!   null, pts, …     what the machine's /dev has, bound one by one; links copied
//!   mapper/          the same, one by one: the command's own mappings come beside them
//!   loopfs/          the pool's own file system: loop-control, loopN
//!   loop-control → loopfs/loop-control
//!   loopN        → loopfs/loopN
//! ```
//! Left out are loop devices, disks of ublk and their control nodes: they are somebody else's. In a
//! user namespace the kernel lets nobody take the new /dev off the old one.

use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{OpenTreeFlags, open_tree};

use super::attach;
use crate::error::{Error, Result};
use crate::private::LOOPFS;

/// Where device mapper's tools make nodes.
const MAPPER: &str = "mapper";

/// More entries than any /dev has; the rest is left out.
const ENTRIES_MAX: usize = 8192;

/// Mounts `dev` on /dev, takes over what was there, and mounts `loopfs` in it.
pub(super) fn show(dev: OwnedFd, loopfs: OwnedFd) -> Result<()> {
    let cannot = |error: Errno| Error::os(error, "cannot make a /dev of its own");
    // Opened in this mount namespace, before it is hidden.
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let old = rustix::fs::open("/dev", flags, Mode::empty()).map_err(cannot)?;
    attach(dev.as_fd(), CWD, "/dev").map_err(cannot)?;
    // Looked up anew, so that it is the mount and not only the file system.
    let new = rustix::fs::open("/dev", flags, Mode::empty()).map_err(cannot)?;
    take_all_over(&old, &new).map_err(cannot)?;
    attach(loopfs.as_fd(), new.as_fd(), LOOPFS).map_err(cannot)
}

fn take_all_over(old: &OwnedFd, new: &OwnedFd) -> rustix::io::Result<()> {
    for (name, kind) in entries(old)? {
        if let Err(error) = take_over(old, new, &name, kind) {
            tracing::debug!("/dev/{name} is left out: {error}");
        }
    }
    Ok(())
}

fn entries(dir: &OwnedFd) -> rustix::io::Result<Vec<(String, FileType)>> {
    let mut entries = Vec::new();
    for entry in Dir::read_from(dir)?.take(ENTRIES_MAX) {
        let entry = entry?;
        let Ok(name) = entry.file_name().to_str() else { continue };
        if !is_others(name) {
            let kind = match entry.file_type() {
                FileType::Unknown => {
                    let stat = rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW)?;
                    FileType::from_raw_mode(stat.st_mode)
                }
                kind => kind,
            };
            entries.push((name.to_owned(), kind));
        }
    }
    Ok(entries)
}

/// What a command must not see, or has of its own.
fn is_others(name: &str) -> bool {
    let numbered = |kind: &str| {
        name.strip_prefix(kind).is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
    };
    let listed = [".", "..", LOOPFS, "loop", "loop-control", "ublk-control"];
    listed.contains(&name) || ["loop", "ublkb", "ublkc"].into_iter().any(numbered)
}

fn take_over(old: &OwnedFd, new: &OwnedFd, name: &str, kind: FileType) -> rustix::io::Result<()> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    match kind {
        FileType::Symlink => {
            let target = rustix::fs::readlinkat(old, name, Vec::new())?;
            return rustix::fs::symlinkat(target, new, name);
        }
        FileType::Directory => {
            // With what is mounted on it and in it: pts, shm, mqueue.
            flags |= OpenTreeFlags::AT_RECURSIVE;
            rustix::fs::mkdirat(new, name, Mode::from_raw_mode(0o755))?;
            if name == MAPPER {
                let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let [old, new] = [old, new].map(|dir| rustix::fs::openat(dir, name, flags, Mode::empty()));
                return take_all_over(&old?, &new?);
            }
        }
        _ => {
            let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            drop(rustix::fs::openat(new, name, flags, Mode::from_raw_mode(0o600))?);
        }
    }
    let tree = open_tree(old, name, flags | OpenTreeFlags::AT_SYMLINK_NOFOLLOW)?;
    attach(tree.as_fd(), new.as_fd(), name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_out() {
        for name in ["loop0", "loop12p3", "loop-control", "ublkb0", "ublkc7", "ublk-control", "loop"] {
            assert!(is_others(name), "{name}");
        }
        for name in ["null", "loopback", "ublkbackup", "dm-0", "vda1"] {
            assert!(!is_others(name), "{name}");
        }
    }
}
