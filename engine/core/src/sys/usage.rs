// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What uses a disk: file systems that are mounted from it, and swap.
//!
//! Knows mountinfo, swaps and the kernel's list of disks. Sees what the first process of the machine sees,
//! because the daemon has a mount namespace of its own.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::mntns::{self, Mount};
use super::processes;

/// Mounts that the machine's administrator sees.
const FIRST_MOUNTINFO: &str = "/proc/1/mountinfo";

/// Disks whose nodes are looked for, with all that belongs to them.
const NODES_MAX: usize = 1 << 14;

/// Disks, by their names in the kernel.
#[derive(Debug, Default)]
pub struct Disks(BTreeSet<OsString>);

impl Disks {
    /// The disk with this node, and the kernel's loop devices that are backed by it or by this file.
    pub fn of(node: &Path) -> Disks {
        let mut disks = Disks::backed_by(|file| file == node);
        disks.0.extend(node.file_name().filter(|_| node.starts_with("/dev")).map(Into::into));
        disks
    }

    /// The disk with this device number.
    pub fn numbered(number: u64) -> Disks {
        let (major, minor) = (rustix::fs::major(number), rustix::fs::minor(number));
        let disk = fs::canonicalize(format!("/sys/dev/block/{major}:{minor}"));
        Disks(disk.ok().iter().filter_map(|disk| disk.file_name()).map(Into::into).collect())
    }

    /// The name of the only disk.
    pub fn name(&self) -> Option<String> {
        self.0.first().map(|name| name.to_string_lossy().into_owned())
    }

    /// Loop devices of the kernel that are backed by files for which `ours` says yes.
    pub fn backed_by(ours: impl Fn(&Path) -> bool) -> Disks {
        let backed = fs::read_dir("/sys/block").into_iter().flatten().flatten().filter(|disk| {
            let file = fs::read(disk.path().join("loop/backing_file")).unwrap_or_default();
            ours(Path::new(std::ffi::OsStr::from_bytes(file.trim_ascii_end())))
        });
        Disks(backed.map(|disk| disk.file_name()).collect())
    }

    /// Nodes of these disks, of their partitions and of what is stacked upon them.
    pub fn nodes(&self) -> Vec<PathBuf> {
        let mut found: Vec<OsString> = self.0.iter().cloned().collect();
        let mut seen = 0;
        while let Some(name) = found.get(seen).filter(|_| seen < NODES_MAX).cloned() {
            seen += 1;
            let dir = Path::new("/sys/class/block").join(&name);
            let parts = fs::read_dir(&dir).into_iter().flatten().flatten();
            let parts = parts.filter(|entry| entry.path().join("partition").exists());
            let upon = fs::read_dir(dir.join("holders")).into_iter().flatten().flatten();
            let more: Vec<OsString> = parts.chain(upon).map(|entry| entry.file_name()).collect();
            more.into_iter().for_each(|name| {
                if !found.contains(&name) {
                    found.push(name)
                }
            });
        }
        // What lies upon others first: its caches end in theirs.
        found.iter().rev().map(|name| Path::new("/dev").join(name)).collect()
    }

    /// Takes these in as well; false if there was nothing new.
    pub fn extend(&mut self, others: Disks) -> bool {
        let before = self.0.len();
        self.0.extend(others.0);
        self.0.len() > before
    }

    /// Takes in a disk by its name.
    pub fn insert(&mut self, name: &str) {
        self.0.insert(name.into());
    }

    /// The first of them.
    pub fn first(&self) -> Option<OsString> {
        self.0.first().cloned()
    }

    fn has(&self, name: &std::ffi::OsStr) -> bool {
        self.0.contains(name)
    }

    /// Where file systems are mounted from these disks, their partitions and stacks upon them, oldest first.
    pub fn mounts(&self) -> Vec<PathBuf> {
        mounts().into_iter().filter(|mount| self.hold(mount)).map(|mount| mount.target).collect()
    }

    /// Whether a file system lies on them.
    pub fn hold(&self, mount: &Mount) -> bool {
        mntns::lies_on(mount, &|name| self.has(name))
    }

    /// Swap on these disks.
    pub fn swaps(&self) -> Vec<PathBuf> {
        swaps().into_iter().filter(|node| mntns::node_lies_on(node, &|name| self.has(name))).collect()
    }
}

/// A partition as the kernel knows it.
#[derive(Debug, PartialEq, Eq)]
pub struct Partition {
    /// N of pN.
    pub number: u32,
    /// What users open.
    pub node: PathBuf,
}

