// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Block nodes in the directory that loopfs covers, for bind mounts of /dev.
//!
//! Builders run programs in a root directory after `mount --bind /dev ROOT/dev`. Such a mount omits
//! loopfs, and /dev/loopN then leads to the directory that loopfs covers. A thread of the mounter
//! keeps nodes of the pool's devices there. It learns of them from the pool's /sys/dev/block,
//! which the daemon updates; a node follows its device within milliseconds.
//!
//! Only for root of the host, whom no node confines: unlike an inode of loopfs, a node that is kept
//! opens whatever disk has its number by then. Does not know the daemon.

use std::collections::BTreeMap;
use std::fs;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::inotify::{self, WatchFlags};
use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, mknodat, openat, unlinkat};
use rustix::io::Errno;
use rustix::mount::{OpenTreeFlags, open_tree};

use crate::private::LOOPFS;

/// Links from device numbers to devices.
const NUMBERS: &str = "/sys/dev/block";

type Nodes = BTreeMap<String, u64>;

/// The covered directory, and its nodes.
pub(super) struct CoveredNodes {
    /// A copy of the mount of /dev, without the mounts in it.
    _dev: OwnedFd,
    directory: OwnedFd,
    /// None: the pool has ended.
    made: Mutex<Option<Nodes>>,
}

impl CoveredNodes {
    /// Starts the thread. Optional: without it, only bind mounts of /dev lack nodes.
    pub(super) fn start() -> Option<Arc<CoveredNodes>> {
        let nodes = Arc::new(CoveredNodes::open().ok()?);
        let its = Arc::clone(&nodes);
        std::thread::Builder::new().spawn(move || its.follow()).ok()?;
        Some(nodes)
    }

    fn open() -> rustix::io::Result<CoveredNodes> {
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        let dev = open_tree(CWD, "/dev", flags)?;
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let directory = openat(&dev, LOOPFS, flags, Mode::empty())?;
        Ok(CoveredNodes { _dev: dev, directory, made: Mutex::new(Some(Nodes::new())) })
    }

    /// Keeps the nodes up to date. Returns only on failure, or after the end of the pool.
    fn follow(&self) -> rustix::io::Result<()> {
        let changes = inotify::init(inotify::CreateFlags::CLOEXEC)?;
        let events = WatchFlags::CREATE | WatchFlags::DELETE | WatchFlags::MOVED_TO;
        inotify::add_watch(&changes, NUMBERS, events)?;
        while self.is_updated() {
            match rustix::io::read(&changes, &mut [0; 4096]) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Updates the nodes. False: the pool has ended.
    fn is_updated(&self) -> bool {
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        made.as_mut().map(|made| self.update(made, devices(Path::new(NUMBERS)))).is_some()
    }

    /// Removes all nodes: the next daemon gives their device numbers to others.
    pub(super) fn remove(&self) {
        let made = self.made.lock().unwrap_or_else(PoisonError::into_inner).take();
        self.update(&mut made.unwrap_or_default(), Nodes::new());
    }

    fn update(&self, made: &mut Nodes, present: Nodes) {
        for (name, _) in made.iter().filter(|(name, rdev)| present.get(*name) != Some(rdev)) {
            let _ = unlinkat(&self.directory, name, AtFlags::empty());
        }
        let mode = Mode::from_raw_mode(0o600);
        for (name, rdev) in present.iter().filter(|(name, rdev)| made.get(*name) != Some(rdev)) {
            if let Err(error) = mknodat(&self.directory, name, FileType::BlockDevice, mode, *rdev) {
                tracing::debug!("cannot make a node of {name} for bind mounts of /dev: {error}");
            }
        }
        *made = present;
    }
}

/// The pool's devices and partitions, with their device numbers.
fn devices(numbers: &Path) -> Nodes {
    let entries = fs::read_dir(numbers).into_iter().flatten().flatten();
    let device = |entry: fs::DirEntry| {
        let target = fs::read_link(entry.path()).ok()?;
        // The machine's own disks have links to ../../devices.
        target.starts_with("../../block").then_some(())?;
        let name = target.file_name()?.to_str()?.to_owned();
        let number = entry.file_name();
        let (major, minor) = number.to_str()?.split_once(':')?;
        Some((name, rustix::fs::makedev(major.parse().ok()?, minor.parse().ok()?)))
    };
    entries.filter_map(device).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn finds_devices_of_the_pool_only() {
        let dir = tempfile::tempdir().unwrap();
        let links = [
            ("259:17", "../../block/loop0"),
            ("259:18", "../../block/loop0/loop0p1"),
            ("8:0", "../../devices/pci0000:00/block/sda"),
            (".259:19.new", "../../block/loop1"),
        ];
        links.iter().for_each(|(name, target)| symlink(target, dir.path().join(name)).unwrap());
        let [disk, partition] = [17, 18].map(|minor| rustix::fs::makedev(259, minor));
        let expected = Nodes::from([("loop0".to_owned(), disk), ("loop0p1".to_owned(), partition)]);
        assert_eq!(devices(dir.path()), expected);
    }
}
