// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Clients, each in a process of its own with the filter installed.
//!
//! They end with status 0 if all results are those of loop(4).

mod values;

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use libc::{EBADF, EBUSY, EEXIST, EFAULT, EINTR, EINVAL, EIO, ENOSYS, ENOTTY, ENXIO, EOVERFLOW, EPERM};
use loopengine_private::intercept::filter;

use values::{i386, nobody, nodes, others, values};

use crate::fake::OWN_MAJOR;
use crate::raw::{self, Done, ioctl};

const SET_FD: u64 = 0x4c00;
const CLR_FD: u64 = 0x4c01;
const SET_STATUS: u64 = 0x4c02;
const GET_STATUS: u64 = 0x4c03;
const SET_STATUS64: u64 = 0x4c04;
const GET_STATUS64: u64 = 0x4c05;
const CHANGE_FD: u64 = 0x4c06;
const SET_CAPACITY: u64 = 0x4c07;
const SET_DIRECT_IO: u64 = 0x4c08;
const SET_BLOCK_SIZE: u64 = 0x4c09;
const CONFIGURE: u64 = 0x4c0a;
const CTL_ADD: u64 = 0x4c80;
const CTL_REMOVE: u64 = 0x4c81;
const CTL_GET_FREE: u64 = 0x4c82;

/// Runs the client of this name.
pub fn run(role: &str) {
    if role == "cost" {
        return cost();
    }
    if ["names", "devtmpfs"].contains(&role) {
        return crate::names::run(role);
    }
    raw::install_and_send(&filter::program(filter::FilterOptions::default()));
    match role {
        "values" => values(),
        "i386" => i386(),
        "nobody" => nobody(),
        "others" => others(),
        "nodes" => nodes(),
        "blocked" => _ = ioctl(open("loop0").as_raw_fd(), SET_CAPACITY, 0),
        "rewriter" => rewriter(),
        "signals" => signals(),
        "swapper" => swapper(),
        "replaced" => replaced(),
        "threads" => threads(),
        "overdue" => overdue(),
        "panic" => panic_in_an_operation(),
        "children" => children(),
        "stopped" => stopped(),
        "crowd" => crowd(),
        _ => panic!("no client {role}"),
    }
}

fn open(name: &str) -> OwnedFd {
    File::options().read(true).write(true).open(name).unwrap().into()
}

fn open_flags(name: &str, flags: i32) -> OwnedFd {
    File::options().read(true).custom_flags(flags).open(name).unwrap().into()
}

fn address(bytes: &[u8]) -> u64 {
    bytes.as_ptr().addr() as u64
}

/// `struct loop_config` or, from byte 8 on, `struct loop_info64`.
fn config(fd: RawFd, offset: u64, name: u8) -> [u8; 304] {
    let mut bytes = [0; 304];
    bytes[..4].copy_from_slice(&fd.to_ne_bytes());
    bytes[4..8].copy_from_slice(&4096_u32.to_ne_bytes());
    bytes[8 + 24..8 + 32].copy_from_slice(&offset.to_ne_bytes());
    bytes[8 + 56..8 + 120].fill(name);
    bytes
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_ne_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// Another thread changes the argument all the time: each call uses one copy.
fn rewriter() {
    let (device, image) = (open("loop0"), open("image"));
    let memory = raw::low_memory(1);
    let image_fd = image.as_raw_fd();
    raw::poke(memory, &config(image_fd, 0, 1));
    let done = AtomicBool::new(false);
    let (mut bound, mut refused) = (0, 0);
    let address = memory.addr();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let memory = std::ptr::with_exposed_provenance_mut::<u8>(address);
            while !done.load(Relaxed) {
                for (fd, offset, name) in [(999, 0, 2), (image_fd, 1 << 63, 3), (image_fd, 512, 4)] {
                    raw::poke(memory, &config(fd, offset, name));
                }
            }
        });
        let until = Instant::now() + Duration::from_secs(2);
        while Instant::now() < until {
            match ioctl(device.as_raw_fd(), CONFIGURE, address as u64) {
                Ok(0) => {
                    bound += 1;
                    assert_eq!(ioctl(device.as_raw_fd(), CLR_FD, 0), Ok(0));
                }
                Err(EBADF | EOVERFLOW) => refused += 1,
                other => panic!("{other:?}"),
            }
        }
        done.store(true, Relaxed);
    });
    println!("arguments rewritten: {bound} bound, {refused} refused");
    assert!(bound > 0 && refused > 0);
}

/// Signals do not interrupt a received call, and interrupt others cleanly.
fn signals() {
    let device = open("loop0");
    raw::storm_of_signals(50);
    let (mut served, mut interrupted) = (0, 0);
    while served < 20_000 {
        match ioctl(device.as_raw_fd(), SET_CAPACITY, 0) {
            Ok(0) => served += 1,
            Err(EINTR) => interrupted += 1,
            other => panic!("{other:?}"),
        }
    }
    println!("storm of signals: {served} served, {interrupted} interrupted before they were received");
}

/// Another thread replaces the descriptor all the time: no call succeeds that each of the files
/// forbids.
fn swapper() {
    const FD: RawFd = 77;
    let (reads, other, path_only) =
        (open_flags("loop0", 0), open("image"), open_flags("loop1", libc::O_PATH));
    raw::become_nobody();
    raw::dup2(&reads, FD);
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Relaxed) {
                for file in [&other, &path_only, &reads] {
                    raw::dup2(file, FD);
                }
            }
        });
        let until = Instant::now() + Duration::from_secs(3);
        let mut seen = std::collections::BTreeMap::<Done, u32>::new();
        while Instant::now() < until {
            let capacity = ioctl(FD, SET_CAPACITY, 0);
            assert!(matches!(capacity, Err(EPERM | EBADF | ENOTTY)), "{capacity:?}");
            *seen.entry(capacity).or_default() += 1;
            let clear = ioctl(FD, CLR_FD, 0);
            assert!(matches!(clear, Err(ENXIO | EBADF | ENOTTY)), "{clear:?}");
        }
        done.store(true, Relaxed);
        println!("descriptors swapped: {seen:?}");
        assert!(seen.len() == 3, "{seen:?}");
    });
}

