// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Steps from bind to unbind: openers, data, the state after the unbind, and stacked devices.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use rustix::fs::{Advice, OFlags};

use super::abi::*;
use super::bed::{Bed, Device, named, open, soon, try_open};

pub(super) fn steps(bed: &Bed) {
    clear(bed);
    autoclear(bed);
    alone(bed);
    read_only(bed);
    bytes(bed);
    stack(bed);
}

/// The text at an offset: files have their names at their beginning and at byte 512.
pub(super) fn head(fd: impl AsFd, at: u64) -> String {
    let mut bytes = [0; 16];
    match rustix::io::pread(fd, &mut bytes, at) {
        Ok(read) => {
            let text = String::from_utf8_lossy(&bytes[..read]);
            text.trim_end_matches(['.', '\0']).to_owned()
        }
        Err(error) => named(Err(error.raw_os_error())),
    }
}

fn write(fd: impl AsFd, bytes: &[u8]) -> String {
    let done = rustix::io::pwrite(fd, bytes, 0);
    named(done.map(|written| written as i64).map_err(|error| error.raw_os_error()))
}

fn node(device: &Device) -> String {
    format!("/dev/loop{}", device.number)
}

fn opened(result: Result<OwnedFd, i32>) -> String {
    result.map_or_else(|errno| named(Err(errno)), |_| "opened".to_owned())
}

/// LOOP_CLR_FD, by the only opener and by one of two.
fn clear(bed: &Bed) {
    bed.theme("clear");
    let (image, second) = (bed.file("image", 1 << 20), bed.file("second", 1 << 20));
    let device = bed.device_at(12);
    bed.step("unbound", bed.ioctl(&device, CLR_FD, 0));
    bed.show("unbound", &device, None);
    bed.say("unbound, bytes", head(&device, 0));
    bed.say("unbound, written", write(&device, b"x"));
    bed.finish(device);
    // One step per binding: the state after LOOP_CLR_FD may change within a second.
    let after = |name: &str, what: &dyn Fn(&Device) -> String| {
        let device = bed.bound(&image, &Info::default());
        bed.step(format!("the only opener, for {name}"), bed.ioctl(&device, CLR_FD, 0));
        bed.say(format!("the only opener, {name}"), what(&device));
        bed.finish(device);
    };
    after("again", &|device| named(bed.ioctl(device, CLR_FD, 0)));
    after("flags", &|device| named(bed.flags(device)));
    after("SET_CAPACITY", &|device| named(bed.ioctl(device, SET_CAPACITY, 0)));
    after("SET_STATUS64", &|device| named(bed.set_status(device, &Info::default())));
    after("free", &|_| named(bed.control(CTL_GET_FREE, 0)));
    after("remove", &|device| named(bed.control(CTL_REMOVE, device.number as u64)));
    after("another file", &|device| named(bed.ioctl(device, SET_FD, second.as_raw_fd() as u64)));
    after("opened anew", &|device| opened(try_open(&node(device), OFlags::RDONLY)));
    after("size", &|device| bed.shape(device));
    after("bytes", &|device| head(device, 4096));
    let number = bed.control(CTL_GET_FREE, 0).expect("a free device");
    let device = bed.device();
    bed.say("closed, the same is free", device.number == number);
    bed.step("closed, flags", bed.flags(&device));
    bed.show("closed", &device, None);
    bed.step("closed, another file", bed.ioctl(&device, SET_FD, second.as_raw_fd() as u64));
    bed.say("closed, its bytes", head(&device, 0));
    bed.finish(device);

    let device = bed.bound(&image, &Info::default());
    let other = Device { number: device.number, fd: open(&node(&device), OFlags::RDONLY) };
    bed.step("one of two", bed.ioctl(&device, CLR_FD, 0));
    bed.step("one of two, at once", bed.flags(&device));
    // The last attribute to appear: neither driver creates the directory atomically.
    let shown = soon(|| bed.flags(&device).is_ok() && bed.has_attribute(device.number, "loop/backing_file"));
    bed.say("one of two, shown", shown);
    bed.step("one of two, flags", bed.flags(&device));
    bed.step("one of two, the other's flags", bed.flags(&other));
    bed.say("one of two, sysfs", bed.attributes(device.number));
    bed.step("one of two, another file", bed.ioctl(&device, CHANGE_FD, second.as_raw_fd() as u64));
    bed.step("one of two, again", bed.ioctl(&device, CLR_FD, 0));
    bed.say("one of two, bytes", head(&other, 0));
    drop(device);
    bed.say("one of two, the other's bytes", head(&other, 512));
    let number = other.number;
    drop(other);
    bed.wait_until_unbound(number);
    bed.say("one of two, both closed", bed.attributes(number));
}

