// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Disks that lie upon others: those of device mapper and of md.
//!
//! Knows what sysfs tells of them, and how each is ended. Does not know whose the disks below are.

use std::fs;
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

/// How deep disks may be stacked; what is deeper counts as somebody else's.
const DEPTH_MAX: usize = 8;

const CONTROL: &str = "/dev/mapper/control";
const DM_DEV_REMOVE: libc::Ioctl = 0xc138_fd04_u32 as libc::Ioctl;
/// Remove it at its last close, if it is open.
const DM_DEFERRED_REMOVE: u32 = 1 << 17;
/// Major number of md's arrays.
const MD: u32 = 9;

/// A disk of device mapper or md.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Stack {
    /// What the kernel calls it: dm-N or mdN.
    pub name: String,
    /// Its device number.
    pub rdev: u64,
}

impl Stack {
    /// The one with this device number.
    pub fn numbered(rdev: u64) -> Option<Stack> {
        let target = fs::read_link(sysfs(rdev)).ok()?;
        let name = target.file_name()?.to_str()?;
        // Not a partition of one.
        let number = name.strip_prefix("dm-").or_else(|| name.strip_prefix("md"))?;
        let is_whole = number.bytes().all(|byte| byte.is_ascii_digit());
        is_whole.then(|| Stack { name: name.to_owned(), rdev })
    }

    /// The array with this device number that has no disks yet. The kernel makes one when somebody opens its node.
    pub fn to_be(rdev: u64) -> Option<Stack> {
        let is_array = rustix::fs::major(rdev) == MD && related(rdev, "slaves").is_empty();
        is_array.then(|| Stack { name: format!("md{}", rustix::fs::minor(rdev)), rdev })
    }

    /// Those that lie directly upon the disk or partition with this device number.
    pub fn upon(rdev: u64) -> Vec<Stack> {
        related(rdev, "holders").into_iter().filter_map(Stack::numbered).collect()
    }

    /// It is there. One that goes loses its node first, and its entry in sysfs some time later.
    pub fn exists(&self) -> bool {
        Path::new("/dev").join(&self.name).exists()
            && Stack::numbered(self.rdev).is_some_and(|stack| stack == *self)
    }

    /// All disks at the bottom of it are `ours`, and there are some.
    pub fn lies_on(&self, ours: &dyn Fn(u64) -> bool) -> bool {
        self.lies_within(ours, DEPTH_MAX)
    }

    fn lies_within(&self, ours: &dyn Fn(u64) -> bool, depth: usize) -> bool {
        let below = related(self.rdev, "slaves");
        let fits = |rdev: &u64| {
            ours(*rdev)
                || depth > 0 && Stack::numbered(*rdev).is_some_and(|stack| stack.lies_within(ours, depth - 1))
        };
        !below.is_empty() && below.iter().all(fits)
    }

    /// What device mapper calls it: the name of its node below /dev/mapper.
    pub fn mapping(&self) -> Option<String> {
        let name = fs::read_to_string(sysfs(self.rdev).join("dm/name")).ok()?;
        Some(name.trim_end_matches('\n').to_owned())
    }

    fn is_mapped(&self) -> bool {
        self.name.starts_with("dm-")
    }

    /// Ends it, at its last close if it is open; an array that is open stays.
    pub fn end(&self) -> io::Result<()> {
        match self.is_mapped() {
            true => remove(self.rdev),
            false => fs::write(sysfs(self.rdev).join("md/array_state"), "clear"),
        }
    }
}

fn sysfs(rdev: u64) -> PathBuf {
    PathBuf::from(format!("/sys/dev/block/{}:{}", rustix::fs::major(rdev), rustix::fs::minor(rdev)))
}

/// Device numbers of what a directory of a disk in sysfs lists.
/// Whether the disk with this device number, or one that it lies on, has a name that fits. Also if
/// that is unknown.
pub fn may_lie_on(rdev: u64, fits: &dyn Fn(&str) -> bool) -> bool {
    may_lie_within(rdev, fits, DEPTH_MAX)
}

fn may_lie_within(rdev: u64, fits: &dyn Fn(&str) -> bool, depth: usize) -> bool {
    // The directory of a partition is in that of its disk.
    let Ok(target) = fs::read_link(sysfs(rdev)) else { return true };
    let mut names = target.iter().filter_map(|name| name.to_str());
    let below = || related(rdev, "slaves").into_iter().any(|below| may_lie_within(below, fits, depth - 1));
    names.any(fits) || depth == 0 || below()
}

fn related(rdev: u64, how: &str) -> Vec<u64> {
    let entries = fs::read_dir(sysfs(rdev).join(how)).into_iter().flatten().flatten();
    entries.filter_map(|entry| number(&entry.path())).collect()
}

fn number(disk: &Path) -> Option<u64> {
    let text = fs::read_to_string(disk.join("dev")).ok()?;
    let (major, minor) = text.trim_end().split_once(':')?;
    Some(rustix::fs::makedev(major.parse().ok()?, minor.parse().ok()?))
}

/// `struct dm_ioctl`.
#[repr(C)]
struct DmIoctl {
    version: [u32; 3],
    data_size: u32,
    data_start: u32,
    target_count: u32,
    open_count: i32,
    flags: u32,
    event_nr: u32,
    padding: u32,
    dev: u64,
    name: [u8; 128],
    uuid: [u8; 129],
    data: [u8; 7],
}

fn remove(rdev: u64) -> io::Result<()> {
    let control = fs::File::options().read(true).write(true).open(CONTROL)?;
    let mut request = DmIoctl {
        version: [4, 0, 0],
        data_size: size_of::<DmIoctl>() as u32,
        data_start: 0,
        target_count: 0,
        open_count: 0,
        flags: DM_DEFERRED_REMOVE,
        event_nr: 0,
        padding: 0,
        // Without a name and a UUID the number counts.
        dev: rdev,
        name: [0; 128],
        uuid: [0; 129],
        data: [0; 7],
    };
    // SAFETY: DM_DEV_REMOVE reads and writes one dm_ioctl of the size that it says, which lives until the call returns.
    match unsafe { libc::ioctl(control.as_raw_fd(), DM_DEV_REMOVE, &raw mut request) } {
        0.. => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dm_ioctl_has_the_layout_of_the_kernel() {
        // The size is part of the ioctl's number.
        assert_eq!(size_of::<DmIoctl>() as libc::Ioctl, DM_DEV_REMOVE >> 16 & 0x3fff);
        assert_eq!(std::mem::offset_of!(DmIoctl, dev), 40);
    }

    #[test]
    fn rejects_devices_that_are_no_stack() {
        let null = rustix::fs::makedev(1, 3);
        assert_eq!(Stack::numbered(null), None);
        assert_eq!(Stack::to_be(null), None);
        let absent = Stack::to_be(rustix::fs::makedev(MD, 4711)).unwrap();
        assert_eq!(absent.name, "md4711");
        assert!(!absent.exists() && !absent.lies_on(&|_| true));
    }
}
