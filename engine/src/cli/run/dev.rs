// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The /dev of a command with private loop devices.
//!
//! ```text
//! /dev               a file system in memory; the daemon creates it and updates the links below
//!   null, …          nodes like the host's; in a user namespace the host's own, bind-mounted
//!   pts, log, …      other entries of the host's /dev, bind-mounted; symbolic links are copied
//!   block/M:m    links of udev, and of the daemon to the command's own devices
//!   mapper/          entries bind-mounted one by one, next to the command's own mappings
//!   loopfs/          the file system of the pool: loop-control, loopN
//!   loop-control → loopfs/loop-control
//!   loopN        → loopfs/loopN
//! ```
//!
//! A bind mount of this /dev has neither loopfs (see `covered_nodes`) nor other mounts in it, so
//! nodes are made where the kernel allows that. Omits loop devices, ublk disks and their control
//! nodes of the host. In a user namespace, the kernel refuses to unmount the new /dev.

use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{AtFlags, CWD, Dir, FileType, Gid, Mode, OFlags, Uid};
use rustix::io::Errno;
use rustix::mount::{OpenTreeFlags, open_tree};

use super::attach;
use crate::error::{Error, Result};
use crate::private::{DEV_BLOCK, LOOPFS};

/// Directory of device-mapper nodes.
const MAPPER: &str = "mapper";

/// Maximum number of entries; the rest is omitted.
const ENTRIES_MAX: usize = 8192;

/// Mounts `dev` on /dev, bind-mounts the old entries in it, and mounts `loopfs` in it.
pub(super) fn mount(dev: OwnedFd, loopfs: OwnedFd) -> Result<()> {
    let cannot = |error: Errno| Error::os(error, "cannot set up a private /dev");
    // Open the old /dev before it is hidden.
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let old = rustix::fs::open("/dev", flags, Mode::empty()).map_err(cannot)?;
    attach(dev.as_fd(), CWD, "/dev").map_err(cannot)?;
    // Look up again, to get the mount and not only the file system.
    let new = rustix::fs::open("/dev", flags, Mode::empty()).map_err(cannot)?;
    bind_entries(&old, &new).map_err(cannot)?;
    attach(loopfs.as_fd(), new.as_fd(), LOOPFS).map_err(cannot)
}

fn bind_entries(old: &OwnedFd, new: &OwnedFd) -> rustix::io::Result<()> {
    for (name, kind) in entries(old)? {
        if let Err(error) = bind_entry(old, new, &name, kind) {
            tracing::debug!("omitting /dev/{name}: {error}");
        }
    }
    Ok(())
}

fn entries(dir: &OwnedFd) -> rustix::io::Result<Vec<(String, FileType)>> {
    let mut entries = Vec::new();
    for entry in Dir::read_from(dir)?.take(ENTRIES_MAX) {
        let entry = entry?;
        let Ok(name) = entry.file_name().to_str() else { continue };
        if !is_hidden(name) {
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

/// True for nodes that the command must not see, or has of its own.
fn is_hidden(name: &str) -> bool {
    let numbered = |kind: &str| {
        name.strip_prefix(kind).is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
    };
    let listed = [".", "..", LOOPFS, "loop", "loop-control", "ublk-control"];
    listed.contains(&name) || ["loop", "ublkb", "ublkc"].into_iter().any(numbered)
}

fn bind_entry(old: &OwnedFd, new: &OwnedFd, name: &str, kind: FileType) -> rustix::io::Result<()> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    match kind {
        FileType::Symlink => {
            let target = rustix::fs::readlinkat(old, name, Vec::new())?;
            return rustix::fs::symlinkat(target, new, name);
        }
        FileType::Directory => {
            // The daemon has made it, with the links of the machine's other disks.
            if name == DEV_BLOCK {
                return Ok(());
            }
            // Includes submounts: pts, shm, mqueue.
            flags |= OpenTreeFlags::AT_RECURSIVE;
            rustix::fs::mkdirat(new, name, Mode::from_raw_mode(0o755))?;
            if name == MAPPER {
                let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let [old, new] = [old, new].map(|dir| rustix::fs::openat(dir, name, flags, Mode::empty()));
                return bind_entries(&old?, &new?);
            }
        }
        FileType::CharacterDevice | FileType::BlockDevice if make_node(old, new, name).is_ok() => {
            return Ok(());
        }
        _ => {
            let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            drop(rustix::fs::openat(new, name, flags, Mode::from_raw_mode(0o600))?);
        }
    }
    let tree = open_tree(old, name, flags | OpenTreeFlags::AT_SYMLINK_NOFOLLOW)?;
    attach(tree.as_fd(), new.as_fd(), name)
}

/// Makes the same node. Fails if the entry is not of /dev's own file system: a terminal bind-mounted
/// on /dev/console opens only in its own one.
fn make_node(old: &OwnedFd, new: &OwnedFd, name: &str) -> rustix::io::Result<()> {
    let stat = rustix::fs::statat(old, name, AtFlags::SYMLINK_NOFOLLOW)?;
    if stat.st_dev != rustix::fs::fstat(old)?.st_dev {
        return Err(Errno::XDEV);
    }
    let kind = FileType::from_raw_mode(stat.st_mode);
    rustix::fs::mknodat(new, name, kind, Mode::from_raw_mode(0o600), stat.st_rdev)?;
    let (uid, gid) = (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid));
    let owned = rustix::fs::chownat(new, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW);
    // After the owner, whose change clears bits.
    let done = owned.and_then(|()| {
        rustix::fs::chmodat(new, name, Mode::from_raw_mode(stat.st_mode & 0o7777), AtFlags::empty())
    });
    done.inspect_err(|_| {
        let _ = rustix::fs::unlinkat(new, name, AtFlags::empty());
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hides_loop_and_ublk_nodes() {
        for name in ["loop0", "loop12p3", "loop-control", "ublkb0", "ublkc7", "ublk-control", "loop"] {
            assert!(is_hidden(name), "{name}");
        }
        for name in ["null", "loopback", "ublkbackup", "dm-0", "vda1"] {
            assert!(!is_hidden(name), "{name}");
        }
    }
}
