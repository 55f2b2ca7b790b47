// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Finds users of a block device or a file outside this daemon: mounts, swap, device mapper and md,
//! the kernel's loop devices.
//!
//! Reads /proc and /sys; a plain user sees less than root. Does not know what may be shared, nor what
//! this daemon serves. May block on the file systems of swap files and of the loop devices' backing
//! files.

use std::collections::HashSet;
use std::fs::{self, OpenOptions};
use std::os::fd::BorrowedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::frontend::kernel_loop;
use crate::image::Identity;
use crate::sys::loop_device;

/// A use of an image outside this daemon.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExternalUse {
    /// The user, for messages: "the mount on /mnt".
    pub who: String,
    /// It may write.
    pub writes: bool,
    /// First byte and length of its part of the image; length 0: to the end.
    pub range: (u64, u64),
}

/// One entry of `/proc/PID/mountinfo`.
struct MountEntry {
    rdev: u64,
    point: String,
    source: String,
    read_only: bool,
}

/// A block device that shares bytes with another: itself, its disk, a partition of it.
struct RelatedDevice {
    rdev: u64,
    /// For messages: "" or " of its partition sda1".
    of: String,
}

/// All users, writers first, without the loop devices with these owner cookies, and those that this
/// process has added. `may_open`: which loop devices it may open to learn their file.
pub fn find(image: &Identity, own: &HashSet<u64>, may_open: fn(u32) -> bool) -> Vec<ExternalUse> {
    let mounts = mounts();
    let related_devices = match image.rdev {
        0 => Vec::new(),
        rdev => related_devices(rdev),
    };
    let mut found = Vec::new();
    for RelatedDevice { rdev, of } in &related_devices {
        let users = mounted(*rdev, &mounts).into_iter().chain(built_upon(*rdev));
        found.extend(users.map(|user| ExternalUse { who: format!("{}{of}", user.who), ..user }));
    }
    let is_it = |(dev, ino, rdev): (u64, u64, u64)| match image.rdev {
        0 => (dev, ino) == (image.dev, image.ino),
        _ => related_devices.iter().any(|relative| relative.rdev == rdev),
    };
    if swaps().into_iter().any(is_it) {
        found.push(ExternalUse { who: "swap".to_owned(), writes: true, range: (0, 0) });
    }
    found.extend(kernel_loops(is_it, &mounts, own, may_open));
    found.sort_by_key(|user| !user.writes);
    found
}

/// Block devices that share bytes with this one, itself excepted.
pub fn related(rdev: u64) -> Vec<u64> {
    let all = if rdev == 0 { Vec::new() } else { related_devices(rdev) };
    all.into_iter().map(|relative| relative.rdev).filter(|other| *other != rdev).collect()
}

/// What a loop device of the host, or a partition of one, is bound to. May block as its file system
/// does. None for the devices of this program, which claim their images themselves.
pub fn below(device: BorrowedFd<'_>, rdev: u64) -> Option<Identity> {
    if rdev == 0 || !directory(rdev).iter().any(|name| name.as_bytes().starts_with(b"loop")) {
        return None;
    }
    let info = loop_device::status(device).ok()?;
    if kernel_loop::cookie(&info).is_some() {
        return None;
    }
    let (dev, ino) = if info.rdevice == 0 { (info.device, info.inode) } else { (0, 0) };
    Some(Identity { dev, ino, rdev: info.rdevice, btime_ns: 0 })
}

/// The directory of a block device in sysfs.
fn directory(rdev: u64) -> PathBuf {
    let number = format!("/sys/dev/block/{}:{}", rustix::fs::major(rdev), rustix::fs::minor(rdev));
    fs::canonicalize(&number).unwrap_or_else(|_| number.into())
}

fn related_devices(rdev: u64) -> Vec<RelatedDevice> {
    let own = directory(rdev);
    let mut all = vec![RelatedDevice { rdev, of: String::new() }];
    if own.join("partition").exists() {
        let disk = own.parent().unwrap_or(&own);
        let of = format!(" of its disk {}", last(disk));
        all.extend(number_of(disk).map(|rdev| RelatedDevice { rdev, of }));
        return all;
    }
    let parts = entries(&own).filter(|entry| entry.join("partition").exists());
    all.extend(parts.filter_map(|part| {
        let of = format!(" of its partition {}", last(&part));
        Some(RelatedDevice { rdev: number_of(&part)?, of })
    }));
    all
}

