// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Steps on a bound device: its status before and after changes.

use std::fs::File;
use std::os::fd::AsRawFd;

use rustix::fs::OFlags;

use super::abi::*;
use super::bed::{Bed, Device, open};
use super::refused::BLOCK_SIZES;

/// Steps with structures.
pub(super) fn structs(bed: &Bed) {
    names(bed);
    old_struct(bed);
    flags(bed);
    offsets(bed);
}

/// The other steps.
pub(super) fn sizes(bed: &Bed) {
    odd_sizes(bed);
    capacity(bed);
    direct_io(bed);
    block_sizes(bed);
    change_fd(bed);
}

const NAME_63: &str = "abcdefghijklmnopqrstuvwxyzabcdefghijklmnopqrstuvwxyzabcdefghijk";
const NAME_64: &str = "abcdefghijklmnopqrstuvwxyzabcdefghijklmnopqrstuvwxyzabcdefghijkl";

/// Names, which the driver only stores.
fn names(bed: &Bed) {
    bed.theme("names");
    let image = bed.file("image", 1 << 20);
    for name in ["", "a name", NAME_63, NAME_64] {
        let info = Info { name, ..Info::default() };
        let device = bed.bound(&image, &info);
        bed.show(format!("{} bytes", name.len()), &device, Some(&image));
        bed.step("another", bed.set_status(&device, &Info { name: "another", ..info }));
        bed.show("another", &device, Some(&image));
        bed.step("again", bed.set_status(&device, &info));
        bed.show(format!("{} bytes again", name.len()), &device, Some(&image));
        bed.finish(device);
    }
    let device = bed.device();
    bed.step("SET_FD", bed.ioctl(&device, SET_FD, image.as_raw_fd() as u64));
    bed.show("SET_FD", &device, Some(&image));
    std::fs::remove_file("image").expect("a file can be removed");
    // sysfs shows it with the next change.
    bed.step("a change", bed.set_status(&device, &Info { name: "x", ..Info::default() }));
    bed.show("the file is removed", &device, Some(&image));
    bed.finish(device);
}

/// LOOP_SET_STATUS and LOOP_GET_STATUS.
fn old_struct(bed: &Bed) {
    bed.theme("old struct");
    let image = bed.file("image", 1 << 20);
    let stat = rustix::fs::fstat(&image).expect("stat of a file");
    let device = bed.bound(&image, &Info { limit: 1 << 19, name: "first", ..Info::default() });
    let show = |step: &str| {
        let done = bed.with(&device, GET_STATUS, &[0xee; 256]);
        bed.step(format!("{step}, GET_STATUS"), done);
        if done.is_ok() {
            let len = if bed.compat { 140 } else { 168 };
            let bytes = bed.argument(256);
            bed.say(format!("{step}, as text"), old_info_text(&bytes[..len], bed.compat, &stat));
            bed.say(format!("{step}, the rest is unchanged"), bytes[len..].iter().all(|&byte| byte == 0xee));
        }
        bed.show(step, &device, Some(&image));
    };
    show("new");
    let set = |info: Info| bed.with(&device, SET_STATUS, &info.old_bytes(bed.compat));
    for (name, info) in [
        ("another name", Info { name: "second", ..Info::default() }),
        ("a long name", Info { name: NAME_64, ..Info::default() }),
        ("offset", Info { offset: 1024, ..Info::default() }),
        ("the highest offset", Info { offset: i32::MAX as u64, ..Info::default() }),
        ("a negative offset", Info { offset: u64::MAX, ..Info::default() }),
        ("flags", Info { flags: AUTOCLEAR | PARTSCAN | DIRECT_IO | READ_ONLY | 2, ..Info::default() }),
        ("encryption", Info { encrypt_type: 1, ..Info::default() }),
        ("key size", Info { key_size: 16, ..Info::default() }),
        ("key size 33", Info { key_size: 33, ..Info::default() }),
    ] {
        bed.step(name, set(info));
        show(name);
    }
    for offset in [i32::MAX as u64, 1 << 31, 1 << 40] {
        bed.step(format!("offset {offset}"), bed.set_status(&device, &Info { offset, ..Info::default() }));
        show(&format!("offset {offset}"));
    }
    bed.finish(device);
}

/// LOOP_SET_STATUS64: which flags it sets, clears, and ignores.
fn flags(bed: &Bed) {
    bed.theme("flags");
    let image = bed.file("image", 1 << 20);
    let all = READ_ONLY | AUTOCLEAR | PARTSCAN | DIRECT_IO;
    for first in [0, READ_ONLY, AUTOCLEAR, PARTSCAN, DIRECT_IO, all] {
        let device = bed.bound(&image, &Info { flags: first, ..Info::default() });
        for flags in [0, 1, 2, 4, 8, 12, 16, 32, 1 << 31, all, u32::MAX, AUTOCLEAR, 0] {
            let name = format!("{flags} after {first}");
            bed.step(&name, bed.set_status(&device, &Info { flags, ..Info::default() }));
            bed.step(format!("{name}, flags"), bed.flags(&device));
            bed.say(format!("{name}, sysfs"), bed.attributes(device.number));
        }
        bed.finish(device);
    }
}

