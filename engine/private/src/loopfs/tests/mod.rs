//! The directory of a pool that is not there, shown by the real kernel: its devices are host loop
//! devices, which are not bound and not harmed.

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
use crate::loops::{Errno, Partition};
use fake::{Fake, bound, host_device};

/// Says whether devices can be shown here, and why not.
fn able() -> bool {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: only root can make a FUSE file system of device nodes");
        return false;
    }
    if let Err(error) = File::options().read(true).write(true).open("/dev/fuse") {
        eprintln!("skipped: /dev/fuse: {error}");
        return false;
    }
    if host_device().is_none() {
        eprintln!("skipped: no host loop device stands for one of ours");
        return false;
    }
    true
}

/// A fake pool and its directory, reached through the descriptor of its mount.
struct Shown {
    fake: Arc<Fake>,
    directory: Directory,
    mount: OwnedFd,
    ended: Arc<AtomicU32>,
}

impl Shown {
    fn new() -> Shown {
        Shown::of(Fake::new(0))
    }

    fn of(fake: Arc<Fake>) -> Shown {
        let ended = Arc::new(AtomicU32::new(0));
        let counted = ended.clone();
        let (directory, mount) = Directory::open(fake.clone(), move || {
            counted.fetch_add(1, Ordering::Relaxed);
        })
        .unwrap();
        Shown { fake, directory, mount, ended }
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
    if !able() {
        return;
    }
    let shown = Shown::new();
    assert_eq!(shown.names(), ["loop-control"]);
    // Read-only, as losetup -f may have it.
    let file = File::open(shown.path("loop-control")).unwrap();
    assert_eq!(control(&file, 0x4C82, 0), Ok(0));
    assert!(shown.stat("loop0").unwrap().file_type().is_block_device(), "visible at once");
    shown.fake.change(0, |entry| entry.bound = Some(bound()));
    assert_eq!(control(&file, 0x4C82, 0), Ok(1));
    assert_eq!(control(&file, 0x4C80, 5), Ok(5));
    assert_eq!(control(&file, 0x4C80, 5), Err(libc::EEXIST));
    assert_eq!(control(&file, 0x4C80, u64::MAX), Err(libc::EINVAL), "-1, and this fake has no next");
    assert_eq!(control(&file, 0x4C80, 0xffff_ffff), Err(libc::EINVAL), "-1 of a 32-bit caller");
    assert_eq!(control(&file, 0x4C80, 1 << 32 | 6), Ok(6), "the driver takes 32 bits");
    assert_eq!(control(&file, 0x4C81, 0), Err(libc::EBUSY));
    assert_eq!(control(&file, 0x4C81, 3), Err(libc::ENODEV));
    assert_eq!(control(&file, 0x4C81, 5), Ok(0));
    assert_eq!(errno(shown.stat("loop5")), libc::ENOENT, "gone at once");
    assert_eq!(control(&file, 0x4C83, 0), Err(libc::ENOTTY), "FUSE's word for ENOSYS");
    assert_eq!(shown.names(), ["loop-control", "loop0", "loop1", "loop6"]);
    for number in [2, 3, 4, 5, 7] {
        assert_eq!(control(&file, 0x4C80, number), Ok(number as i32));
    }
    assert_eq!(control(&file, 0x4C80, 9), Err(libc::ENOSPC));
    let space = rustix::fs::statfs(shown.path("")).unwrap();
    assert_eq!((space.f_files, space.f_ffree), (8, 0));
    assert_eq!(errno(fs::read(shown.path("loop-control"))), libc::EINVAL);
}

#[test]
fn nodes_are_what_the_pool_says() {
    if !able() {
        return;
    }
    let shown = Shown::of(Fake::new(1234));
    shown.fake.make(0);
    let rdev = rustix::fs::makedev(259, 70_000);
    let parts = [1, 2, 70_000].map(|number| Partition { number, rdev, generation: 1, start: 8, size: 512 });
    shown.fake.change(0, |entry| entry.partitions = parts.to_vec());
    let root = shown.stat("").unwrap();
    assert_eq!((root.mode(), root.uid(), root.gid()), (0o040755, 1234, 1234));
    let node = shown.stat("loop0").unwrap();
    assert_eq!((node.mode(), node.uid(), node.gid()), (0o060660, 1234, 1234));
    assert_eq!((node.rdev(), node.len()), (shown.fake.entry(0).unwrap().rdev, 0));
    let part = shown.stat("loop0p2").unwrap();
    assert_eq!((part.mode(), part.rdev()), (0o060660, rdev));
    assert_eq!(shown.names(), ["loop-control", "loop0", "loop0p1", "loop0p2"]);
    let file = shown.stat("loop-control").unwrap();
    assert!(shown.directory.is_control(file.dev(), file.ino()));
    assert!(!shown.directory.is_control(node.dev(), node.ino()));
    assert_eq!(file.dev(), shown.directory.device());
    let opened = File::open(shown.path("loop0")).unwrap();
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
        assert_eq!(errno(shown.stat(name)), libc::ENOENT, "{name}");
    }
    let inodes: BTreeSet<u64> = ["", "loop-control", "loop0", "loop0p1", "loop0p2"]
        .map(|name| shown.stat(name).unwrap().ino())
        .into();
    assert_eq!(inodes.len(), 5);
}

