// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Which loopN the system's own tables name, and mounts that came here from elsewhere under such a name.
//!
//! umount(8), mkfs and lsblk find a device in the table of mounts by its name alone. Where loopN is
//! another device than the one that the table means, they take the wrong one. Knows mountinfo, swaps and
//! udev's links; knows no pool.

use std::collections::BTreeSet;
use std::fs;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{AtFlags, Mode, OFlags, StatxFlags};
use rustix::io::Errno;
use rustix::mount::{UnmountFlags, unmount};

use super::mntns::{MOUNTINFO, Mount, parse, unescape};

const SWAPS: &str = "/proc/swaps";
/// udev's links by label, by UUID and so on.
const LINKS: &str = "/dev/disk";
/// Of these every disk has one, also a loop device without a file, and nobody looks for a file system by it.
const BY_DISKSEQ: &str = "by-diskseq";
/// Links that are looked at; no machine has as many.
const LINKS_MAX: usize = 8192;

/// All numbers that mounts, swap areas and udev's links name at this moment, as the calling thread sees
/// them. A table that cannot be read names none.
pub fn named() -> BTreeSet<u32> {
    let mounts = fs::read_to_string(MOUNTINFO).unwrap_or_default();
    let swaps = fs::read_to_string(SWAPS).unwrap_or_default();
    in_tables(&mounts, &swaps).chain(linked()).collect()
}

fn in_tables<'a>(mounts: &'a str, swaps: &'a str) -> impl Iterator<Item = u32> + 'a {
    let mounts = mounts.lines().filter_map(parse).filter_map(|mount| number(&mount.source));
    let swaps = swaps.lines().filter_map(|line| line.split_ascii_whitespace().next());
    mounts.chain(swaps.filter_map(|name| number(&unescape(name))))
}

fn linked() -> impl Iterator<Item = u32> {
    let entries = |dir: PathBuf| fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path());
    let directories = entries(LINKS.into()).filter(|directory| !directory.ends_with(BY_DISKSEQ));
    let links = directories.flat_map(entries).take(LINKS_MAX);
    links.filter_map(|link| of_name(fs::read_link(link).ok()?.file_name()?.to_str()?))
}

/// N of a device or partition in /dev that is called loopN or loopNpM.
fn number(path: &Path) -> Option<u32> {
    path.starts_with("/dev").then(|| of_name(path.file_name()?.to_str()?))?
}

fn of_name(name: &str) -> Option<u32> {
    let rest = name.strip_prefix("loop")?;
    let (number, part) = rest.split_once('p').unwrap_or((rest, "1"));
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    (digits(number) && digits(part)).then(|| number.parse().ok())?
}

/// Detaches each mount that comes into this mount namespace from another and whose name is that of a loopN
/// not in `known`. Answers only if the table of mounts cannot be watched.
pub fn keep_out(known: &BTreeSet<u32>) -> rustix::io::Result<()> {
    let watched = rustix::fs::open(MOUNTINFO, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    loop {
        let table = fs::read_to_string(MOUNTINFO).unwrap_or_default();
        let came = |mount: &Mount| mount.slave && number(&mount.source).is_some_and(|n| !known.contains(&n));
        // Youngest first: a mount on top of another hides the older one's path.
        for mount in table.lines().rev().filter_map(parse).filter(came) {
            // One that is gone already, or covered by another, stays as it is.
            let _ = detach(&mount);
        }
        match poll(&mut [PollFd::new(&watched, PollFlags::PRI)], None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error),
        }
    }
}

/// Takes exactly this mount off, whatever else is mounted at its place meanwhile.
fn detach(mount: &Mount) -> rustix::io::Result<()> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let root = rustix::fs::open(&mount.target, flags, Mode::empty())?;
    let asked = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    if rustix::fs::statx(&root, "", asked, StatxFlags::MNT_ID)?.stx_mnt_id != mount.id {
        return Err(Errno::NOENT);
    }
    unmount(format!("/proc/thread-self/fd/{}", root.as_raw_fd()), UnmountFlags::DETACH)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::{mntns, userns};

    #[test]
    fn names_of_loop_devices() {
        for (path, n) in [("/dev/loop0", 0), ("/dev/loop12p3", 12), ("/dev/loopfs/loop7", 7)] {
            assert_eq!(number(Path::new(path)), Some(n), "{path}");
        }
        for path in [
            "/dev/loop",
            "/dev/loop-control",
            "/dev/loopback1",
            "/dev/loop1p",
            "/mnt/loop1",
            "loop1",
            "/dev/loopp1",
        ] {
            assert_eq!(number(Path::new(path)), None, "{path}");
        }
    }

    #[test]
    fn what_the_tables_name() {
        let mounts = "94 31 7:3 / /snap/core/1 ro,nodev shared:5 - squashfs /dev/loop3 ro\n\
                      95 31 0:44 / /mnt rw - btrfs /dev/loop11p2 rw\n96 31 8:1 / /loop5 rw - ext4 /dev/sda1 rw\n";
        let swaps = "Filename\t\tType\t\tSize\tUsed\tPriority\n/dev/loop4                              \
                     partition\t1020\t0\t-2\n/loop9 file 1 0 -3\n";
        assert_eq!(in_tables(mounts, swaps).collect::<Vec<_>>(), [3, 11, 4]);
    }

    /// In a mount namespace below another, as a thread of the test can have them.
    #[test]
    fn mounts_from_elsewhere_are_kept_out_and_own_ones_stay() {
        use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
        use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
        use std::os::fd::AsFd;
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let test = || {
            if mntns::enter_own().is_err() {
                eprintln!("skipped: no mount namespace of its own here");
                return;
            }
            let make = |source: &str, at: PathBuf| {
                mount(source, at, "tmpfs", MountFlags::empty(), None::<&std::ffi::CStr>).unwrap();
            };
            let open = || fs::File::open("/proc/thread-self/ns/mnt").unwrap();
            make("none", dir.path().to_owned());
            for name in ["known", "new", "own"] {
                fs::create_dir(path(name)).unwrap();
            }
            mount_change(dir.path(), MountPropagationFlags::SHARED).unwrap();
            let upper = open();
            mntns::enter_own().unwrap();
            let lower = open();
            make("/dev/loop1", path("own"));
            let known = BTreeSet::from([0]);
            // It ends with the test's process: nothing is mounted any more by then.
            std::thread::spawn({
                let lower = lower.try_clone().unwrap();
                move || {
                    own_root();
                    move_into_link_name_space(lower.as_fd(), Some(LinkNameSpaceType::Mount)).unwrap();
                    keep_out(&known)
                }
            });
            own_root();
            move_into_link_name_space(upper.as_fd(), Some(LinkNameSpaceType::Mount)).unwrap();
            make("/dev/loop0", path("known"));
            make("/dev/loop1", path("new"));
            move_into_link_name_space(lower.as_fd(), Some(LinkNameSpaceType::Mount)).unwrap();
            let mounted = || mntns::mounted("tmpfs", "/dev/loop1");
            let until = std::time::Instant::now() + std::time::Duration::from_secs(10);
            while mounted() != [path("own")] && std::time::Instant::now() < until {
                std::thread::sleep(std::time::Duration::from_millis(2));
            }
            assert_eq!(mounted(), [path("own")]);
            assert_eq!(mntns::mounted("tmpfs", "/dev/loop0"), [path("known")]);
        };
        std::thread::scope(|scope| scope.spawn(test).join()).unwrap();
    }

    fn own_root() {
        userns::own_directories().unwrap();
    }
}
