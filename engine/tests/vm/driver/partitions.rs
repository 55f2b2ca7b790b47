// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Steps that add, change and remove partitions of a bound device: BLKRRPART and BLKPG.

use std::fs::File;
use std::os::unix::fs::FileExt;

use rustix::fs::OFlags;

use super::abi::*;
use super::bed::{Bed, Device, named, open, soon, try_open};
use super::life::head;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

pub(super) fn steps(bed: &Bed) {
    added(bed);
    resized(bed);
    refused(bed);
    reread(bed);
    moved(bed);
}

/// The partitions: numbers, first sectors and sectors in sysfs, and whether they have nodes.
fn shown(bed: &Bed, device: &Device) -> String {
    let n = device.number;
    let mut all = Vec::new();
    for part in 1..=8 {
        let dir = format!("loop{n}p{part}");
        if !bed.has_attribute(n, &dir) {
            continue;
        }
        let [number, start, size] =
            ["partition", "start", "size"].map(|name| bed.sysfs(n, &format!("{dir}/{name}")));
        let node = std::path::Path::new(&format!("/dev/{dir}")).exists();
        all.push(format!("{number} at {start} of {size}{}", if node { "" } else { " without node" }));
    }
    if all.is_empty() { "none".to_owned() } else { all.join("; ") }
}

/// A table with these partitions: first sector and sectors.
fn table(parts: &[(u32, u32)]) -> [u8; 512] {
    let mut sector = [0; 512];
    for (entry, (start, sectors)) in sector[446..510].chunks_exact_mut(16).zip(parts) {
        entry[4] = 0x83;
        entry[8..12].copy_from_slice(&start.to_le_bytes());
        entry[12..16].copy_from_slice(&sectors.to_le_bytes());
    }
    sector[510..].copy_from_slice(&[0x55, 0xaa]);
    sector
}

fn write_table(file: &File, parts: &[(u32, u32)]) {
    file.write_all_at(&table(parts), 0).expect("a table is written");
}

fn part(device: &Device, number: u32) -> String {
    format!("/dev/loop{}p{number}", device.number)
}

/// BLKPG without a table, on a device without LO_FLAGS_PARTSCAN.
fn added(bed: &Bed) {
    bed.theme("partitions, added");
    let file = bed.file("image", 8 * MIB);
    file.write_all_at(b"in the first", MIB).expect("text");
    let device = bed.bound(&file, &Info::default());
    bed.say("before", shown(bed, &device));
    bed.step("a first", bed.blkpg(&device, BLKPG_ADD, 1, MIB, MIB));
    bed.step("a fifth", bed.blkpg(&device, BLKPG_ADD, 5, 4 * MIB, 512));
    bed.say("both", shown(bed, &device));
    let node = part(&device, 1);
    assert!(soon(|| try_open(&node, OFlags::RDONLY).is_ok()), "no {node}");
    bed.say("bytes", head(open(&node, OFlags::RDONLY), 0));
    bed.step("the same again", bed.blkpg(&device, BLKPG_ADD, 1, 6 * MIB, MIB));
    bed.step("over another", bed.blkpg(&device, BLKPG_ADD, 2, 2 * MIB - 512, MIB));
    bed.step("around another", bed.blkpg(&device, BLKPG_ADD, 2, 512, 8 * MIB - 512));
    bed.step("right after another", bed.blkpg(&device, BLKPG_ADD, 2, 2 * MIB, MIB));
    bed.step("flags", bed.flags(&device));
    let held = open(&node, OFlags::RDONLY);
    bed.step("goes while it is open", bed.blkpg(&device, BLKPG_DEL, 1, 0, 0));
    drop(held);
    bed.step("goes", bed.blkpg(&device, BLKPG_DEL, 1, 0, 0));
    bed.step("goes again", bed.blkpg(&device, BLKPG_DEL, 1, 0, 0));
    bed.say("one less", shown(bed, &device));
    bed.step("comes again", bed.blkpg(&device, BLKPG_ADD, 1, 512, KIB));
    bed.say("elsewhere", shown(bed, &device));
    bed.step("of a partition", bed.blkpg(open(&part(&device, 2), OFlags::RDWR), BLKPG_ADD, 1, 0, 512));
    bed.step("a partition, BLKRRPART", bed.ioctl(open(&part(&device, 2), OFlags::RDWR), BLKRRPART, 0));
    bed.step("BLKRRPART without partitions", bed.ioctl(&device, BLKRRPART, 0));
    bed.finish(device);
    let device = bed.bound(&file, &Info::default());
    bed.say("bound again", shown(bed, &device));
    bed.finish(device);
}

