// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Steps on loop-control, and unknown commands.

use rustix::fs::OFlags;

use super::abi::*;
use super::bed::{Bed, named, open, soon, try_open};

/// All steps of this file.
pub(super) fn steps(bed: &Bed) {
    numbers(bed);
    removal(bed);
    free(bed);
    unknown(bed);
    plain_file(bed);
}

fn node(number: i64) -> String {
    format!("/dev/loop{number}")
}

/// LOOP_CTL_ADD.
fn numbers(bed: &Bed) {
    bed.theme("add");
    bed.step("free of none", bed.control(CTL_GET_FREE, 0));
    bed.step("free again", bed.control(CTL_GET_FREE, 0));
    bed.step("the argument is ignored", bed.control(CTL_GET_FREE, u64::MAX));
    for (name, flags) in [("read", OFlags::RDONLY), ("write", OFlags::WRONLY), ("path", OFlags::PATH)] {
        let control = open("/dev/loop-control", flags);
        bed.step(format!("free, opened to {name}"), bed.ioctl(&control, CTL_GET_FREE, 0));
        bed.step(format!("add, opened to {name}"), bed.ioctl(&control, CTL_ADD, 0));
        bed.step(format!("remove, opened to {name}"), bed.ioctl(&control, CTL_REMOVE, 77));
    }
    let negative = |number: i64| number as u64;
    for (name, number) in [
        ("an existing one", 0),
        ("3", 3),
        ("3 again", 3),
        ("-1", negative(-1)),
        ("-1 again", negative(-1)),
        ("-1, past 3", negative(-1)),
        ("-2", negative(-2)),
        ("the lowest int", negative(i32::MIN.into())),
        ("an int of which all is cut off but 9", 1 << 32 | 9),
        ("2^20 - 1", (1 << 20) - 1),
        ("2^20", 1 << 20),
        ("2^20 + 1", (1 << 20) + 1),
        ("the highest int", i32::MAX as u64),
    ] {
        let done = bed.control(CTL_ADD, number);
        bed.step(name, done);
        if let Ok(number) = done {
            let there = try_open(&node(number), OFlags::RDWR).is_ok();
            bed.say(format!("{name}, its node"), there);
            bed.say(format!("{name}, sysfs"), bed.attributes(number));
        }
    }
    bed.step("free of many", bed.control(CTL_GET_FREE, 0));
    for number in [1, 2, 3, 4, 5, 6, 9, (1 << 20) - 1] {
        bed.step(format!("remove {number}"), bed.control(CTL_REMOVE, number));
    }
}

/// LOOP_CTL_REMOVE.
fn removal(bed: &Bed) {
    bed.theme("remove");
    for (name, number) in [
        ("none", 99),
        ("2^20", 1 << 20),
        ("the highest int", i32::MAX as u64),
        ("-1", u64::MAX),
        ("the lowest int", i64::from(i32::MIN) as u64),
        ("an int of which all is cut off but 98", 1 << 32 | 98),
    ] {
        bed.step(name, bed.control(CTL_REMOVE, number));
    }
    bed.step("add", bed.control(CTL_ADD, 5));
    let image = bed.file("image", 1 << 20);
    let held = open(&node(5), OFlags::RDONLY);
    bed.step("open", bed.control(CTL_REMOVE, 5));
    drop(held);
    let named_only = open(&node(5), OFlags::PATH);
    bed.step("closed", bed.control(CTL_REMOVE, 5));
    bed.step("twice", bed.control(CTL_REMOVE, 5));
    let gone = soon(|| try_open(&node(5), OFlags::RDONLY).is_err());
    bed.say("its node is gone", gone);
    bed.say("its sysfs is gone", !bed.has_attribute(5, "size"));
    bed.step("add again", bed.control(CTL_ADD, 5));
    let device = super::bed::Device { number: 5, fd: open(&node(5), OFlags::RDWR) };
    bed.step("bind", bed.configure(&device, &image, 0, &Info::default()));
    bed.step("bound and open", bed.control(CTL_REMOVE, 5));
    drop(device);
    bed.step("bound", bed.control(CTL_REMOVE, 5));
    let device = super::bed::Device { number: 5, fd: open(&node(5), OFlags::RDWR) };
    bed.finish(device);
    bed.step("unbound", bed.control(CTL_REMOVE, 5));
    let again = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&named_only));
    bed.say("opened through what named it once", outcome(try_open(&again, OFlags::RDONLY)));
    // The line above shows whether the device exists again.
    let _ = bed.control(CTL_REMOVE, 5);
}

