// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The daemon's own mount namespace, without mounts of its own disks.
//!
//! A daemon that shares a mount namespace with a mount of one of its disks can hang when it ends:
//! the last process of a namespace unmounts what is left in it, which needs the disks that this
//! very process served. Knows mountinfo and sysfs; knows nothing of devices or instances.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use rustix::mount::{MountPropagationFlags, UnmountFlags, mount_change, unmount};
use rustix::thread::{UnshareFlags, unshare_unsafe};

/// How deep device-mapper and md stacks are searched for a disk of ours.
const STACK_DEPTH_MAX: u32 = 4;

/// The mounts that the calling thread sees; can be polled for changes of them.
pub const MOUNTINFO: &str = "/proc/thread-self/mountinfo";

/// Moves the calling thread, and every thread it starts later, into a mount namespace of its own.
/// Unmounts elsewhere still reach it (so it does not keep anybody's disk busy), its own do not
/// leave it. Call it before the first thread is started.
pub fn enter_own() -> io::Result<()> {
    // SAFETY: without UnshareFlags::FILES no file descriptor table is unshared.
    unsafe { unshare_unsafe(UnshareFlags::NEWNS) }?;
    mount_change("/", MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC)?;
    Ok(())
}

/// Detaches every mount of a disk with such a name from this namespace. Answers where they were, and
/// what could not be detached. New ones come in by propagation, so call it again when
/// [`MOUNTINFO`] changes.
pub fn detach_mounts(named: Named<'_>) -> io::Result<(Vec<PathBuf>, Vec<String>)> {
    let mut detached = Vec::new();
    let mut failed = Vec::new();
    let table = fs::read_to_string(MOUNTINFO)?;
    // Youngest first: a mount on top of another hides the older one's path.
    for mount in table.lines().rev().filter_map(parse) {
        if !lies_on(&mount, named) {
            continue;
        }
        match unmount(&mount.target, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
            Ok(()) => detached.push(mount.target),
            // Already gone: an unmount elsewhere was faster.
            Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOENT) => {}
            Err(error) => failed.push(format!("{}: {error}", mount.target.display())),
        }
    }
    Ok((detached, failed))
}

/// Where file systems of this type and source are mounted, youngest first; nowhere if the table of
/// mounts cannot be read.
pub fn mounted(kind: &str, source: &str) -> Vec<PathBuf> {
    let table = fs::read_to_string(MOUNTINFO).unwrap_or_default();
    let ours = |mount: &Mount| mount.kind == kind && mount.source == Path::new(source);
    table.lines().rev().filter_map(parse).filter(ours).map(|mount| mount.target).collect()
}

/// Every place that something is mounted on, youngest first.
pub fn targets() -> Vec<PathBuf> {
    let table = fs::read_to_string(MOUNTINFO).unwrap_or_default();
    table.lines().rev().filter_map(parse).map(|mount| mount.target).collect()
}

/// What programs of FUSE have mounted for a user: where, and what they call its source; youngest first.
pub fn fuse_mounts(uid: u32) -> Vec<(PathBuf, PathBuf)> {
    let table = fs::read_to_string(MOUNTINFO).unwrap_or_default();
    let option = format!("user_id={uid}");
    let is_his = |line: &&str| {
        let options = line.rsplit(' ').next().unwrap_or_default();
        options.split(',').any(|one| one == option)
    };
    let mounts = table.lines().rev().filter(is_his).filter_map(parse);
    mounts.filter(|mount| mount.kind.starts_with("fuse")).map(|mount| (mount.target, mount.source)).collect()
}

/// Of which type the file system is that is mounted on `target`, if one is.
pub fn kind_at(target: &Path) -> Option<String> {
    let table = fs::read_to_string(MOUNTINFO).ok()?;
    table.lines().rev().filter_map(parse).find(|mount| mount.target == target).map(|mount| mount.kind)
}

/// The device number, as in mountinfo, of the file system that is mounted on `target`.
pub fn number_at(target: &Path) -> Option<String> {
    let table = fs::read_to_string(MOUNTINFO).ok()?;
    table.lines().rev().filter_map(parse).find(|mount| mount.target == target).map(|mount| mount.number)
}

/// Where file systems with this device number are mounted, youngest first.
pub fn mounted_of(device: u64) -> Vec<PathBuf> {
    let number = format!("{}:{}", rustix::fs::major(device), rustix::fs::minor(device));
    let table = fs::read_to_string(MOUNTINFO).unwrap_or_default();
    let ours = |mount: &Mount| mount.number == number;
    table.lines().rev().filter_map(parse).filter(ours).map(|mount| mount.target).collect()
}

/// Whether a file system with this device number is in a mountinfo, which may be long: a line at a time is kept.
pub fn is_mounted(table: impl io::BufRead, device: u64) -> bool {
    let number = format!("{}:{}", rustix::fs::major(device), rustix::fs::minor(device));
    let is_it = |line: &[u8]| line.split(|byte| *byte == b' ').nth(2) == Some(number.as_bytes());
    table.split(b'\n').map_while(io::Result::ok).any(|line| is_it(&line))
}

/// What interests us of a line of mountinfo(5).
#[derive(Debug, PartialEq, Eq)]
pub struct Mount {
    pub(super) id: u64,
    pub(super) number: String,
    /// Where it is mounted.
    pub target: PathBuf,
    /// It follows a mount of another peer group: it came from there, or is a copy of one that did.
    pub(super) slave: bool,
    pub(super) kind: String,
    pub(super) source: PathBuf,
}