/// Partitions of the disk with this node. One that goes loses its node first, of which inotify tells, and its entry in
/// sysfs some time later: it is none any more.
pub fn partitions(node: &Path) -> impl Iterator<Item = Partition> {
    let disk =
        node.file_name().filter(|_| node.starts_with("/dev")).map(|name| Path::new("/sys/block").join(name));
    let entries = disk.into_iter().flat_map(fs::read_dir).flatten().flatten();
    entries.filter_map(|entry| {
        let number = fs::read_to_string(entry.path().join("partition")).ok()?.trim_ascii().parse().ok()?;
        let node = Path::new("/dev").join(entry.file_name());
        node.symlink_metadata().is_ok().then_some(Partition { number, node })
    })
}

/// Logical block size of the disk with this device number, in bytes.
pub fn logical_block_size(number: u64) -> Option<u64> {
    let (major, minor) = (rustix::fs::major(number), rustix::fs::minor(number));
    let size = fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/queue/logical_block_size"));
    size.ok()?.trim_ascii().parse().ok()
}

/// Whether other disks lie upon the one with this device number.
pub fn has_holders(number: u64) -> bool {
    let (major, minor) = (rustix::fs::major(number), rustix::fs::minor(number));
    fs::read_dir(format!("/sys/dev/block/{major}:{minor}/holders"))
        .is_ok_and(|mut holders| holders.next().is_some())
}

/// All nodes and files that the machine swaps to.
pub fn swaps() -> Vec<PathBuf> {
    let table = fs::read_to_string("/proc/swaps").unwrap_or_default();
    let first = |line: &str| line.split_ascii_whitespace().next().map(mntns::unescape);
    table.lines().skip(1).filter_map(first).collect()
}

/// All mounts of the machine, oldest first.
pub fn mounts() -> Vec<Mount> {
    let table = fs::read(FIRST_MOUNTINFO).or_else(|_| fs::read(mntns::MOUNTINFO)).unwrap_or_default();
    // One name that is not UTF-8 must not hide all others.
    String::from_utf8_lossy(&table).lines().filter_map(mntns::parse).collect()
}

/// Logs that users lose a device that ends.
pub fn warn_lost(device: &str, disks: &Disks) {
    tracing::warn!(
        "removing {device}, which is in use ({}): its users get I/O errors; unmount its file systems",
        uses_of(disks)
    );
}

/// Logs that a device of the kernel's loop driver stays until its users close it.
pub fn warn_left(device: &str, node: &Path, disks: &Disks) {
    tracing::warn!(
        "removing {device}, which is in use ({}): the kernel keeps {} until its last user closes it",
        uses_of(disks),
        node.display()
    );
}

fn uses_of(disks: &Disks) -> String {
    // A tenant's mounts are in its own mount namespace; others may have copies of them.
    let mounts = processes::mounts().into_iter().filter(|mount| disks.hold(mount));
    let mounted: BTreeSet<PathBuf> = mounts.map(|mount| mount.target).collect();
    let mounted = mounted.into_iter().map(|target| format!("mounted on {}", target.display()));
    let swap = disks.swaps().into_iter().map(|node| format!("swap on {}", node.display()));
    let uses: Vec<String> = mounted.chain(swap).collect();
    if uses.is_empty() { "open".to_owned() } else { uses.join(", ") }
}

/// Writes back what the kernel caches of a file or a disk, and of the file system that is mounted from it. Waits
/// for it.
pub fn write_back(node: &Path) -> std::io::Result<()> {
    use std::os::fd::AsFd;
    use std::os::unix::fs::FileTypeExt;
    let file = fs::File::open(node)?;
    match file.metadata()?.file_type().is_block_device() {
        true => Ok(super::block::flush(file.as_fd())?),
        false => file.sync_all(),
    }
}

/// Stops swapping to a node.
pub fn swapoff(node: &Path) -> std::io::Result<()> {
    let node = std::ffi::CString::new(node.as_os_str().as_bytes())?;
    // SAFETY: reads a string that ends with a zero and outlives the call.
    match unsafe { libc::swapoff(node.as_ptr()) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unopened_disk_is_unused() {
        let disks = Disks::of(Path::new("/dev/ublkb99999"));
        assert!(disks.has("ublkb99999".as_ref()));
        assert!(disks.mounts().is_empty());
        assert!(disks.swaps().is_empty());
    }

    #[test]
    fn a_file_is_no_disk() {
        assert!(Disks::of(Path::new("/run/nobody/loop0")).0.is_empty());
    }
}