/// LO_FLAGS_AUTOCLEAR: the last close unbinds.
fn autoclear(bed: &Bed) {
    bed.theme("autoclear");
    let image = bed.file("image", 1 << 20);
    let device = bed.bound(&image, &Info { flags: AUTOCLEAR, ..Info::default() });
    bed.show("bound", &device, Some(&image));
    let other = open(&node(&device), OFlags::RDONLY);
    let number = device.number;
    drop(device);
    std::thread::sleep(std::time::Duration::from_millis(100));
    bed.say("one of two has closed", bed.attributes(number));
    drop(other);
    bed.wait_until_unbound(number);
    bed.say("both have closed", bed.attributes(number));
    let device = bed.bound(&image, &Info { flags: AUTOCLEAR, ..Info::default() });
    bed.step("cleared", bed.set_status(&device, &Info::default()));
    let number = device.number;
    drop(device);
    std::thread::sleep(std::time::Duration::from_millis(200));
    bed.say("cleared, closed", bed.attributes(number));
    let device = Device { number, fd: open(&format!("/dev/loop{number}"), OFlags::RDWR) };
    bed.show("cleared, opened", &device, Some(&image));
    let flags = AUTOCLEAR;
    bed.step("set by SET_STATUS64", bed.set_status(&device, &Info { flags, ..Info::default() }));
    drop(device);
    bed.wait_until_unbound(number);
    bed.say("set by SET_STATUS64, closed", bed.attributes(number));
}

/// Openers with O_EXCL.
fn alone(bed: &Bed) {
    bed.theme("alone");
    let image = bed.file("image", 1 << 20);
    let alone_beside = |device: &Device| Device {
        number: device.number,
        fd: open(&node(device), OFlags::RDWR | OFlags::EXCL),
    };
    let device = bed.device();
    let alone = alone_beside(&device);
    bed.step("bind, another has it alone", bed.ioctl(&device, SET_FD, image.as_raw_fd() as u64));
    drop(alone);
    bed.finish(device);
    let device = bed.device();
    let alone = alone_beside(&device);
    bed.say("a second one", opened(try_open(&node(&device), OFlags::RDONLY | OFlags::EXCL)));
    bed.step("bind, it has it alone", bed.ioctl(&alone, SET_FD, image.as_raw_fd() as u64));
    bed.step("bind, bound", bed.ioctl(&device, SET_FD, image.as_raw_fd() as u64));
    bed.step(
        "status, another has it alone",
        bed.set_status(&device, &Info { offset: 512, ..Info::default() }),
    );
    bed.step("capacity, another has it alone", bed.ioctl(&device, SET_CAPACITY, 0));
    bed.step("direct I/O, another has it alone", bed.ioctl(&device, SET_DIRECT_IO, 1));
    bed.show("another has it alone", &device, Some(&image));
    drop(device);
    bed.step("clear, it has it alone", bed.ioctl(&alone, CLR_FD, 0));
    bed.finish(alone);
}

