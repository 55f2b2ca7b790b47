// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The directory of a fake pool, mounted by the real kernel. Its devices are unbound loop devices
//! of the host, which the tests only open.

mod fake;
mod lifetime;

use std::collections::BTreeSet;
use std::fs::{self, File, Metadata};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use super::*;
use crate::loops::{Errno, PartitionEntry};
use fake::{FakeDevices, bound, host_device};

/// Whether device nodes work here. Prints the reason if not.
fn can_mount() -> bool {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: only root can create a FUSE file system with device nodes");
        return false;
    }
    if let Err(error) = File::options().read(true).write(true).open("/dev/fuse") {
        eprintln!("skipped: /dev/fuse: {error}");
        return false;
    }
    if host_device().is_none() {
        eprintln!("skipped: the host has no unbound loop device");
        return false;
    }
    true
}

/// A fake pool and its directory, accessed through the descriptor of its mount.
struct TestMount {
    fake: Arc<FakeDevices>,
    directory: Directory,
    mount: OwnedFd,
    ended: Arc<AtomicU32>,
}

impl TestMount {
    fn new() -> TestMount {
        TestMount::of(FakeDevices::new(0))
    }

    fn of(fake: Arc<FakeDevices>) -> TestMount {
        let ended = Arc::new(AtomicU32::new(0));
        let counted = ended.clone();
        let (directory, mount) = Directory::open(fake.clone(), move || {
            counted.fetch_add(1, Ordering::Relaxed);
        })
        .unwrap();
        TestMount { fake, directory, mount, ended }
    }

    fn path(&self, name: &str) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}/{name}", self.mount.as_raw_fd()))
    }

    fn stat(&self, name: &str) -> io::Result<Metadata> {
        fs::symlink_metadata(self.path(name))
    }

    fn names(&self) -> Vec<String> {
        fs::read_dir(self.path(""))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect()
    }
}

fn control(file: &File, command: u32, argument: u64) -> std::result::Result<i32, i32> {
    crate::sys::testing::ioctl(file, command, argument).map_err(|error| error.raw_os_error().unwrap())
}

fn errno<T>(done: io::Result<T>) -> i32 {
    done.err().and_then(|error| error.raw_os_error()).unwrap_or(0)
}

#[test]
fn control_adds_removes_and_finds_devices() {
    if !can_mount() {
        return;
    }
    let test = TestMount::new();
    assert_eq!(test.names(), ["loop-control"]);
    // Read-only, as losetup -f may have it.
    let file = File::open(test.path("loop-control")).unwrap();
    assert_eq!(control(&file, 0x4C82, 0), Ok(0));
    assert!(test.stat("loop0").unwrap().file_type().is_block_device(), "visible at once");
    test.fake.change(0, |entry| entry.bound = Some(bound()));
    assert_eq!(control(&file, 0x4C82, 0), Ok(1));
    assert_eq!(control(&file, 0x4C80, 5), Ok(5));
    assert_eq!(control(&file, 0x4C80, 5), Err(libc::EEXIST));
    assert_eq!(control(&file, 0x4C80, u64::MAX), Err(libc::EINVAL), "-1, and this fake has no next");
    assert_eq!(control(&file, 0x4C80, 0xffff_ffff), Err(libc::EINVAL), "-1 of a 32-bit caller");
    assert_eq!(control(&file, 0x4C80, 1 << 32 | 6), Ok(6), "the driver takes 32 bits");
    assert_eq!(control(&file, 0x4C81, 0), Err(libc::EBUSY));
    assert_eq!(control(&file, 0x4C81, 3), Err(libc::ENODEV));
    assert_eq!(control(&file, 0x4C81, 5), Ok(0));
    assert_eq!(errno(test.stat("loop5")), libc::ENOENT, "gone at once");
    assert_eq!(control(&file, 0x4C83, 0), Err(libc::ENOTTY), "FUSE turns ENOSYS into it");
    assert_eq!(test.names(), ["loop-control", "loop0", "loop1", "loop6"]);
    for number in [2, 3, 4, 5, 7] {
        assert_eq!(control(&file, 0x4C80, number), Ok(number as i32));
    }
    assert_eq!(control(&file, 0x4C80, 9), Err(libc::ENOSPC));
    let space = rustix::fs::statfs(test.path("")).unwrap();
    assert_eq!((space.f_files, space.f_ffree), (8, 0));
    assert_eq!(errno(fs::read(test.path("loop-control"))), libc::EINVAL);
}

