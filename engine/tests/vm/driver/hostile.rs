// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A hostile client: while some threads make calls, others rewrite the arguments, paths and
//! descriptors of these calls, and signals arrive all the time.
//!
//! The result of a call is unspecified, but each call returns. In the end, the client's devices
//! must work.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use rustix::fs::OFlags;

use super::abi::*;
use super::bed::{Bed, named, open};
use super::raw::{self, Memory};

/// Threads that make calls.
const CALLERS: u64 = 3;
/// A descriptor that is replaced all the time.
const SHIFTY: RawFd = 400;
/// Time between two signals.
const EVERY_US: i64 = 500;

/// Cheap commands.
const CHEAP: [u64; 10] = [
    GET_STATUS64,
    SET_STATUS64,
    CTL_GET_FREE,
    GET_STATUS,
    CHANGE_FD,
    SET_DIRECT_IO,
    0x4c0b,
    SET_STATUS,
    SET_CAPACITY,
    0x4cff,
];
/// Commands that add or remove disks.
const EXPENSIVE: [u64; 6] = [CONFIGURE, CLR_FD, CTL_ADD, SET_FD, SET_BLOCK_SIZE, CTL_REMOVE];
/// One of this many calls is expensive.
const EXPENSIVE_EVERY: u64 = 32;

/// Makes this number of intercepted calls.
pub(super) fn run(calls: u64) {
    let bed = Bed::new(false);
    let image = bed.file("image", 1 << 20);
    let device = bed.device_at(0);
    let (memory, paths) = (Memory::new(true), Memory::new(true));
    let (done, made) = (AtomicBool::new(false), AtomicU64::new(0));
    File::create("started").expect("the file `started`");
    raw::storm_of_signals(EVERY_US);
    let tallies = std::thread::scope(|scope| {
        let rewriters = [
            scope.spawn(|| rewrite_arguments(memory, &image, &done)),
            scope.spawn(|| rewrite_paths(paths, &done)),
            scope.spawn(|| rewrite_descriptors(&image, &done)),
        ];
        let callers = [(); CALLERS as usize].map(|()| {
            scope.spawn(|| {
                let mut tally = BTreeMap::<String, u64>::new();
                loop {
                    let number = made.fetch_add(1, Relaxed);
                    if number >= calls {
                        break tally;
                    }
                    *tally.entry(call(number, memory, paths)).or_default() += 1;
                }
            })
        });
        let tallies = callers.map(|caller| caller.join().expect("a caller ends"));
        done.store(true, Relaxed);
        for rewriter in rewriters {
            rewriter.join().expect("a rewriter ends");
        }
        tallies
    });
    raw::storm_of_signals(0);
    raw::close(SHIFTY);
    let mut all = BTreeMap::<String, u64>::new();
    tallies.into_iter().flatten().for_each(|(answer, times)| *all.entry(answer).or_default() += times);
    println!("{all:?}");
    drop(device);
    check_devices(&bed);
}

/// One call: a mount(2) now and then, or else an ioctl.
fn call(number: u64, memory: Memory, paths: Memory) -> String {
    if number % 97 == 96 {
        return format!("mount {}", named(raw::mount(paths)));
    }
    let command = match number % EXPENSIVE_EVERY {
        0 => EXPENSIVE[(number / EXPENSIVE_EVERY) as usize % EXPENSIVE.len()],
        _ => CHEAP[number as usize % CHEAP.len()],
    };
    let argument = match command {
        SET_FD | CHANGE_FD => SHIFTY as u64,
        CTL_ADD | CTL_REMOVE => number % 6,
        SET_DIRECT_IO => number & 1,
        SET_BLOCK_SIZE => 512 << (number % 5),
        _ => memory.address(),
    };
    named(raw::ioctl(SHIFTY, command, argument))
}

fn rewrite_arguments(memory: Memory, image: &File, done: &AtomicBool) {
    let info = Info { name: "first", ..Info::default() };
    let all = [
        (image.as_raw_fd(), 0, info),
        (SHIFTY, 4096, Info { flags: AUTOCLEAR | PARTSCAN, ..info }),
        (9999, 513, Info { offset: 1 << 63, ..info }),
        (image.as_raw_fd(), 0, Info { offset: 511, limit: 5000, flags: READ_ONLY, name: "second", ..info }),
        (-1, u32::MAX, Info { flags: u32::MAX, encrypt_type: 7, key_size: 99, ..info }),
    ];
    while !done.load(Relaxed) {
        for (fd, block_size, info) in &all {
            memory.put(&config(*fd, *block_size, info));
            memory.put(&info.bytes());
        }
    }
}

/// No path is a possible mount point.
fn rewrite_paths(paths: Memory, done: &AtomicBool) {
    let long = "x/".repeat(1000);
    while !done.load(Relaxed) {
        for path in ["/dev/loop0", "nothing/at/all", "/proc/self/fd/400", "", &long, "image/below"] {
            paths.put(path.as_bytes());
            paths.put(b"no");
        }
    }
}

fn rewrite_descriptors(image: &File, done: &AtomicBool) {
    // In place most of the time, so that some calls succeed.
    let device = open("/dev/loop0", OFlags::RDWR);
    let files = [
        open("/dev/loop0", OFlags::RDONLY),
        open("/dev/loop0", OFlags::PATH),
        open("/dev/loop-control", OFlags::RDWR),
        open("/dev/null", OFlags::RDWR),
        open(".", OFlags::RDONLY),
    ];
    while !done.load(Relaxed) {
        for file in &files {
            raw::dup2(device.as_raw_fd(), SHIFTY);
            std::thread::sleep(Duration::from_micros(500));
            raw::dup2(file.as_raw_fd(), SHIFTY);
            std::thread::yield_now();
        }
        raw::dup2(image.as_raw_fd(), SHIFTY);
        raw::close(SHIFTY);
    }
}

/// Checks that a device can be found, bound, read and unbound.
fn check_devices(bed: &Bed) {
    for number in 0..8 {
        let device = format!("/dev/loop{number}");
        if let Ok(fd) = super::bed::try_open(&device, OFlags::RDWR) {
            bed.finish(super::bed::Device { number, fd });
        }
    }
    let image = bed.file("after", 1 << 20);
    let device = bed.bound(&image, &Info::default());
    assert_eq!(super::life::head(&device, 512), "after");
    bed.finish(device);
}