fn resized(bed: &Bed) {
    bed.theme("partitions, resized");
    let file = bed.file("image", 8 * MIB);
    file.write_all_at(b"at four", 4 * MIB).expect("text");
    let device = bed.bound(&file, &Info::default());
    bed.step("a first", bed.blkpg(&device, BLKPG_ADD, 1, MIB, MIB));
    bed.step("a second", bed.blkpg(&device, BLKPG_ADD, 2, 6 * MIB, MIB));
    let node = part(&device, 1);
    assert!(soon(|| try_open(&node, OFlags::RDONLY).is_ok()), "no {node}");
    let held = Device { number: device.number, fd: open(&node, OFlags::RDWR) };
    bed.say("shape", bed.shape(&held));
    bed.step("larger, while it is open", bed.blkpg(&device, BLKPG_RESIZE, 1, MIB, 4 * MIB));
    bed.say("larger", shown(bed, &device));
    bed.say("larger, shape", bed.shape(&held));
    bed.say("larger, bytes", head(&held, 3 * MIB));
    bed.step("into the next", bed.blkpg(&device, BLKPG_RESIZE, 1, MIB, 6 * MIB));
    bed.step("another start", bed.blkpg(&device, BLKPG_RESIZE, 1, MIB + 512, MIB));
    bed.step("no such", bed.blkpg(&device, BLKPG_RESIZE, 3, MIB, MIB));
    bed.step("of nothing", bed.blkpg(&device, BLKPG_RESIZE, 1, MIB, 0));
    bed.step("smaller", bed.blkpg(&device, BLKPG_RESIZE, 1, MIB, KIB));
    bed.say("smaller", shown(bed, &device));
    bed.say("smaller, shape", bed.shape(&held));
    drop(held);
    file.set_len(16 * MIB).expect("a larger file");
    bed.step("before the device grows", bed.blkpg(&device, BLKPG_ADD, 3, 10 * MIB, MIB));
    bed.step("the device grows", bed.ioctl(&device, SET_CAPACITY, 0));
    bed.step("after it grew", bed.blkpg(&device, BLKPG_ADD, 3, 10 * MIB, MIB));
    bed.step("the second, into it", bed.blkpg(&device, BLKPG_RESIZE, 2, 6 * MIB, 3 * MIB));
    bed.say("all", shown(bed, &device));
    bed.finish(device);
}

fn refused(bed: &Bed) {
    bed.theme("partitions, refused");
    let file = bed.file("image", 8 * MIB);
    let unbound = bed.device();
    bed.step("unbound, add", bed.blkpg(&unbound, BLKPG_ADD, 1, MIB, MIB));
    bed.step("unbound, delete", bed.blkpg(&unbound, BLKPG_DEL, 1, 0, 0));
    bed.step("unbound, resize", bed.blkpg(&unbound, BLKPG_RESIZE, 1, MIB, MIB));
    bed.step("unbound, BLKRRPART", bed.ioctl(&unbound, BLKRRPART, 0));
    bed.finish(unbound);
    let device = bed.bound(&file, &Info::default());
    let all = [
        ("number 0", BLKPG_ADD, 0, MIB, MIB),
        ("number -1", BLKPG_ADD, -1, MIB, MIB),
        ("number 255", BLKPG_ADD, 255, 2 * MIB, MIB),
        ("number 256", BLKPG_ADD, 256, MIB, MIB),
        ("odd start", BLKPG_ADD, 1, MIB + 1, MIB),
        ("odd length", BLKPG_ADD, 1, MIB, MIB + 511),
        ("no length", BLKPG_ADD, 1, MIB, 0),
        ("at the end", BLKPG_ADD, 1, 8 * MIB, 512),
        ("over the end", BLKPG_ADD, 1, 7 * MIB, 2 * MIB),
        ("negative start", BLKPG_ADD, 1, 1 << 63, MIB),
        ("negative length", BLKPG_ADD, 1, MIB, 1 << 63),
        ("too far", BLKPG_ADD, 1, (1 << 63) - 512, 512),
        ("delete 0", BLKPG_DEL, 0, 0, 0),
        ("delete 256", BLKPG_DEL, 256, 0, 0),
        ("operation 0", 0, 1, MIB, MIB),
        ("operation 9", 9, 1, MIB, MIB),
    ];
    for (step, operation, number, start, length) in all {
        bed.step(step, bed.blkpg(&device, operation, number, start, length));
    }
    bed.step("bad address", bed.ioctl(&device, BLKPG, 8));
    let reader = open(&format!("/dev/loop{}", device.number), OFlags::RDONLY);
    bed.step("opened to be read", bed.blkpg(reader, BLKPG_ADD, 1, MIB, 512));
    bed.finish(device);
    let device = bed.device();
    bed.step("blocks of 4096", bed.configure(&device, &file, 4096, &Info::default()));
    bed.step("blocks of 4096, odd start", bed.blkpg(&device, BLKPG_ADD, 1, MIB + 512, MIB));
    bed.step("blocks of 4096, even", bed.blkpg(&device, BLKPG_ADD, 1, MIB + 4096, MIB));
    bed.say("blocks of 4096, all", shown(bed, &device));
    bed.finish(device);
}