/// Read-only devices.
fn read_only(bed: &Bed) {
    bed.theme("read-only");
    let image = bed.file("image", 1 << 20);
    let file = open("image", OFlags::RDONLY);
    for (name, device_flags, flags, file) in [
        ("flag", OFlags::RDWR, READ_ONLY, image.as_fd()),
        ("file", OFlags::RDWR, 0, file.as_fd()),
        ("device", OFlags::RDONLY, 0, image.as_fd()),
    ] {
        let device = bed.device_as(device_flags);
        bed.step(name, bed.configure(&device, file, 0, &Info { flags, ..Info::default() }));
        bed.show(name, &device, Some(&image));
        bed.say(format!("{name}, written"), write(&device, &[b'w'; 512]));
        bed.step(format!("{name}, synced"), sync(&device));
        bed.say(format!("{name}, opened to write"), opened(try_open(&node(&device), OFlags::RDWR)));
        if let Ok(fd) = try_open(&node(&device), OFlags::RDWR) {
            bed.say(format!("{name}, opened and written"), write(&fd, &[b'w'; 512]));
        }
        bed.say(format!("{name}, bytes"), head(&device, 0));
        bed.finish(device);
        let device = bed.device();
        bed.show(format!("{name}, unbound"), &device, None);
        bed.step(format!("{name}, bound again"), bed.ioctl(&device, SET_FD, image.as_raw_fd() as u64));
        bed.say(format!("{name}, written again"), write(&device, b"image"));
        bed.finish(device);
    }
}

/// Data at different offsets of the file.
fn bytes(bed: &Bed) {
    bed.theme("bytes");
    let image = bed.file("image", 1 << 20);
    for offset in [0, 512, 511, 100] {
        let device = bed.bound(&image, &Info { offset, ..Info::default() });
        bed.say(format!("at {offset}"), head(&device, 0));
        bed.say(format!("at {offset}, from 512 on"), head(&device, 512 - offset % 512));
        bed.step(format!("to 0 from {offset}"), bed.set_status(&device, &Info::default()));
        bed.say(format!("to 0 from {offset}, at once"), head(&device, 0));
        bed.finish(device);
    }
    let device = bed.bound(&image, &Info { offset: 4096, limit: 4096, ..Info::default() });
    bed.say("written", write(&device, b"WRITTEN"));
    bed.step("moved", bed.set_status(&device, &Info { offset: 8192, ..Info::default() }));
    bed.say("moved, the file", head(&image, 4096));
    bed.say("moved, the new offset", head(&device, 0));
    bed.say("past the end", head(&device, 1 << 20));
    let end = rustix::io::pwrite(&device, b"x", 1 << 20);
    bed.step("written past the end", end.map(|n| n as i64).map_err(|error| error.raw_os_error()));
    bed.finish(device);

    let device = bed.bound(&image, &Info::default());
    image.set_len(4096).expect("a file is truncated");
    rustix::fs::fadvise(&device, 0, None, Advice::DontNeed).expect("pages are forgotten");
    bed.say("truncated, within the file", head(&device, 0));
    bed.say("truncated, outside of the file", head(&device, 1 << 19));
    bed.step("truncated, capacity", bed.ioctl(&device, SET_CAPACITY, 0));
    bed.show("truncated", &device, Some(&image));
    bed.say("truncated, past the end", head(&device, 4096));
    bed.finish(device);
}

/// Devices on devices.
fn stack(bed: &Bed) {
    bed.theme("stack");
    let image = bed.file("image", 1 << 20);
    let [free, unbound] = [7, 8].map(|number| bed.device_at(number));
    let device = bed.bound(&image, &Info::default());
    let on = |below: &Device| bed.ioctl(&free, SET_FD, below.fd.as_raw_fd() as u64);
    bed.step("on an unbound one", on(&unbound));
    bed.step("on itself", on(&free));
    bed.step("on another", on(&device));
    let below = File::from(device.fd.try_clone().expect("a second descriptor"));
    bed.show("on another", &free, Some(&below));
    bed.say("bytes", head(&free, 512));
    bed.say("written", write(&free, b"STACK"));
    bed.step("synced", sync(&free));
    bed.say("the file", head(&image, 0));
    bed.step("bound to the device on it", bed.configure(&device, &free, 0, &Info::default()));
    bed.step("clear the lower", bed.ioctl(&device, CLR_FD, 0));
    bed.step("clear the lower, flags", bed.flags(&device));
    bed.finish(free);
    drop(below);
    bed.finish(device);
    bed.finish(unbound);
    ring(bed, &image);
    deep(bed, &image);
    large_blocks(bed);
}