/// Offsets and limits of LOOP_SET_STATUS64.
fn offsets(bed: &Bed) {
    bed.theme("offsets");
    let image = bed.file("image", 1 << 20);
    let device = bed.bound(&image, &Info { name: "n", ..Info::default() });
    let top = i64::MAX as u64;
    for (offset, limit) in [
        (512, 0),
        (0, 0),
        (1, 0),
        (511, 0),
        (513, 0),
        (4096, 4096),
        (0, 1),
        (0, 511),
        (0, 512),
        (0, 1000),
        (1 << 20, 0),
        ((1 << 20) - 1, 0),
        (1 << 21, 0),
        (top, 0),
        (top + 1, 0),
        (u64::MAX, 0),
        (0, top),
        (0, top + 1),
        (top, top),
        (100, 5000),
        (0, 1 << 30),
        (512, 1 << 19),
        (0, 0),
    ] {
        let name = format!("offset {offset}, limit {limit}");
        let info = Info { offset, limit, name: "m", ..Info::default() };
        bed.step(&name, bed.set_status(&device, &info));
        bed.show(&name, &device, Some(&image));
    }
    bed.step(
        "refused for its type",
        bed.set_status(&device, &Info { encrypt_type: 2, offset: 512, ..Info::default() }),
    );
    bed.step(
        "refused for its key",
        bed.set_status(&device, &Info { key_size: 99, offset: 512, ..Info::default() }),
    );
    bed.show("refused", &device, Some(&image));
    bed.finish(device);
}

/// Files of odd sizes.
fn odd_sizes(bed: &Bed) {
    bed.theme("sizes");
    for size in [0, 1, 511, 512, 513, 1000, 1024, 4095, 4096, 4097, (1 << 20) + 700, 8 << 40, 1 << 60] {
        let image = bed.file("odd", 0);
        // The file system may not support such a large file.
        if rustix::fs::ftruncate(&image, size).is_err() {
            bed.say(format!("{size} bytes"), "too large here");
            continue;
        }
        for block_size in [0, 4096] {
            let device = bed.device();
            let name = format!("{size} bytes in blocks of {block_size}");
            bed.step(&name, bed.configure(&device, &image, block_size, &Info::default()));
            bed.show(&name, &device, Some(&image));
            bed.finish(device);
        }
    }
}

/// LOOP_SET_CAPACITY, with the device open.
fn capacity(bed: &Bed) {
    bed.theme("capacity");
    let image = bed.file("image", 1 << 20);
    for (offset, limit) in [(0, 0), (512, 0), (0, 1 << 20)] {
        let device = bed.bound(&image, &Info { offset, limit, ..Info::default() });
        for size in [2 << 20, (2 << 20) + 513, 1 << 19, 0, 100, 1 << 20] {
            image.set_len(size).expect("a file changes its size");
            let name = format!("to {size}, offset {offset}, limit {limit}");
            bed.say(format!("{name}, before"), bed.shape(&device));
            bed.step(&name, bed.ioctl(&device, SET_CAPACITY, 0));
            bed.show(&name, &device, Some(&image));
        }
        bed.step("with an argument", bed.ioctl(&device, SET_CAPACITY, u64::MAX));
        bed.finish(device);
    }
}

/// LOOP_SET_DIRECT_IO, and files that were opened for direct I/O.
fn direct_io(bed: &Bed) {
    bed.theme("direct I/O");
    let image = bed.file("image", 1 << 20);
    let steps = |name: &str, device: &Device| {
        bed.show(name, device, Some(&image));
        for on in [1, 1, 0, 0, 2, u64::MAX] {
            bed.step(format!("{name}, {on}"), bed.ioctl(device, SET_DIRECT_IO, on));
            bed.step(format!("{name}, {on}, flags"), bed.flags(device));
            bed.say(format!("{name}, {on}, sysfs"), bed.attributes(device.number));
        }
    };
    let cases = [
        ("aligned", 0, 0),
        ("at an odd byte", 1, 0),
        ("at a sector", 512, 0),
        ("in large blocks", 0, 4096),
        ("in large blocks at a sector", 512, 4096),
    ];
    for (name, offset, block_size) in cases {
        let device = bed.device();
        bed.step(name, bed.configure(&device, &image, block_size, &Info { offset, ..Info::default() }));
        steps(name, &device);
        bed.finish(device);
    }
    let device = bed.bound(&image, &Info { flags: DIRECT_IO, ..Info::default() });
    for offset in [1, 512, 0] {
        let name = format!("then offset {offset}");
        bed.step(&name, bed.set_status(&device, &Info { offset, flags: DIRECT_IO, ..Info::default() }));
        bed.show(name, &device, Some(&image));
    }
    if !bed.compat {
        bed.step("all bits are cut off", bed.ioctl(&device, SET_DIRECT_IO, 1 << 40));
        bed.step("all bits are cut off, flags", bed.flags(&device));
    }
    bed.finish(device);
    for flags in [OFlags::RDWR | OFlags::DIRECT, OFlags::RDONLY | OFlags::DIRECT] {
        let direct = open("image", flags);
        let name = format!("file opened with {:o}", flags.bits());
        let device = bed.device();
        bed.step(&name, bed.ioctl(&device, SET_FD, direct.as_raw_fd() as u64));
        steps(&name, &device);
        bed.finish(device);
    }
}

