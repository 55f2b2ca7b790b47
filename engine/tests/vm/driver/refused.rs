// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Steps that are refused: wrong files, values, addresses and permissions; and the order of the
//! checks.

use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use rustix::fs::OFlags;
use rustix::thread::{CapabilitySet, capabilities, set_capabilities};

use super::abi::*;
use super::bed::{Bed, Device, open};
use super::raw::{Memory, PAGE};

pub(super) fn steps(bed: &Bed) {
    files(bed);
    values(bed);
    order(bed);
    addresses(bed);
    rights(bed);
}

/// Files that are not regular files, or that are opened in unusual modes.
fn unusual(bed: &Bed) -> Vec<(&'static str, OwnedFd)> {
    let image = bed.file("image", 1 << 20);
    let path = |name: &str, flags| open(name, flags);
    let (pipe_out, pipe_in) = std::io::pipe().expect("a pipe");
    let (socket, _) = std::os::unix::net::UnixStream::pair().expect("sockets");
    let event = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).expect("an eventfd");
    let memory = rustix::fs::memfd_create("memory", rustix::fs::MemfdFlags::CLOEXEC).expect("memory");
    rustix::fs::ftruncate(&memory, 1 << 20).expect("size of memory");
    drop(image);
    vec![
        ("a path", path("image", OFlags::PATH)),
        ("a file to write", path("image", OFlags::WRONLY)),
        ("a file to append", path("image", OFlags::RDWR | OFlags::APPEND)),
        ("a directory", path(".", OFlags::RDONLY)),
        ("/dev/null", path("/dev/null", OFlags::RDWR)),
        ("/dev/zero", path("/dev/zero", OFlags::RDWR)),
        ("loop-control", path("/dev/loop-control", OFlags::RDWR)),
        ("a pipe's end to read", pipe_out.into()),
        ("a pipe's end to write", pipe_in.into()),
        ("a socket", socket.into()),
        ("an eventfd", event),
        ("a file of /proc", path("/proc/version", OFlags::RDONLY)),
        ("a file in memory", memory),
    ]
}

fn files(bed: &Bed) {
    bed.theme("files");
    let unusual = unusual(bed);
    let mut all: Vec<(&str, RawFd)> =
        vec![("none", 9999), ("-1", -1), ("the lowest int", i32::MIN), ("the highest int", i32::MAX)];
    all.extend(unusual.iter().map(|(name, fd)| (*name, fd.as_raw_fd())));
    let image = bed.file("image", 1 << 20);
    let bound = bed.bound(&image, &Info::default());
    let read_only = bed.bound(&image, &Info { flags: READ_ONLY, ..Info::default() });
    for (name, fd) in all {
        let argument = u64::from(fd.cast_unsigned());
        let device = bed.device();
        bed.step(format!("SET_FD, {name}"), bed.ioctl(&device, SET_FD, argument));
        bed.say(format!("SET_FD, {name}, size"), bed.shape(&device));
        bed.finish(device);
        let device = bed.device();
        bed.step(format!("CONFIGURE, {name}"), bed.configure_of(&device, fd, 0, &Info::default()));
        bed.finish(device);
        let device = bed.device();
        bed.step(format!("CHANGE_FD of an unbound one, {name}"), bed.ioctl(&device, CHANGE_FD, argument));
        bed.finish(device);
        bed.step(format!("SET_FD of a bound one, {name}"), bed.ioctl(&bound, SET_FD, argument));
        bed.step(
            format!("CONFIGURE of a bound one, {name}"),
            bed.configure_of(&bound, fd, 0, &Info::default()),
        );
        bed.step(format!("CHANGE_FD of a bound one, {name}"), bed.ioctl(&bound, CHANGE_FD, argument));
        if name != "a file in memory" && name != "a file to append" && name != "a file to write" {
            bed.step(format!("CHANGE_FD, {name}"), bed.ioctl(&read_only, CHANGE_FD, argument));
        }
    }
    bed.finish(read_only);
    bed.finish(bound);
    let device = bed.device();
    let own = device.fd.as_raw_fd();
    bed.step("SET_FD, itself", bed.ioctl(&device, SET_FD, own as u64));
    bed.step("CONFIGURE, itself", bed.configure_of(&device, own, 0, &Info::default()));
    bed.step("a descriptor of which the high half is cut off", bed.ioctl(&device, SET_FD, 1 << 40 | 9999));
    bed.finish(device);
}