#[test]
fn nodes_have_the_attributes_of_the_pool() {
    if !can_mount() {
        return;
    }
    let test = TestMount::of(FakeDevices::new(1234));
    test.fake.make(0);
    let rdev = rustix::fs::makedev(259, 70_000);
    let parts =
        [1, 2, 70_000].map(|number| PartitionEntry { number, rdev, generation: 1, start: 8, size: 512 });
    test.fake.change(0, |entry| entry.partitions = parts.to_vec());
    let root = test.stat("").unwrap();
    assert_eq!((root.mode(), root.uid(), root.gid()), (0o040755, 1234, 1234));
    let node = test.stat("loop0").unwrap();
    assert_eq!((node.mode(), node.uid(), node.gid()), (0o060660, 1234, 1234));
    assert_eq!((node.rdev(), node.len()), (test.fake.entry(0).unwrap().rdev, 0));
    let part = test.stat("loop0p2").unwrap();
    assert_eq!((part.mode(), part.rdev()), (0o060660, rdev));
    assert_eq!(test.names(), ["loop-control", "loop0", "loop0p1", "loop0p2"]);
    let file = test.stat("loop-control").unwrap();
    assert!(test.directory.is_control(file.dev(), file.ino()));
    assert!(!test.directory.is_control(node.dev(), node.ino()));
    assert_eq!(file.dev(), test.directory.device());
    let opened = File::open(test.path("loop0")).unwrap();
    assert!(opened.metadata().unwrap().file_type().is_block_device(), "by the kernel, not by FUSE");
    for name in [
        "loop1",
        "loop00",
        "loop",
        "loop-1",
        "loop+1",
        "loop0p",
        "loop0p3",
        "loop01p1",
        "x",
        "loop4294967296",
    ] {
        assert_eq!(errno(test.stat(name)), libc::ENOENT, "{name}");
    }
    let inodes: BTreeSet<u64> =
        ["", "loop-control", "loop0", "loop0p1", "loop0p2"].map(|name| test.stat(name).unwrap().ino()).into();
    assert_eq!(inodes.len(), 5);
}

/// This isolates pools: device numbers are reused, inodes are not.
#[test]
fn refuses_inodes_of_removed_devices() {
    if !can_mount() {
        return;
    }
    let test = TestMount::new();
    test.fake.make(0);
    let rdev = test.fake.entry(0).unwrap().rdev;
    let parts = [PartitionEntry { number: 1, rdev, generation: 1, start: 8, size: 512 }];
    test.fake.change(0, |entry| entry.partitions = parts.to_vec());
    let hold = |name: &str| {
        let file = File::options().read(true).custom_flags(libc::O_PATH).open(test.path(name)).unwrap();
        assert!(reopen(&file).is_ok(), "{name}: while it is there");
        file
    };
    fn reopen(file: &File) -> io::Result<File> {
        File::open(format!("/proc/self/fd/{}", file.as_raw_fd()))
    }
    let (device, part) = (hold("loop0"), hold("loop0p1"));
    let before = test.stat("loop0").unwrap().ino();
    // After a rescan of the partition table only the partition has another inode.
    test.fake.change(0, |entry| entry.partitions[0].generation = 2);
    assert_eq!(errno(reopen(&part)), libc::ESTALE);
    assert!(reopen(&device).is_ok());
    let part = hold("loop0p1");
    // Removed.
    test.fake.remove(0).unwrap();
    assert_eq!(errno(reopen(&device)), libc::ESTALE);
    assert_eq!(errno(reopen(&part)), libc::ESTALE);
    // The same name and the same device number, but another device.
    test.fake.make(0);
    assert_eq!(errno(reopen(&device)), libc::ESTALE);
    assert_eq!(errno(reopen(&part)), libc::ESTALE);
    assert_eq!(errno(device.metadata()), libc::ESTALE);
    assert_eq!(
        errno(fs::set_permissions(
            format!("/proc/self/fd/{}", device.as_raw_fd()),
            PermissionsExt::from_mode(0o666)
        )),
        libc::ESTALE
    );
    assert!(File::open(test.path("loop0")).is_ok());
    assert_ne!(test.stat("loop0").unwrap().ino(), before);
    // Another disk under the same name, without a notification.
    let device = hold("loop0");
    test.fake.entries.lock().unwrap().get_mut(&0).unwrap().generation += 100;
    assert_eq!(errno(reopen(&device)), libc::ESTALE);
    assert!(File::open(test.path("loop0")).is_ok());
    // The old inode is valid again with the old disk; inodes of the disk in between are stale then.
    for looked in [false, true] {
        let (was, set) = (hold("loop0"), |to| {
            test.fake.entries.lock().unwrap().get_mut(&0).unwrap().generation = to;
        });
        let generation = test.fake.entry(0).unwrap().generation;
        set(generation + 1);
        let between = looked.then(|| hold("loop0"));
        assert_eq!(errno(reopen(&was)), libc::ESTALE);
        set(generation);
        assert!(reopen(&was).is_ok());
        assert!(between.is_none_or(|between| errno(reopen(&between)) == libc::ESTALE));
    }
    // Inodes of removed devices are freed.
    for _ in 0..100 {
        test.fake.remove(0).unwrap();
        test.fake.make(0);
        test.stat("loop0").unwrap();
    }
    assert_eq!(test.names().len(), 2);
}

