// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The list of this program's disks, by which udev tells them from those of other ublk servers and
//! from other loop devices.
//!
//! `share/udev/59-loopengine.rules` tests for a file with the name of the disk. All daemons of the
//! machine share the directory, whatever their run directories: the rule can name only one.
//!
//! A file exists only while the driver has the device, from before its disk starts until after its
//! disk is gone. So it never hides the disk that another server makes next under the same number.
//! It contains the owner cookie of the device, by which a file that a dead daemon left is
//! recognized, if another program has deleted the device.

use std::fs::{self, DirBuilder, File};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use crate::error::{Error, Result};

/// The directory, which 59-loopengine.rules names too. It is root's.
const DIRECTORY: &str = "/run/loopengine/.disks";

/// How long another daemon may change the list, and the interval between two attempts.
const LOCK_TIMEOUT: Duration = Duration::from_secs(2);
const LOCK_INTERVAL: Duration = Duration::from_millis(1);

/// How long a thread waits for other threads of this process.
const QUEUE_TIMEOUT: Duration = Duration::from_secs(10);

/// A directory with one file per disk.
#[derive(Debug)]
pub struct DiskList<'a> {
    directory: &'a Path,
    changing: &'static Changing,
}

/// Whether a thread of this process changes the list: the others sleep until it is done. Only one
/// polls for the lock of the directory.
#[derive(Debug)]
struct Changing {
    is_taken: Mutex<bool>,
    freed: Condvar,
}

impl Changing {
    const fn new() -> Changing {
        Changing { is_taken: Mutex::new(false), freed: Condvar::new() }
    }

    /// False: not in time.
    fn take(&self, timeout: Duration) -> bool {
        let is_taken = self.is_taken.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.freed.wait_timeout_while(is_taken, timeout, |is_taken| *is_taken);
        !std::mem::replace(&mut *waited.unwrap_or_else(PoisonError::into_inner).0, true)
    }

    fn free(&self) {
        *self.is_taken.lock().unwrap_or_else(PoisonError::into_inner) = false;
        self.freed.notify_one();
    }
}

/// The lock of the list.
struct ListLock<'a> {
    directory: Option<File>,
    changing: &'a Changing,
}

impl Drop for ListLock<'_> {
    fn drop(&mut self) {
        drop(self.directory.take());
        self.changing.free();
    }
}

impl DiskList<'static> {
    /// The one that udev reads.
    pub fn of_machine() -> DiskList<'static> {
        static CHANGING: Changing = Changing::new();
        DiskList { directory: Path::new(DIRECTORY), changing: &CHANGING }
    }
}