/// One value at a time.
fn values(bed: &Bed) {
    bed.theme("values");
    let image = bed.file("image", 1 << 20);
    let info = Info::default();
    let attempt = |name: String, block_size: u32, info: Info| {
        let device = bed.device();
        let done = bed.configure(&device, &image, block_size, &info);
        bed.step(format!("CONFIGURE, {name}"), done);
        if done.is_ok() {
            bed.show(format!("CONFIGURE, {name}"), &device, Some(&image));
        }
        bed.finish(device);
    };
    for bit in 0..32 {
        attempt(format!("flag {bit}"), 0, Info { flags: 1 << bit, ..info });
    }
    for flags in 2..31 {
        if flags & !(READ_ONLY | AUTOCLEAR | PARTSCAN | DIRECT_IO) == 0 && !u32::is_power_of_two(flags) {
            attempt(format!("flags {flags}"), 0, Info { flags, ..info });
        }
    }
    for block_size in BLOCK_SIZES {
        attempt(format!("block size {block_size}"), block_size, info);
    }
    for encrypt_type in [1, 2, 18, u32::MAX] {
        attempt(format!("encryption {encrypt_type}"), 0, Info { encrypt_type, ..info });
    }
    for key_size in [1, 32, 33, u32::MAX] {
        attempt(format!("key size {key_size}"), 0, Info { key_size, ..info });
    }
    let top = i64::MAX as u64;
    for (offset, limit) in [
        (top - 1, 0),
        (top, 0),
        (top + 1, 0),
        (u64::MAX, 0),
        (0, top - 1),
        (0, top),
        (0, top + 1),
        (0, u64::MAX),
        (top, top),
        (512, top),
        (top - 512, 1024),
        (1 << 20, 0),
        ((1 << 20) + 1, 0),
        ((1 << 20) - 1, 0),
        ((1 << 20) - 512, 0),
        (1, 0),
        (511, 0),
        (513, 1000),
        (512, 0),
        (4096, 1),
        (0, 511),
        (0, 512),
        (0, 513),
        (0, 1 << 30),
        (512, 1 << 20),
    ] {
        attempt(format!("offset {offset}, limit {limit}"), 0, Info { offset, limit, ..info });
    }
}

/// Block sizes to try.
pub(super) const BLOCK_SIZES: [u32; 16] =
    [0, 1, 256, 511, 512, 513, 1000, 1024, 1536, 2048, 4096, 8192, 32768, 65536, 131_072, u32::MAX];

/// Two faults at once: which one is reported?
fn order(bed: &Bed) {
    bed.theme("order");
    let image = bed.file("image", 1 << 20);
    let directory = open(".", OFlags::RDONLY);
    type With = (RawFd, u32, Info);
    type Spoil = fn(&mut With, RawFd);
    let good: With = (image.as_raw_fd(), 0, Info::default());
    let faults: [(&str, Spoil); 8] = [
        ("no file", |with, _| with.0 = 9999),
        ("a directory", |with, directory| with.0 = directory),
        ("block size", |with, _| with.1 = 513),
        ("flag", |with, _| with.2.flags = 2),
        ("encryption", |with, _| with.2.encrypt_type = 1),
        ("key size", |with, _| with.2.key_size = 33),
        ("offset", |with, _| with.2.offset = 1 << 63),
        ("limit", |with, _| with.2.limit = 1 << 63),
    ];
    let unbound = bed.device_at(7);
    let bound = bed.bound(&image, &Info::default());
    for (at, (one, spoil)) in faults.iter().enumerate() {
        for (other, spoil_too) in &faults[at..] {
            let mut with = good;
            spoil_too(&mut with, directory.as_raw_fd());
            spoil(&mut with, directory.as_raw_fd());
            let (fd, block_size, info) = with;
            let name = if one == other { (*one).to_owned() } else { format!("{one} and {other}") };
            bed.step(&name, bed.configure_of(&unbound, fd, block_size, &info));
            bed.step(format!("{name}, bound"), bed.configure_of(&bound, fd, block_size, &info));
            if fd == good.0 && block_size == 0 {
                bed.step(format!("SET_STATUS64, {name}, unbound"), bed.set_status(&unbound, &info));
                bed.step(format!("SET_STATUS64, {name}"), bed.set_status(&bound, &info));
            }
        }
    }
    bed.show("the bound one is unchanged", &bound, Some(&image));
    bed.finish(bound);
    for (name, command, argument) in [
        ("CLR_FD", CLR_FD, 0),
        ("SET_CAPACITY", SET_CAPACITY, 0),
        ("SET_DIRECT_IO 0", SET_DIRECT_IO, 0),
        ("SET_DIRECT_IO 1", SET_DIRECT_IO, 1),
        ("SET_BLOCK_SIZE 512", SET_BLOCK_SIZE, 512),
        ("SET_BLOCK_SIZE 513", SET_BLOCK_SIZE, 513),
        ("SET_BLOCK_SIZE 0", SET_BLOCK_SIZE, 0),
        ("SET_BLOCK_SIZE 4096", SET_BLOCK_SIZE, 4096),
        ("CHANGE_FD", CHANGE_FD, image.as_raw_fd() as u64),
    ] {
        bed.step(format!("{name}, unbound"), bed.ioctl(&unbound, command, argument));
    }
    bed.finish(unbound);
}