fn outcome<T>(opened: Result<T, i32>) -> String {
    match opened {
        Ok(_) => "opened".to_owned(),
        Err(errno) => named(Err(errno)),
    }
}

/// LOOP_CTL_GET_FREE, with bound and free devices.
fn free(bed: &Bed) {
    bed.theme("free");
    let image = bed.file("image", 1 << 20);
    let [first, second, third] = [(); 3].map(|()| bed.bound(&image, &Info::default()));
    bed.say("numbers", format!("{} {} {}", first.number, second.number, third.number));
    bed.step("all are bound", bed.control(CTL_GET_FREE, 0));
    bed.finish(second);
    bed.step("the one between is free", bed.control(CTL_GET_FREE, 0));
    bed.finish(first);
    bed.step("the lowest of two", bed.control(CTL_GET_FREE, 0));
    bed.finish(third);
    bed.step("all are free", bed.control(CTL_GET_FREE, 0));
    for number in 1..4 {
        bed.step(format!("remove {number}"), bed.control(CTL_REMOVE, number));
    }
}

/// Unknown commands, and commands of the other kind of node.
fn unknown(bed: &Bed) {
    bed.theme("unknown");
    let image = bed.file("image", 1 << 20);
    let unbound = bed.device();
    for number in [0x4c0b, 0x4c0f, 0x4c7f, CTL_ADD, CTL_REMOVE, CTL_GET_FREE, 0x4c83, 0x4cff] {
        bed.step(format!("{number:x} of an unbound device"), bed.ioctl(&unbound, number, 0));
    }
    for number in [0x5401, 0x4bff, 0x4d00] {
        bed.step(format!("{number:x} of a device"), bed.ioctl(&unbound, number, 0));
    }
    bed.finish(unbound);
    let device = bed.bound(&image, &Info::default());
    for number in [0x4c0b, 0x4c7f, CTL_ADD, CTL_REMOVE, CTL_GET_FREE, 0x4cff] {
        bed.step(format!("{number:x} of a bound device"), bed.ioctl(&device, number, 0));
    }
    bed.finish(device);
    let all = [
        SET_FD,
        CLR_FD,
        SET_STATUS,
        GET_STATUS,
        SET_STATUS64,
        GET_STATUS64,
        CHANGE_FD,
        SET_CAPACITY,
        SET_DIRECT_IO,
        SET_BLOCK_SIZE,
        CONFIGURE,
        0x4c0b,
        0x4c7f,
        0x4c83,
        0x4cff,
    ];
    for number in all {
        bed.step(format!("{number:x} of loop-control"), bed.control(number, 0));
    }
    for number in [0x5401, 0x4bff, 0x4d00] {
        bed.step(format!("{number:x} of loop-control, not of loop(4)"), bed.control(number, 0));
    }
    if !bed.compat {
        bed.step("the high half of a command", bed.control(1 << 32 | CTL_GET_FREE, 0));
        let device = bed.device();
        bed.step("of a device as well", bed.ioctl(&device, 0xffff_ffff_0000_0000 | CLR_FD, 0));
        bed.finish(device);
    }
}

/// Other calls on loop-control.
fn plain_file(bed: &Bed) {
    bed.theme("loop-control");
    let control = open("/dev/loop-control", OFlags::RDWR);
    let done = |done: rustix::io::Result<usize>| done.map(|n| n as i64).map_err(|error| error.raw_os_error());
    bed.step("read", done(rustix::io::read(&control, &mut [0; 16])));
    bed.step("write", done(rustix::io::write(&control, &[0; 16])));
    bed.say("closed descriptor", named(bed.ioctl_of(9999, CTL_GET_FREE, 0)));
}