impl DiskList<'_> {
    fn file(&self, disk: &str) -> PathBuf {
        self.directory.join(disk)
    }

    /// Lists the disk of a device, which has not started yet or has been recovered.
    pub fn add(&self, disk: &str, owner_cookie: u64) -> Result<()> {
        let file = self.file(disk);
        let added = || {
            self.create()?;
            let _lock = self.lock()?;
            // Not written again: a recovery must succeed on a full file system.
            match cookie_in(&file) {
                Some(listed) if listed == owner_cookie => Ok(()),
                _ => fs::write(&file, format!("{owner_cookie:016x}\n")),
            }
        };
        added().map_err(|error| {
            Error::os(error, format!("cannot list the disk {disk} for udev in {}", file.display()))
                .hint("make /run writable, and free space there")
        })
    }

    /// Whether a disk is listed.
    pub fn contains(&self, disk: &str) -> bool {
        self.file(disk).exists()
    }

    /// Removes the disk of a device that has been stopped and will be deleted.
    pub fn remove(&self, disk: &str, owner_cookie: u64) {
        let Ok(_lock) = self.lock() else { return };
        let file = self.file(disk);
        if cookie_in(&file) == Some(owner_cookie) {
            let _ = fs::remove_file(file);
        }
    }

    /// All listed disks, with the owner cookies of their devices.
    pub fn entries(&self) -> Vec<(String, u64)> {
        let entries = fs::read_dir(self.directory).into_iter().flatten().flatten();
        let disks = entries.filter_map(|entry| entry.file_name().into_string().ok());
        disks
            .filter_map(|disk| Some((cookie_in(&self.file(&disk))?, disk)))
            .map(|(cookie, disk)| (disk, cookie))
            .collect()
    }

    /// Removes all files for which `exists` denies that a driver has this disk with this owner
    /// cookie. Returns the disks.
    pub fn sweep(&self, exists: impl Fn(&str, u64) -> bool) -> Vec<String> {
        let entries = fs::read_dir(self.directory).into_iter().flatten().flatten();
        let mut swept: Vec<String> = entries
            .filter_map(|entry| entry.file_name().into_string().ok())
            .filter(|disk| disk.starts_with("ublkb") || disk.starts_with("loop"))
            .filter(|disk| {
                let file = self.file(disk);
                let listed = cookie_in(&file);
                if listed.is_some_and(|cookie| exists(disk, cookie)) {
                    return false;
                }
                // Another daemon may have listed a new disk under this number since.
                let Ok(_lock) = self.lock() else { return false };
                cookie_in(&file) == listed && fs::remove_file(&file).is_ok()
            })
            .collect();
        swept.sort();
        swept
    }

    /// Creates the directory for root only: whoever can open it can lock it.
    fn create(&self) -> std::io::Result<()> {
        if let Some(parent) = self.directory.parent() {
            DirBuilder::new().recursive(true).mode(0o755).create(parent)?;
        }
        DirBuilder::new().recursive(true).mode(0o700).create(self.directory)
    }

    /// Held for the time of one change; the daemons of a machine share the directory. One that is
    /// stopped meanwhile must not stop the others.
    fn lock(&self) -> std::io::Result<ListLock<'_>> {
        if !self.changing.take(QUEUE_TIMEOUT) {
            return Err(Errno::WOULDBLOCK.into());
        }
        let deadline = Instant::now() + LOCK_TIMEOUT;
        let mut lock = ListLock { directory: None, changing: self.changing };
        let directory = lock.directory.insert(File::open(self.directory)?);
        loop {
            match flock(&*directory, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Ok(lock),
                Err(Errno::WOULDBLOCK | Errno::INTR) if Instant::now() < deadline => {
                    std::thread::sleep(LOCK_INTERVAL);
                }
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// The cookie in a file. None: there is no such file, or a crash has cut it short.
fn cookie_in(file: &Path) -> Option<u64> {
    u64::from_str_radix(fs::read_to_string(file).ok()?.trim_end(), 16).ok()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    fn list_in(directory: &Path) -> DiskList<'_> {
        DiskList { directory, changing: Box::leak(Box::new(Changing::new())) }
    }

    fn names(directory: &Path) -> Vec<String> {
        let entries = fs::read_dir(directory).unwrap();
        let mut names: Vec<_> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn a_disk_is_listed_until_its_device_is_deleted() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("loopengine/.disks");
        let list = list_in(&path);
        list.remove("ublkb3", 7);
        list.add("ublkb3", 7).unwrap();
        list.add("ublkb12", 8).unwrap();
        assert_eq!(names(&path), ["ublkb12", "ublkb3"]);
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o700, "others could lock it");
        list.remove("ublkb3", 7);
        assert_eq!(names(&path), ["ublkb12"]);
        // Another device has this number now.
        list.remove("ublkb12", 7);
        assert_eq!(names(&path), ["ublkb12"]);
    }

    #[test]
    fn listing_a_recovered_disk_writes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let list = list_in(dir.path());
        list.add("ublkb3", 7).unwrap();
        let file = dir.path().join("ublkb3");
        let written = fs::metadata(&file).unwrap().modified().unwrap();
        std::thread::sleep(std::time::Duration::from_millis(20));
        list.add("ublkb3", 7).unwrap();
        assert_eq!(fs::metadata(&file).unwrap().modified().unwrap(), written);
        list.add("ublkb3", 8).unwrap();
        assert_eq!(cookie_in(&file), Some(8));
    }

    #[test]
    fn a_sweep_keeps_only_disks_that_exist() {
        let dir = tempfile::tempdir().unwrap();
        let list = list_in(dir.path());
        // 1 exists, 2 is gone, 3 is another server's by now, 4 was cut short, 5 is no disk.
        for (disk, cookie) in [("ublkb1", 11), ("loop2", 12), ("ublkb3", 13)] {
            list.add(disk, cookie).unwrap();
        }
        fs::write(dir.path().join("ublkb4"), "").unwrap();
        fs::write(dir.path().join("other"), "").unwrap();
        let driver = |disk: &str, cookie: u64| [("ublkb1", 11), ("ublkb3", 0)].contains(&(disk, cookie));
        assert_eq!(list.sweep(driver), ["loop2", "ublkb3", "ublkb4"]);
        assert_eq!(names(dir.path()), ["other", "ublkb1"]);
    }

    #[test]
    fn a_sweep_spares_a_disk_listed_meanwhile() {
        let dir = tempfile::tempdir().unwrap();
        let list = list_in(dir.path());
        list.add("ublkb3", 13).unwrap();
        let other_daemon = |_: &str, _: u64| {
            list.add("ublkb3", 99).unwrap();
            false
        };
        assert!(list.sweep(other_daemon).is_empty());
        assert_eq!(cookie_in(&dir.path().join("ublkb3")), Some(99));
    }

    #[test]
    fn a_daemon_that_is_stopped_delays_the_others_only() {
        let dir = tempfile::tempdir().unwrap();
        let list = list_in(dir.path());
        let stopped = list_in(dir.path());
        let _held = stopped.lock().unwrap();
        let error = list.add("ublkb3", 7).unwrap_err().to_string();
        assert!(error.contains("ublkb3"), "{error}");
    }

    #[test]
    fn the_error_names_the_disk_and_the_next_step() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        fs::write(&file, "").unwrap();
        let error = list_in(&file).add("ublkb3", 7).unwrap_err().to_string();
        assert!(error.contains("ublkb3") && error.contains("free space"), "{error}");
    }

    #[test]
    fn the_rule_names_this_directory() {
        let rules = Path::new(env!("CARGO_MANIFEST_DIR")).join("../share/udev/59-loopengine.rules");
        let rules = fs::read_to_string(rules).unwrap();
        for name in ["$kernel", "$parent"] {
            assert!(rules.contains(&format!("TEST!=\"{DIRECTORY}/{name}\"")), "{name} in {rules}");
        }
    }
}