/// Mounts of a block device.
fn mounted(rdev: u64, mounts: &[MountEntry]) -> Vec<ExternalUse> {
    let own = directory(rdev);
    // Btrfs and others have their own device numbers: compare the source's name. It is never
    // followed, since anyone who can mount FUSE chooses it.
    let sharing = [format!("/dev/{}", last(&own)), format!("/dev/mapper/{}", mapper_name(&own))];
    let is_it = |mount: &&MountEntry| mount.rdev == rdev || sharing.contains(&mount.source);
    let user = |mount: &MountEntry| ExternalUse {
        who: format!("the mount on {}", mount.point),
        writes: !mount.read_only,
        range: (0, 0),
    };
    mounts.iter().filter(is_it).map(user).collect()
}

/// Devices of device mapper, md and the like on a block device.
fn built_upon(rdev: u64) -> Vec<ExternalUse> {
    let user = |holder: PathBuf| {
        let name = last(&holder);
        let who = match mapper_name(Path::new(&format!("/sys/block/{name}"))) {
            mapped if mapped.is_empty() => name,
            mapped => format!("{name} (/dev/mapper/{mapped})"),
        };
        ExternalUse { who, writes: true, range: (0, 0) }
    };
    entries(&directory(rdev).join("holders")).map(user).collect()
}

/// The kernel's loop devices on a file or block device that `is_it`.
fn kernel_loops(
    is_it: impl Fn((u64, u64, u64)) -> bool,
    mounts: &[MountEntry],
    own: &HashSet<u64>,
    may_open: fn(u32) -> bool,
) -> Vec<ExternalUse> {
    let user = |device: PathBuf| {
        let name = last(&device);
        let number = name.trim_start_matches("loop").parse().unwrap_or(u32::MAX);
        // A disk of a pool must not be open, even for a moment: it would count as in use.
        if kernel_loop::is_held(number) || !device.join("loop/backing_file").exists() {
            return None;
        }
        let node = format!("/dev/{name}");
        let rdev = number_of(&device)?;
        let opened = match may_open(number) {
            true => OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(&node).ok(),
            false => None,
        };
        let same = match opened {
            Some(file) => {
                let info = loop_device::status(&file).ok()?;
                let is_own = kernel_loop::cookie(&info).is_some_and(|cookie| own.contains(&cookie));
                let is_node = file.metadata().ok()?.rdev() == rdev;
                !is_own && is_node && is_it((info.device, info.inode, info.rdevice))
            }
            // Everybody may read the path of its file, which need not lead to the file.
            None => is_it(numbers(Path::new(&text(&device.join("loop/backing_file"))))?),
        };
        if !same {
            return None;
        }
        let bytes = |name| text(&device.join(name)).parse().unwrap_or(0);
        let range = (bytes("loop/offset"), bytes("loop/sizelimit"));
        let writes = text(&device.join("ro")) != "1";
        let parts = related_devices(rdev).into_iter().flat_map(|relative| mounted(relative.rdev, mounts));
        let who = parts.fold(node, |who, mount| format!("{who}, {}", mount.who));
        Some(ExternalUse { who, writes, range })
    };
    let loops = entries(Path::new("/sys/block")).filter(|device| last(device).starts_with("loop"));
    loops.filter_map(user).collect()
}

/// The mounts of the machine and of this process, each once.
fn mounts() -> Vec<MountEntry> {
    let mut all: Vec<MountEntry> = Vec::new();
    for table in ["/proc/1/mountinfo", "/proc/self/mountinfo"] {
        // Names may contain any bytes; escapes keep them in one line.
        let text = fs::read(table).map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
        for mount in text.unwrap_or_default().lines().filter_map(parse_mount) {
            if !all.iter().any(|other| (other.rdev, &other.point) == (mount.rdev, &mount.point)) {
                all.push(mount);
            }
        }
    }
    all
}