/// The rule that keeps pools apart: device numbers are used again, inodes are not.
#[test]
fn an_inode_of_a_device_that_is_gone_opens_nothing() {
    if !able() {
        return;
    }
    let shown = Shown::new();
    shown.fake.make(0);
    let rdev = shown.fake.entry(0).unwrap().rdev;
    let parts = [Partition { number: 1, rdev, generation: 1, start: 8, size: 512 }];
    shown.fake.change(0, |entry| entry.partitions = parts.to_vec());
    let hold = |name: &str| {
        let file = File::options().read(true).custom_flags(libc::O_PATH).open(shown.path(name)).unwrap();
        assert!(reopen(&file).is_ok(), "{name}: while it is there");
        file
    };
    fn reopen(file: &File) -> io::Result<File> {
        File::open(format!("/proc/self/fd/{}", file.as_raw_fd()))
    }
    let (device, part) = (hold("loop0"), hold("loop0p1"));
    let before = shown.stat("loop0").unwrap().ino();
    // A partition table that was read anew: only the partition is another.
    shown.fake.change(0, |entry| entry.partitions[0].generation = 2);
    assert_eq!(errno(reopen(&part)), libc::ESTALE);
    assert!(reopen(&device).is_ok());
    let part = hold("loop0p1");
    // Taken away.
    shown.fake.remove(0).unwrap();
    assert_eq!(errno(reopen(&device)), libc::ESTALE);
    assert_eq!(errno(reopen(&part)), libc::ESTALE);
    // The same name and the same device number, but another device.
    shown.fake.make(0);
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
    assert!(File::open(shown.path("loop0")).is_ok());
    assert_ne!(shown.stat("loop0").unwrap().ino(), before);
    // Exchanged under its name, nobody having been told.
    let device = hold("loop0");
    shown.fake.entries.lock().unwrap().get_mut(&0).unwrap().generation += 100;
    assert_eq!(errno(reopen(&device)), libc::ESTALE);
    assert!(File::open(shown.path("loop0")).is_ok());
    // What it was is stale only until it is that again; names found in between are stale from then on.
    for looked in [false, true] {
        let (was, set) = (hold("loop0"), |to| {
            shown.fake.entries.lock().unwrap().get_mut(&0).unwrap().generation = to;
        });
        let generation = shown.fake.entry(0).unwrap().generation;
        set(generation + 1);
        let between = looked.then(|| hold("loop0"));
        assert_eq!(errno(reopen(&was)), libc::ESTALE);
        set(generation);
        assert!(reopen(&was).is_ok());
        assert!(between.is_none_or(|between| errno(reopen(&between)) == libc::ESTALE));
    }
    // Nothing is kept of those that are gone.
    for _ in 0..100 {
        shown.fake.remove(0).unwrap();
        shown.fake.make(0);
        shown.stat("loop0").unwrap();
    }
    assert_eq!(shown.names().len(), 2);
}

#[test]
fn owners_and_modes_belong_to_the_name() {
    if !able() {
        return;
    }
    let shown = Shown::new();
    shown.fake.make(0);
    let path = shown.path("loop0");
    fs::set_permissions(&path, PermissionsExt::from_mode(0o4604)).unwrap();
    std::os::unix::fs::chown(&path, Some(7), Some(8)).unwrap();
    let owned = |name: &str| {
        let stat = shown.stat(name).unwrap();
        (stat.mode() & 0o7777, stat.uid(), stat.gid())
    };
    assert_eq!(owned("loop0"), (0o604, 7, 8));
    shown.fake.change(0, |entry| entry.generation = 1000);
    assert_eq!(owned("loop0"), (0o604, 7, 8), "exchanged under its name");
    shown.fake.remove(0).unwrap();
    shown.fake.make(0);
    assert_eq!(owned("loop0"), (0o660, 0, 0), "another");
    fs::set_permissions(shown.path("loop-control"), PermissionsExt::from_mode(0o600)).unwrap();
    assert_eq!(owned("loop-control"), (0o600, 0, 0));
    File::options().write(true).truncate(true).open(shown.path("loop-control")).unwrap();
}

#[test]
fn names_can_be_removed_and_nothing_else() {
    if !able() {
        return;
    }
    let shown = Shown::new();
    shown.fake.make(0);
    shown.fake.make(1);
    shown.fake.change(1, |entry| entry.bound = Some(bound()));
    let parts = [Partition { number: 1, rdev: 0x700, generation: 1, start: 8, size: 512 }];
    shown.fake.change(1, |entry| entry.partitions = parts.to_vec());
    let path = |name| shown.path(name);
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
    assert_eq!(shown.names(), ["loop-control", "loop1", "loop1p1"]);
}

#[test]
fn a_slow_operation_leaves_the_other_thread() {
    if !able() {
        return;
    }
    let shown = Shown::new();
    shown.fake.make(7);
    shown.fake.slow.store(300, Ordering::Relaxed);
    let file = File::open(shown.path("loop-control")).unwrap();
    let adding = std::thread::spawn(move || control(&file, 0x4C80, 0));
    std::thread::sleep(Duration::from_millis(50));
    let started = Instant::now();
    shown.stat("loop7").unwrap();
    assert_eq!(shown.names(), ["loop-control", "loop7"]);
    assert!(started.elapsed() < Duration::from_millis(200), "{:?}", started.elapsed());
    assert_eq!(adding.join().unwrap(), Ok(0));
}

#[test]
fn thousands_of_names_are_listed_once_each() {
    if !able() {
        return;
    }
    let shown = Shown::new();
    for number in 0..3000 {
        shown.fake.make(number);
    }
    let mut list =
        fs::read_dir(shown.path("")).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<String> = list.by_ref().take(10).collect();
    // Places in the list do not move when others go.
    for number in 0..5 {
        shown.fake.remove(number).unwrap();
    }
    names.extend(list);
    assert!(names.len() >= 2996, "{}", names.len());
    assert_eq!(names.last().unwrap(), "loop2999");
    let unique: BTreeSet<&String> = names.iter().collect();
    assert_eq!(unique.len(), names.len());
}