/// LOOP_SET_BLOCK_SIZE.
fn block_sizes(bed: &Bed) {
    bed.theme("block size");
    let image = bed.file("image", (1 << 20) + 700);
    let device = bed.bound(&image, &Info { offset: 512, name: "n", ..Info::default() });
    for size in BLOCK_SIZES.iter().copied().chain([512, 512, 1024, 512]) {
        // Not every driver supports blocks this large: reset the size afterwards.
        let done = bed.ioctl(&device, SET_BLOCK_SIZE, size.into());
        bed.step(size, done);
        if done.is_ok() {
            bed.show(size, &device, Some(&image));
        }
        if size > 4096 {
            bed.step(format!("{size}, and back"), bed.ioctl(&device, SET_BLOCK_SIZE, 512));
        }
    }
    if !bed.compat {
        bed.step("with a high half", bed.ioctl(&device, SET_BLOCK_SIZE, 1 << 32 | 512));
    }
    let name = format!("/dev/loop{}", device.number);
    let other = open(&name, OFlags::RDONLY);
    bed.step("with another opener", bed.ioctl(&device, SET_BLOCK_SIZE, 1024));
    drop(other);
    let alone = open(&name, OFlags::RDONLY | OFlags::EXCL);
    bed.step("while another has it alone", bed.ioctl(&device, SET_BLOCK_SIZE, 4096));
    bed.step("while another has it alone, the same", bed.ioctl(&device, SET_BLOCK_SIZE, 1024));
    bed.step("by the O_EXCL opener", bed.ioctl(&alone, SET_BLOCK_SIZE, 1024));
    drop(alone);
    bed.show("in the end", &device, Some(&image));
    bed.finish(device);
}

/// LOOP_CHANGE_FD.
fn change_fd(bed: &Bed) {
    bed.theme("change");
    let first = bed.file("first", 1 << 20);
    let second = bed.file("second", 1 << 20);
    let sizes = [0, 512, (1 << 20) - 512, (1 << 20) + 1, (1 << 20) + 511, (1 << 20) + 512];
    let device = bed.bound(&first, &Info::default());
    bed.step("writable", bed.ioctl(&device, CHANGE_FD, second.as_raw_fd() as u64));
    bed.finish(device);
    for (what, with) in [
        ("plain", Info::default()),
        ("with flags", Info { flags: AUTOCLEAR | PARTSCAN | DIRECT_IO, name: "n", ..Info::default() }),
        ("with an offset", Info { offset: 512, limit: 4096, ..Info::default() }),
    ] {
        let device = bed.bound(&first, &Info { flags: with.flags | READ_ONLY, ..with });
        let change = |file: &File| bed.ioctl(&device, CHANGE_FD, file.as_raw_fd() as u64);
        bed.show(format!("{what}, before"), &device, Some(&first));
        bed.step(format!("{what}, the same size"), change(&second));
        bed.show(format!("{what}, after"), &device, Some(&second));
        bed.say(format!("{what}, bytes"), super::life::head(&device, 0));
        bed.step(format!("{what}, the same file"), change(&second));
        for size in sizes {
            let other = bed.file("other", size);
            bed.step(format!("{what}, {size} bytes"), change(&other));
        }
        let other = File::open("other").expect("the last file");
        bed.show(format!("{what}, in the end"), &device, Some(&other));
        bed.step(format!("{what}, itself"), bed.ioctl(&device, CHANGE_FD, device.fd.as_raw_fd() as u64));
        bed.finish(device);
    }
    let device = bed.device_as(OFlags::RDONLY);
    let read_only = open("second", OFlags::RDONLY);
    bed.step("a device opened for reading", bed.ioctl(&device, SET_FD, first.as_raw_fd() as u64));
    bed.step("and its file", bed.ioctl(&device, CHANGE_FD, read_only.as_raw_fd() as u64));
    bed.show("and its file", &device, Some(&second));
    bed.finish(device);
}