/// Whether a file system is on a disk with such a name, a partition of it, or a stack upon it.
pub(super) fn lies_on(mount: &Mount, named: Named<'_>) -> bool {
    let device = fs::canonicalize(format!("/sys/dev/block/{}", mount.number));
    // File systems with a device number of their own (btrfs) are known by their source only.
    device.is_ok_and(|device| is_on(&device, STACK_DEPTH_MAX, named)) || node_lies_on(&mount.source, named)
}

/// The same for a node in /dev.
pub(super) fn node_lies_on(node: &Path, named: Named<'_>) -> bool {
    use std::os::linux::fs::MetadataExt;
    // Others may lie on a file system that does not answer.
    let Some(meta) = node.starts_with("/dev").then(|| fs::metadata(node).ok()).flatten() else {
        return false;
    };
    let (major, minor) = (rustix::fs::major(meta.st_rdev()), rustix::fs::minor(meta.st_rdev()));
    let device = fs::canonicalize(format!("/sys/dev/block/{major}:{minor}"));
    device.is_ok_and(|device| is_on(&device, STACK_DEPTH_MAX, named))
}

/// Whether a disk of this name counts.
pub type Named<'a> = &'a dyn Fn(&std::ffi::OsStr) -> bool;

pub(super) fn parse(line: &str) -> Option<Mount> {
    let (before, after) = line.split_once(" - ")?;
    let mut before = before.split(' ');
    let id = before.next()?.parse().ok()?;
    let number = before.nth(1)?;
    let target = before.nth(1)?;
    let slave = before.skip(1).any(|field| field.starts_with("master:"));
    let mut after = after.split(' ');
    let kind = after.next()?.to_owned();
    let source = after.next()?;
    let (number, target, source) = (number.to_owned(), unescape(target), unescape(source));
    Some(Mount { id, number, target, slave, kind, source })
}

/// The kernel writes space, tab, newline and backslash as `\` and three octal digits.
pub(super) fn unescape(text: &str) -> PathBuf {
    use std::os::unix::ffi::OsStringExt;
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let code = bytes.get(at + 1..at + 4).and_then(|digits| {
            let digits = std::str::from_utf8(digits).ok()?;
            u8::from_str_radix(digits, 8).ok()
        });
        match (bytes[at], code) {
            (b'\\', Some(code)) => {
                out.push(code);
                at += 4;
            }
            (byte, _) => {
                out.push(byte);
                at += 1;
            }
        }
    }
    std::ffi::OsString::from_vec(out).into()
}

/// Is this device in sysfs such a disk, a partition of one, or stacked on one?
fn is_on(device: &Path, depth: u32, named: Named<'_>) -> bool {
    if device.components().any(|part| named(part.as_os_str())) {
        return true;
    }
    if depth == 0 {
        return false;
    }
    let Ok(below) = fs::read_dir(device.join("slaves")) else {
        return false;
    };
    below
        .flatten()
        .any(|entry| fs::canonicalize(entry.path()).is_ok_and(|device| is_on(&device, depth - 1, named)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_mountinfo() {
        let line = r"94 31 259:2 / /mnt/my\040disk rw,relatime shared:5 - ext4 /dev/ublkb0 rw";
        let mount = parse(line).unwrap();
        assert_eq!((mount.id, mount.number.as_str(), mount.slave), (94, "259:2", false));
        assert_eq!(mount.target, Path::new("/mnt/my disk"));
        assert_eq!(mount.kind, "ext4");
        assert_eq!(mount.source, Path::new("/dev/ublkb0"));
        assert!(parse("9 3 7:0 / /mnt rw master:5 propagate_from:2 - ext4 /dev/loop0 rw").unwrap().slave);
        assert_eq!(parse("nonsense"), None);
        assert_eq!(parse(""), None);
    }

    #[test]
    fn escapes_that_are_none_stay() {
        assert_eq!(unescape(r"a\b"), Path::new(r"a\b"));
        assert_eq!(unescape(r"a\04"), Path::new(r"a\04"));
        assert_eq!(unescape(r"\134\011"), Path::new("\\\t"));
    }

    /// Only the thread that asks for it gets a namespace, so a thread of the test can try.
    #[test]
    fn mounts_of_named_disks_are_detached_and_others_stay() {
        let disk = Path::new("/dev/loop0");
        if !disk.exists() {
            eprintln!("skipped: no /dev/loop0 here");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let other = dir.path().join("other disk");
        fs::create_dir(&other).unwrap();
        let tried = std::thread::spawn(move || {
            if let Err(error) = enter_own() {
                eprintln!("skipped: no mount namespace of its own here: {error}");
                return;
            }
            let mount = |source: &Path, target: &Path| {
                let none = None::<&std::ffi::CStr>;
                rustix::mount::mount(source, target, "tmpfs", rustix::mount::MountFlags::empty(), none)
                    .unwrap();
            };
            let own = fs::read_link("/proc/thread-self/ns/mnt").unwrap();
            assert_ne!(own, fs::read_link("/proc/self/ns/mnt").unwrap());
            mount(&other, &other);
            // A file system that is known by its source, twice on top of each other.
            mount(disk, &other);
            mount(disk, &other);
            let named = |name: &std::ffi::OsStr| name == "loop0";
            let detach = || {
                let (detached, failed) = detach_mounts(&named).unwrap();
                (detached.into_iter().filter(|target| *target == other).count(), failed)
            };
            assert_eq!(detach(), (2, vec![]));
            let table = fs::read_to_string(MOUNTINFO).unwrap();
            assert!(table.contains(r"other\040disk"), "{table}");
            assert_eq!(detach(), (0, vec![]));
        });
        tried.join().unwrap();
    }
}