fn replaced() {
    let spare = std::fs::metadata("spare").unwrap().ino();
    let inode = |fd: &OwnedFd| rustix::fs::fstat(fd).unwrap().st_ino;
    let cloexec = |fd: &OwnedFd| rustix::io::fcntl_getfd(fd).unwrap().contains(rustix::io::FdFlags::CLOEXEC);
    for keep in [true, false] {
        let device = open("loop0");
        let flags = if keep { rustix::io::FdFlags::CLOEXEC } else { rustix::io::FdFlags::empty() };
        rustix::io::fcntl_setfd(&device, flags).unwrap();
        let duplicate = device.try_clone().unwrap();
        assert_eq!(ioctl(device.as_raw_fd(), SET_BLOCK_SIZE, 4096), Ok(0));
        assert_eq!((inode(&device), cloexec(&device)), (spare, keep));
        assert_ne!(inode(&duplicate), spare);
    }
}

/// A second thread, with a descriptor table of its own.
fn threads() {
    let main_device = open("image");
    std::thread::spawn(move || {
        raw::unshare_files();
        let device = open("loop0");
        raw::dup2(&device, main_device.as_raw_fd());
        assert_eq!(ioctl(main_device.as_raw_fd(), CLR_FD, 0), Err(ENXIO));
        let bytes = [0_u8; 232];
        let image = open("image");
        assert_eq!(ioctl(main_device.as_raw_fd(), SET_FD, image.as_raw_fd() as u64), Ok(0));
        assert_eq!(ioctl(main_device.as_raw_fd(), GET_STATUS64, address(&bytes)), Ok(0));
        assert_eq!(u64_at(&bytes, 8), File::from(image).metadata().unwrap().ino());
    })
    .join()
    .unwrap();
}

fn overdue() {
    let device = open("loop0");
    let started = Instant::now();
    assert_eq!(ioctl(device.as_raw_fd(), SET_CAPACITY, 0), Err(EIO));
    assert!(started.elapsed() < Duration::from_secs(10));
    // The other threads still serve.
    assert_eq!(ioctl(device.as_raw_fd(), CLR_FD, 0), Err(ENXIO));
}

fn panic_in_an_operation() {
    let control = open("control");
    for _ in 0..10 {
        assert_eq!(ioctl(control.as_raw_fd(), CTL_ADD, crate::fake::PANICS as u64), Err(EIO));
        assert_eq!(ioctl(control.as_raw_fd(), CTL_GET_FREE, 0), Ok(7));
    }
}

/// A child outlives the process that installed the filter, and is served.
fn children() {
    let device = open("loop0");
    if raw::fork() == 0 {
        std::thread::sleep(Duration::from_millis(300));
        assert_eq!(ioctl(device.as_raw_fd(), CLR_FD, 0), Err(ENXIO));
    }
}

/// Calls until the supervisor has stopped.
fn stopped() {
    let device = open("loop0");
    assert_eq!(ioctl(device.as_raw_fd(), SET_CAPACITY, 0), Ok(0));
    let until = Instant::now() + Duration::from_secs(10);
    while ioctl(device.as_raw_fd(), CLR_FD, 0) != Err(ENOSYS) {
        assert!(Instant::now() < until);
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Many concurrent calls.
fn crowd() {
    std::thread::scope(|scope| {
        for _ in 0..32 {
            scope.spawn(|| {
                let device = open("loop1");
                for _ in 0..50 {
                    assert_eq!(ioctl(device.as_raw_fd(), SET_CAPACITY, 0), Ok(0));
                }
            });
        }
    });
}

fn cost() {
    let (device, null) = (open("loop0"), File::open("/dev/null").unwrap());
    let each = |what: &str, rounds: u32, call: &dyn Fn()| {
        let best = (0..5).map(|_| {
            let started = Instant::now();
            (0..rounds).for_each(|_| call());
            started.elapsed().as_nanos() / u128::from(rounds)
        });
        println!("{what:40} {:7} ns", best.min().unwrap());
    };
    let unrelated = |when: &str| {
        each(&format!("getppid, {when}"), 200_000, &|| _ = rustix::process::getppid());
        let ioctl_of_others = || _ = ioctl(null.as_raw_fd(), 0x5401, 0);
        each(&format!("another ioctl, {when}"), 200_000, &ioctl_of_others);
    };
    unrelated("no filter");
    raw::install_and_send(&filter::program(filter::FilterOptions { mounts: true, ..Default::default() }));
    unrelated("filter");
    let bytes = [0_u8; 232];
    each("passed on", 5_000, &|| _ = ioctl(null.as_raw_fd(), GET_STATUS64, 0));
    each("LOOP_CLR_FD of an unbound device", 5_000, &|| {
        assert_eq!(ioctl(device.as_raw_fd(), CLR_FD, 0), Err(ENXIO));
    });
    assert_eq!(ioctl(device.as_raw_fd(), SET_FD, open("image").as_raw_fd() as u64), Ok(0));
    each("LOOP_GET_STATUS64", 5_000, &|| {
        assert_eq!(ioctl(device.as_raw_fd(), GET_STATUS64, address(&bytes)), Ok(0));
    });
}