fn sync(fd: impl AsFd) -> super::raw::Done {
    rustix::fs::fsync(fd).map(|()| 0).map_err(|error| error.raw_os_error())
}

/// Cycles, which only LOOP_CHANGE_FD could create.
fn ring(bed: &Bed, image: &File) {
    let second = bed.bound(image, &Info::default());
    let first = bed.device();
    bed.step("ring, first on second", bed.ioctl(&first, SET_FD, second.fd.as_raw_fd() as u64));
    let third = bed.bound(&first, &Info { flags: READ_ONLY, ..Info::default() });
    for (name, below) in [("first", &first), ("second", &second), ("itself", &third)] {
        let done = bed.ioctl(&third, CHANGE_FD, below.fd.as_raw_fd() as u64);
        bed.step(format!("ring, third changes to {name}"), done);
    }
    bed.finish(third);
    bed.finish(first);
    let bottom = bed.bound(image, &Info { flags: READ_ONLY, ..Info::default() });
    let top = bed.device();
    bed.step("ring, a device on a reader", bed.configure(&top, &bottom, 0, &Info::default()));
    let done = bed.ioctl(&bottom, CHANGE_FD, top.fd.as_raw_fd() as u64);
    bed.step("ring, the reader changes to the device on it", done);
    bed.finish(top);
    bed.finish(bottom);
    bed.finish(second);
}

/// Three devices, each on the previous one.
fn deep(bed: &Bed, image: &File) {
    let mut tower = vec![bed.bound(image, &Info::default())];
    for floor in 1..4 {
        let below = &tower[floor - 1];
        let device = bed.device();
        bed.step(
            format!("floor {floor}"),
            bed.configure(&device, below, 0, &Info { offset: 512, ..Info::default() }),
        );
        bed.say(format!("floor {floor}, size"), bed.shape(&device));
        tower.push(device);
    }
    let top = &tower[3];
    bed.say("from the top", write(top, b"FROM THE TOP"));
    bed.step("synced", sync(top));
    bed.say("at the bottom", head(image, 3 * 512));
    while let Some(device) = tower.pop() {
        bed.finish(device);
    }
    bed.say("all gone", soon(|| !bed.has_attribute(0, "loop")));
}

/// A device on a device with large blocks.
fn large_blocks(bed: &Bed) {
    let image = bed.file("image", 1 << 20);
    let below = bed.device();
    bed.step("blocks of 4096", bed.configure(&below, &image, 4096, &Info::default()));
    for (name, flags, offset) in
        [("by the cache", 0, 0), ("directly", DIRECT_IO, 0), ("directly, at a sector", DIRECT_IO, 512)]
    {
        let device = bed.device();
        let info = Info { flags, offset, ..Info::default() };
        bed.step(format!("on blocks of 4096, {name}"), bed.configure(&device, &below, 0, &info));
        bed.say(format!("on blocks of 4096, {name}, size"), bed.shape(&device));
        bed.step(format!("on blocks of 4096, {name}, flags"), bed.flags(&device));
        bed.step(format!("on blocks of 4096, {name}, SET_DIRECT_IO"), bed.ioctl(&device, SET_DIRECT_IO, 1));
        bed.step(format!("on blocks of 4096, {name}, flags then"), bed.flags(&device));
        bed.say(format!("on blocks of 4096, {name}, bytes"), head(&device, 512));
        bed.finish(device);
    }
    bed.finish(below);
}