/// A table is written and changed after the device was bound.
fn reread(bed: &Bed) {
    bed.theme("partitions, read again");
    let file = bed.file("image", 8 * MIB);
    write_table(&file, &[]);
    let device = bed.bound(&file, &Info { flags: PARTSCAN, ..Info::default() });
    bed.say("no table", shown(bed, &device));
    // Through the page cache of the device.
    rustix::io::pwrite(&device, &table(&[(2048, 2048), (8192, 4096)]), 0).expect("a table is written");
    bed.step("a table", bed.ioctl(&device, BLKRRPART, 0));
    bed.say("a table", shown(bed, &device));
    rustix::io::pwrite(&device, &table(&[(2048, 2048), (6144, 2048), (8192, 4096)]), 0).expect("a table");
    let held = open(&part(&device, 2), OFlags::RDONLY);
    bed.step("while one that changes is open", bed.ioctl(&device, BLKRRPART, 0));
    bed.say("while one that changes is open", shown(bed, &device));
    drop(held);
    let held = open(&part(&device, 1), OFlags::RDONLY | OFlags::EXCL);
    bed.step("while one is claimed", bed.ioctl(&device, BLKRRPART, 0));
    drop(held);
    bed.step("none is open", bed.ioctl(&device, BLKRRPART, 0));
    bed.say("none is open", shown(bed, &device));
    bed.step("one by BLKPG", bed.blkpg(&device, BLKPG_ADD, 7, 7 * MIB, 512));
    bed.say("one by BLKPG", shown(bed, &device));
    bed.step("goes with the next BLKRRPART", bed.ioctl(&device, BLKRRPART, 0));
    bed.say("goes with the next BLKRRPART", shown(bed, &device));
    rustix::io::pwrite(&device, &[0; 512], 0).expect("no table");
    bed.step("no table any more", bed.ioctl(&device, BLKRRPART, 0));
    bed.say("no table any more", shown(bed, &device));
    bed.finish(device);
    let claims = open_claimed(bed, &file);
    bed.step("whole device, by its O_EXCL opener", bed.ioctl(&claims, BLKRRPART, 0));
    bed.finish(claims);
}

/// A device of `file`, opened with O_EXCL.
fn open_claimed(bed: &Bed, file: &File) -> Device {
    let device = bed.bound(file, &Info { flags: PARTSCAN, ..Info::default() });
    let number = device.number;
    let fd = open(&format!("/dev/loop{number}"), OFlags::RDWR | OFlags::EXCL);
    drop(device);
    Device { number, fd }
}

/// Partitions of a device whose offset changes.
fn moved(bed: &Bed) {
    bed.theme("partitions, of another part");
    let file = bed.file("image", 8 * MIB);
    file.write_all_at(b"at one", MIB).expect("text");
    file.write_all_at(b"at three", 3 * MIB).expect("text");
    let device = bed.bound(&file, &Info::default());
    bed.step("a first", bed.blkpg(&device, BLKPG_ADD, 1, MIB, 64 * KIB));
    let node = part(&device, 1);
    assert!(soon(|| try_open(&node, OFlags::RDONLY).is_ok()), "no {node}");
    bed.say("bytes", head(open(&node, OFlags::RDONLY), 0));
    let offset = Info { offset: 2 * MIB, ..Info::default() };
    bed.step("another offset", bed.set_status(&device, &offset));
    bed.say("another offset, partitions", shown(bed, &device));
    bed.say("another offset, bytes", head(open(&node, OFlags::RDONLY), 0));
    bed.step("with PARTSCAN", bed.set_status(&device, &Info { flags: PARTSCAN, ..offset }));
    bed.say("with PARTSCAN", shown(bed, &device));
    bed.say("flags", named(bed.flags(&device)));
    bed.finish(device);
}