#[test]
fn owners_and_modes_belong_to_the_name() {
    if !can_mount() {
        return;
    }
    let test = TestMount::new();
    test.fake.make(0);
    let path = test.path("loop0");
    fs::set_permissions(&path, PermissionsExt::from_mode(0o4604)).unwrap();
    std::os::unix::fs::chown(&path, Some(7), Some(8)).unwrap();
    let owned = |name: &str| {
        let stat = test.stat(name).unwrap();
        (stat.mode() & 0o7777, stat.uid(), stat.gid())
    };
    assert_eq!(owned("loop0"), (0o604, 7, 8));
    test.fake.change(0, |entry| entry.generation = 1000);
    assert_eq!(owned("loop0"), (0o604, 7, 8), "another disk under the same name");
    test.fake.remove(0).unwrap();
    test.fake.make(0);
    assert_eq!(owned("loop0"), (0o660, 0, 0), "another");
    fs::set_permissions(test.path("loop-control"), PermissionsExt::from_mode(0o600)).unwrap();
    assert_eq!(owned("loop-control"), (0o600, 0, 0));
    File::options().write(true).truncate(true).open(test.path("loop-control")).unwrap();
}

#[test]
fn allows_unlink_of_unbound_devices_only() {
    if !can_mount() {
        return;
    }
    let test = TestMount::new();
    test.fake.make(0);
    test.fake.make(1);
    test.fake.change(1, |entry| entry.bound = Some(bound()));
    let parts = [PartitionEntry { number: 1, rdev: 0x700, generation: 1, start: 8, size: 512 }];
    test.fake.change(1, |entry| entry.partitions = parts.to_vec());
    let path = |name| test.path(name);
    assert_eq!(errno(fs::remove_file(path("loop-control"))), libc::EPERM);
    assert_eq!(errno(fs::remove_file(path("loop1"))), libc::EBUSY);
    assert_eq!(errno(fs::remove_file(path("loop1p1"))), libc::EPERM);
    assert_eq!(errno(fs::remove_file(path("loop9"))), libc::ENOENT);
    assert_eq!(errno(fs::rename(path("loop0"), path("loop5"))), libc::EPERM);
    assert_eq!(errno(fs::rename(path("loop0"), path("loop1"))), libc::EPERM);
    assert_eq!(errno(fs::rename(path("loop-control"), path("x"))), libc::EPERM);
    assert_eq!(errno(fs::hard_link(path("loop0"), path("x"))), libc::EPERM);
    assert_eq!(errno(std::os::unix::fs::symlink("a", path("x"))), libc::EPERM);
    assert_eq!(errno(fs::create_dir(path("x"))), libc::EPERM);
    assert_eq!(errno(fs::write(path("x"), b"")), libc::EPERM);
    let made = rustix::fs::mknodat(
        rustix::fs::CWD,
        path("x"),
        rustix::fs::FileType::BlockDevice,
        0o600.into(),
        0x700,
    );
    assert_eq!(made, Err(Errno::PERM));
    fs::remove_file(path("loop0")).unwrap();
    assert_eq!(test.names(), ["loop-control", "loop1", "loop1p1"]);
}

#[test]
fn serves_requests_during_a_slow_operation() {
    if !can_mount() {
        return;
    }
    let test = TestMount::new();
    test.fake.make(7);
    test.fake.slow.store(300, Ordering::Relaxed);
    let file = File::open(test.path("loop-control")).unwrap();
    let adding = std::thread::spawn(move || control(&file, 0x4C80, 0));
    std::thread::sleep(Duration::from_millis(50));
    let started = Instant::now();
    test.stat("loop7").unwrap();
    assert_eq!(test.names(), ["loop-control", "loop7"]);
    assert!(started.elapsed() < Duration::from_millis(200), "{:?}", started.elapsed());
    assert_eq!(adding.join().unwrap(), Ok(0));
}

#[test]
fn lists_thousands_of_names_once_each() {
    if !can_mount() {
        return;
    }
    let test = TestMount::new();
    for number in 0..3000 {
        test.fake.make(number);
    }
    let mut list =
        fs::read_dir(test.path("")).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<String> = list.by_ref().take(10).collect();
    // Directory offsets do not depend on other entries.
    for number in 0..5 {
        test.fake.remove(number).unwrap();
    }
    names.extend(list);
    assert!(names.len() >= 2996, "{}", names.len());
    assert_eq!(names.last().unwrap(), "loop2999");
    let unique: BTreeSet<&String> = names.iter().collect();
    assert_eq!(unique.len(), names.len());
}