/// `36 35 8:1 / /mnt rw,relatime context:1 - ext4 /dev/sda1 rw`
fn parse_mount(line: &str) -> Option<MountEntry> {
    let (mount, file_system) = line.split_once(" - ")?;
    let mut words = mount.split(' ').skip(2);
    let (major, minor) = words.next()?.split_once(':')?;
    let rdev = rustix::fs::makedev(major.parse().ok()?, minor.parse().ok()?);
    let point = words.nth(1)?.to_owned();
    let mut words = file_system.split(' ').skip(1);
    let source = words.next()?.to_owned();
    // The flag of the file system, not of the mount: another mount may be writable.
    let read_only = words.next().is_some_and(|options| options.split(',').any(|option| option == "ro"));
    Some(MountEntry { rdev, point, source, read_only })
}

/// Files and block devices used as swap, as (dev, ino, rdev).
fn swaps() -> Vec<(u64, u64, u64)> {
    let table = fs::read("/proc/swaps").unwrap_or_default();
    let paths = table.split(|byte| *byte == b'\n').skip(1);
    let paths = paths.filter_map(|line| line.split(|byte| *byte == b' ' || *byte == b'\t').next());
    // As seen by this process and by process 1, whose mounts may differ.
    let seen = |path: &[u8]| [b"".as_slice(), b"/proc/1/root"].map(|root| [root, &unescape(path)].concat());
    paths
        .filter(|path| !path.is_empty())
        .flat_map(seen)
        .filter_map(|path| numbers(Path::new(std::ffi::OsStr::from_bytes(&path))))
        .collect()
}

/// Device, inode and, of a block device, its number.
fn numbers(path: &Path) -> Option<(u64, u64, u64)> {
    let found = fs::metadata(path).ok()?;
    let rdev = if found.file_type().is_block_device() { found.rdev() } else { 0 };
    Some((found.dev(), found.ino(), rdev))
}

/// `\040` is a space, and so on.
fn unescape(path: &[u8]) -> Vec<u8> {
    let (mut plain, mut rest) = (Vec::with_capacity(path.len()), path);
    while let [first, after @ ..] = rest {
        let code = after.get(..3).and_then(|digits| std::str::from_utf8(digits).ok());
        match code.filter(|_| *first == b'\\').and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) => {
                plain.push(byte);
                rest = &after[3..];
            }
            None => {
                plain.push(*first);
                rest = after;
            }
        }
    }
    plain
}

fn entries(directory: &Path) -> impl Iterator<Item = PathBuf> {
    fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.path())
}

fn last(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

fn text(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_default().trim().to_owned()
}

/// The name of a device of device mapper; empty: it is none.
fn mapper_name(device: &Path) -> String {
    text(&device.join("dm/name"))
}

/// The device number of what has this directory in sysfs.
fn number_of(device: &Path) -> Option<u64> {
    let numbers = text(&device.join("dev"));
    let (major, minor) = numbers.split_once(':')?;
    Some(rustix::fs::makedev(major.parse().ok()?, minor.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_mounts_with_odd_names() {
        let line = r"36 35 8:1 / /mnt/a\040b rw,relatime shared:1 master:2 - ext4 /dev/sda1 ro,errors=x";
        let mount = parse_mount(line).unwrap();
        assert_eq!((mount.rdev, mount.read_only), (rustix::fs::makedev(8, 1), true));
        assert_eq!((mount.point.as_str(), mount.source.as_str()), (r"/mnt/a\040b", "/dev/sda1"));
        let fuse = parse_mount("40 35 0:61 / /mnt rw - fuse.x /dev/sda1/../x rw,user_id=1").unwrap();
        assert!(!fuse.read_only);
        for bad in ["", "36", "36 35 8 / /mnt rw - ext4 x", "36 35 8:1 / /mnt rw", "1 2 3:x / / - a b c"] {
            assert!(parse_mount(bad).is_none(), "{bad}");
        }
    }

    #[test]
    fn unescapes_names_of_swap_files() {
        assert_eq!(unescape(br"/a\040b\011\"), b"/a b\t\\");
        assert_eq!(unescape(br"\9991\04"), br"\9991\04");
    }

    #[test]
    fn a_missing_file_has_no_users() {
        let nothing = Identity { dev: u64::MAX, ino: 1, rdev: 0, btime_ns: 0 };
        assert!(find(&nothing, &HashSet::new(), |_| true).is_empty());
        assert!(
            find(
                &Identity { rdev: rustix::fs::makedev(4000, 1), dev: 0, ..nothing },
                &HashSet::new(),
                |_| true
            )
            .is_empty()
        );
        assert_eq!(related(0), [0u64; 0]);
    }
}