/// Invalid addresses, and addresses of too little memory.
fn addresses(bed: &Bed) {
    bed.theme("addresses");
    let image = bed.file("image", 1 << 20);
    let edge = Memory::new(true).address() + PAGE as u64;
    let constant = Memory::new(false).address();
    let mut all = vec![
        ("NULL", 0),
        ("8", 8),
        ("half of it", edge - 100),
        ("none of it", edge),
        ("to read only", constant),
        ("the top of 32 bits", 0xffff_fff0),
    ];
    if !bed.compat {
        all.extend([
            ("the kernel's", 0xffff_8000_0000_0000),
            ("the top", u64::MAX - 8),
            ("no address", 1 << 63),
        ]);
    }
    let (unbound, bound) =
        (bed.device_at(7), bed.bound(&image, &Info { offset: 1 << 40, ..Info::default() }));
    for (name, address) in all {
        for (of, device) in [("unbound", &unbound), ("bound", &bound)] {
            for (command, number) in [
                ("SET_STATUS", SET_STATUS),
                ("GET_STATUS", GET_STATUS),
                ("SET_STATUS64", SET_STATUS64),
                ("GET_STATUS64", GET_STATUS64),
                ("CONFIGURE", CONFIGURE),
            ] {
                // Resets offset and limit, which the read-only page of zeroes may have set.
                let _ = bed.set_status(&bound, &Info { offset: 1 << 40, ..Info::default() });
                bed.step(format!("{command}, {of}, {name}"), bed.ioctl(device, number, address));
            }
        }
    }
    bed.finish(bound);
    bed.finish(unbound);
}

/// Devices opened in all modes, with and without CAP_SYS_ADMIN.
fn rights(bed: &Bed) {
    bed.theme("rights");
    let image = bed.file("image", 1 << 20);
    let info = Info::default();
    let modes = [
        ("read", OFlags::RDONLY),
        ("write", OFlags::WRONLY),
        ("both", OFlags::RDWR),
        ("neither", OFlags::RDWR | OFlags::WRONLY),
        ("path", OFlags::PATH),
        ("both, alone", OFlags::RDWR | OFlags::EXCL),
    ];
    for admin in [true, false] {
        let who = if admin { "administrator" } else { "another" };
        for (mode, flags) in modes {
            let name = |command: &str| format!("{command}, {who}, {mode}");
            let own = bed.bound(&image, &info);
            let other = Device { number: own.number, fd: open(&format!("/dev/loop{}", own.number), flags) };
            as_admin(admin, || {
                bed.step(name("SET_STATUS64"), bed.set_status(&other, &info));
                bed.step(name("SET_STATUS"), bed.with(&other, SET_STATUS, &info.old_bytes(bed.compat)));
                bed.step(name("SET_STATUS64, bad address"), bed.ioctl(&other, SET_STATUS64, 8));
                bed.step(name("GET_STATUS64"), bed.flags(&other));
                bed.step(name("SET_CAPACITY"), bed.ioctl(&other, SET_CAPACITY, 0));
                bed.step(name("SET_DIRECT_IO"), bed.ioctl(&other, SET_DIRECT_IO, 0));
                bed.step(name("SET_BLOCK_SIZE"), bed.ioctl(&other, SET_BLOCK_SIZE, 512));
                bed.step(name("SET_BLOCK_SIZE, bad"), bed.ioctl(&other, SET_BLOCK_SIZE, 3));
                bed.step(name("CHANGE_FD"), bed.ioctl(&other, CHANGE_FD, image.as_raw_fd() as u64));
                bed.step(name("SET_FD"), bed.ioctl(&other, SET_FD, image.as_raw_fd() as u64));
                bed.step(name("unknown"), bed.ioctl(&other, 0x4c0b, 0));
            });
            drop(other);
            let device = own.number;
            bed.finish(own);
            let only = Device { number: device, fd: open(&format!("/dev/loop{device}"), flags) };
            as_admin(admin, || {
                let file = image.as_raw_fd() as u64;
                bed.step(name("SET_CAPACITY, unbound"), bed.ioctl(&only, SET_CAPACITY, 0));
                bed.step(name("SET_FD, unbound"), bed.ioctl(&only, SET_FD, file));
                bed.say(name("SET_FD, sysfs"), bed.attributes(device));
                bed.step(name("GET_STATUS64, own"), bed.flags(&only));
                bed.step(name("CLR_FD"), bed.ioctl(&only, CLR_FD, 0));
            });
            bed.finish(only);
        }
    }
}

fn as_admin(admin: bool, steps: impl FnOnce()) {
    let before = capabilities(None).expect("capabilities");
    let mut sets = before;
    sets.effective.set(CapabilitySet::SYS_ADMIN, admin);
    set_capabilities(None, sets).expect("fewer capabilities");
    steps();
    set_capabilities(None, before).expect("capabilities as before");
}
