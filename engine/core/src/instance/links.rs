// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Names of an instance's devices: links to their nodes and those of their partitions.
//!
//! Manages one directory in the run directory and, if enabled, one below /dev. Reads the kernel's
//! list of partitions, which anybody with write access to a disk can change.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::fs::{FlockOperation, flock};

use crate::error::{Error, Kind, Result};
use crate::sys::usage;

/// Directory of names below /dev.
pub const DEV_DIR: &str = "/dev/loopengine";
/// A link to the run directory that owns these names.
const OWNER: &str = ".run-dir";

/// The names below /dev, which one daemon owns.
#[derive(Debug)]
pub struct DevLinks(#[expect(dead_code, reason = "holds the lock")] File);

impl DevLinks {
    /// Locks the directory, creates it if missing, and removes the names of an earlier daemon.
    /// Fails if another daemon uses it.
    pub fn take(run_dir: &Path) -> Result<DevLinks> {
        let cannot = |error: std::io::Error| Error::os(error, format!("cannot create names in {DEV_DIR}"));
        fs::create_dir_all(DEV_DIR).map_err(cannot)?;
        let held = lock().map_err(cannot)?.ok_or_else(|| {
            Error::new(Kind::Busy, format!("another daemon uses {DEV_DIR}"))
                .hint("only one daemon can use --dev-links")
        })?;
        clear().map_err(cannot)?;
        symlink(run_dir, Path::new(DEV_DIR).join(OWNER)).map_err(cannot)?;
        Ok(DevLinks(held))
    }

    /// Removes names that an earlier daemon with this run directory left: nobody would update them.
    pub fn forget(run_dir: &Path) {
        let ours = fs::read_link(Path::new(DEV_DIR).join(OWNER)).is_ok_and(|owner| owner == run_dir);
        if ours && lock().is_ok_and(|held| held.is_some()) {
            let _ = clear();
            let _ = fs::remove_dir(DEV_DIR);
        }
    }
}

/// None: another process holds it.
fn lock() -> std::io::Result<Option<File>> {
    let directory = File::open(DEV_DIR)?;
    match flock(&directory, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Some(directory)),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn clear() -> std::io::Result<()> {
    for entry in fs::read_dir(DEV_DIR)? {
        let entry = entry?;
        match entry.file_type()?.is_dir() {
            true => fs::remove_dir_all(entry.path())?,
            false => fs::remove_file(entry.path())?,
        }
    }
    Ok(())
}

/// The names of one instance.
#[derive(Debug)]
pub struct Links {
    directories: Vec<PathBuf>,
    /// Locked while names change, so that no name of a removed device is created.
    changing: Mutex<()>,
}

impl Links {
    /// In `directory`, and below /dev if enabled, in a directory named after the instance.
    pub fn new(directory: &Path, name: &str, dev_links: bool) -> Result<Links> {
        let mut directories = vec![directory.to_owned()];
        if dev_links {
            let second = Path::new(DEV_DIR).join(name);
            fs::create_dir_all(&second)
                .map_err(|error| Error::os(error, format!("cannot create {}", second.display())))?;
            directories.push(second);
        }
        Ok(Links { directories, changing: Mutex::default() })
    }

    fn change(&self) -> MutexGuard<'_, ()> {
        self.changing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Creates the names of a device and of its partitions.
    pub fn make(&self, number: u32, node: &Path) -> Result<()> {
        let changing = self.change();
        for directory in &self.directories {
            let link = directory.join(format!("loop{number}"));
            name(&link, node)
                .map_err(|error| Error::os(error, format!("cannot create {}", link.display())))?;
        }
        drop(changing);
        self.follow(number, node, || true)
    }

    /// Updates the names of a device's partitions, unless the device is not `there` any more.
    pub fn follow(&self, number: u32, node: &Path, there: impl Fn() -> bool) -> Result<()> {
        let _changing = self.change();
        if !there() {
            return Ok(());
        }
        let wanted: BTreeMap<String, PathBuf> = usage::partitions(node)
            .map(|partition| (format!("loop{number}p{}", partition.number), partition.node))
            .collect();
        for directory in &self.directories {
            for (word, node) in &wanted {
                let link = directory.join(word);
                name(&link, node)
                    .map_err(|error| Error::os(error, format!("cannot create {}", link.display())))?;
            }
            let old = partitions_in(directory, number);
            old.filter(|word| !wanted.contains_key(word)).for_each(|word| forget(&directory.join(word)));
        }
        Ok(())
    }

    /// Removes the names of a device and of its partitions.
    pub fn remove(&self, number: u32) {
        let _changing = self.change();
        for directory in &self.directories {
            forget(&directory.join(format!("loop{number}")));
            partitions_in(directory, number).for_each(|word| forget(&directory.join(word)));
        }
    }
}

impl Drop for Links {
    fn drop(&mut self) {
        // The one in the run directory belongs to the instance.
        self.directories.iter().skip(1).for_each(|directory| drop(fs::remove_dir(directory)));
    }
}

/// Keeps a correct link: a new one might not fit on a full file system.
fn name(link: &Path, node: &Path) -> std::io::Result<()> {
    if fs::read_link(link).is_ok_and(|present| present == node) {
        return Ok(());
    }
    let _ = fs::remove_file(link);
    symlink(node, link)
}

fn forget(link: &Path) {
    let _ = fs::remove_file(link);
}

/// Names of a device's partitions.
fn partitions_in(directory: &Path, number: u32) -> impl Iterator<Item = String> {
    let prefix = format!("loop{number}p");
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(move |word| word.strip_prefix(&prefix).is_some_and(|rest| rest.parse::<u32>().is_ok()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(directory: &Path) -> Vec<String> {
        let mut words: Vec<_> = fs::read_dir(directory).unwrap().flatten().map(|e| e.file_name()).collect();
        words.sort();
        words.into_iter().map(|word| word.into_string().unwrap()).collect()
    }

    #[test]
    fn names_of_partitions_are_updated_and_removed() {
        let directory = tempfile::tempdir().unwrap();
        let links = Links::new(directory.path(), "x", false).unwrap();
        let node = Path::new("/dev/no-such-disk");
        links.make(1, node).unwrap();
        links.make(11, node).unwrap();
        for stale in ["loop1p1", "loop1p128", "loop11p1", "loop1px"] {
            symlink("/dev/null", directory.path().join(stale)).unwrap();
        }
        links.follow(1, node, || false).unwrap();
        assert_eq!(words(directory.path()).len(), 6);
        links.follow(1, node, || true).unwrap();
        assert_eq!(words(directory.path()), ["loop1", "loop11", "loop11p1", "loop1px"]);
        links.remove(11);
        assert_eq!(words(directory.path()), ["loop1", "loop1px"]);
        assert_eq!(fs::read_link(directory.path().join("loop1")).unwrap(), node);
    }
}
