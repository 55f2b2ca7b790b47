// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Files that are accepted as images, and their I/O.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use loopengine_core::Kind;
use loopengine_core::image::{Geometry, Image, ImageSpec};
use rustix::fs::OFlags;

use crate::support::*;

/// Checks the operations that every image supports.
fn check_image(directory: &Path, source: &ImageSpec, what: &str) -> Geometry {
    let path = directory.join("image");
    image_file(&path, 4 * MIB);
    // Leave dirty pages in the cache.
    OpenOptions::new().write(true).open(&path).unwrap().write_all(&vec![7; MIB as usize]).unwrap();

    let image = attach(&path, source).unwrap_or_else(|e| panic!("{what}: {e}"));
    let g = image.geometry();
    assert_eq!((g.size, g.offset), (4 * MIB, 0), "{what}");
    assert!(!image.is_block_device());
    assert_eq!(flags(&image).contains(OFlags::DIRECT), !source.buffered, "{what}");
    assert!(!flags(&image).contains(OFlags::NONBLOCK), "{what}: io_uring would answer EAGAIN");
    assert_eq!(rustix::io::fcntl_getfd(image.fd()).unwrap(), rustix::io::FdFlags::CLOEXEC);

    // I/O of one block, with exactly the reported alignment.
    let block = g.block_size as usize;
    let mut memory = aligned(block, g.dma_align as usize);
    assert_eq!(rustix::io::pread(image.fd(), memory.bytes(), 0), Ok(block), "{what}");
    assert!(memory.bytes().iter().all(|byte| *byte == 7), "{what}: not what was written");
    if !source.read_only {
        memory.bytes().fill(9);
        let last = g.size - block as u64;
        assert_eq!(rustix::io::pwrite(image.fd(), memory.bytes(), last), Ok(block), "{what}");
        let mut seen = vec![0; block];
        File::open(&path).unwrap().read_exact_at(&mut seen, last).unwrap();
        assert!(seen.iter().all(|byte| *byte == 9), "{what}");
    } else {
        let written = rustix::io::pwrite(image.fd(), memory.bytes(), 0);
        assert_eq!(written, Err(rustix::io::Errno::BADF), "{what}");
    }
    assert!(!(g.can_discard && source.read_only), "{what}");
    if g.can_discard {
        let mode = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
        let granularity = u64::from(g.discard_granularity);
        let before = fs::metadata(&path).unwrap().blocks();
        rustix::fs::fallocate(image.fd(), mode, 0, granularity).unwrap();
        let after = fs::metadata(&path).unwrap().blocks();
        assert!(after < before, "{what}: {granularity} bytes were not freed");
    }

    // Live resize, and an impossible one.
    let file = OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len(5 * MIB + 100).unwrap();
    assert_eq!(image.current_geometry().unwrap().size, 5 * MIB, "{what}");
    file.set_len(0).unwrap();
    refused(image.current_geometry(), Kind::Invalid, "is empty");
    assert_eq!(image.geometry(), g, "{what}: looking again must change nothing");

    // The file and its identity remain after an unlink.
    let identity = image.identity();
    fs::remove_file(&path).unwrap();
    file.set_len(MIB).unwrap();
    assert_eq!(image.current_geometry().unwrap().size, MIB, "{what}");
    assert_eq!(image.identity(), identity);
    println!("{what}: {g:?}");
    g
}

fn check_directory(directory: &Path, what: &str) {
    let writable = check_image(directory, &PLAIN, what);
    assert!(writable.can_discard && writable.can_write_zeroes, "{what}");
    let read_only = check_image(directory, &READ_ONLY, what);
    assert!(read_only.read_only && !read_only.can_discard);
    let buffered = check_image(directory, &BUFFERED, what);
    assert_eq!((buffered.block_size, buffered.dma_align), (512, 512), "{what}");
}

#[test]
fn takes_images_on_the_local_disk() {
    check_directory(temporary().path(), "disk");
}

#[test]
fn takes_images_on_tmpfs() {
    match tempfile::tempdir_in("/dev/shm") {
        Ok(directory) => check_directory(directory.path(), "tmpfs"),
        Err(e) => skipped(&format!("no /dev/shm: {e}")),
    }
}

#[test]
fn takes_images_on_all_file_systems() {
    for (mkfs, sector, block_size, granularity) in [
        ("mkfs.xfs -q", 512, 512, 4096),
        ("mkfs.xfs -q -b size=1024", 512, 512, 1024),
        ("mkfs.xfs -q -s size=4096", 4096, 4096, 4096),
        ("mkfs.ext4 -q -b 4096", 512, 512, 4096),
        ("mkfs.ext4 -q -b 1024", 512, 512, 1024),
        ("mkfs.ext4 -q -b 4096", 4096, 4096, 4096),
        ("mkfs.btrfs -q", 512, 4096, 4096),
    ] {
        let what = format!("{mkfs} on sectors of {sector}");
        let Some(mounted) = Mounted::new(mkfs, sector, "") else {
            continue;
        };
        check_directory(mounted.path(), &what);
        let g = check_image(mounted.path(), &PLAIN, &what);
        assert_eq!((g.block_size, g.discard_granularity), (block_size, granularity), "{what}");
    }
}

#[test]
fn serves_only_buffered_without_direct_io() {
    let Some(mounted) = Mounted::new("mkfs.ext4 -q", 512, "data=journal") else {
        return;
    };
    let path = mounted.path().join("image");
    image_file(&path, MIB);
    refused(attach(&path, &PLAIN), Kind::Unsupported, "does not support direct I/O on");
    attach(&path, &BUFFERED).unwrap();
}

#[test]
fn takes_block_devices() {
    let directory = temporary();
    let path = directory.path().join("image");
    image_file(&path, 64 * MIB);
    for sector in [512, 4096] {
        let Some(device) = loop_device(&path, sector) else {
            return;
        };
        let image = attach(device.path(), &PLAIN).unwrap();
        assert!(image.is_block_device());
        let g = image.geometry();
        assert_eq!((g.size, g.block_size), (64 * MIB, sector));
        assert!(g.can_write_zeroes);
        println!("loop device: {g:?}");

        let size_limit = ImageSpec { offset: MIB, size_limit: 2 * MIB, ..PLAIN };
        let part = attach(device.path(), &size_limit).unwrap();
        assert_eq!((part.geometry().offset, part.geometry().size), (MIB, 2 * MIB));
        assert_eq!(part.identity(), image.identity());

        // Another node of the same device is the same image.
        let node = directory.path().join("node");
        let number = fs::metadata(device.path()).unwrap().rdev();
        let (major, minor) = (rustix::fs::major(number), rustix::fs::minor(number));
        run(&format!("mknod {} b {major} {minor}", node.display())).unwrap();
        assert_eq!(attach(&node, &READ_ONLY).unwrap().identity(), image.identity());
        Image::reopen(&node, &PLAIN, &image.identity(), &image.geometry()).unwrap();
        fs::remove_file(&node).unwrap();

        // Live resize.
        OpenOptions::new().write(true).open(&path).unwrap().set_len(65 * MIB).unwrap();
        run(&format!("losetup --set-capacity {}", device.path().display())).unwrap();
        assert_eq!(image.current_geometry().unwrap().size, 65 * MIB);
        image_file(&path, 64 * MIB);
    }
}

#[test]
fn takes_the_largest_sparse_file() {
    let Some(mounted) = Mounted::new("mkfs.xfs -q", 512, "") else {
        return;
    };
    let path = mounted.path().join("image");
    image_file(&path, i64::MAX as u64);
    let image = attach(&path, &PLAIN).unwrap();
    assert_eq!(image.geometry().size, i64::MAX as u64 - 511);
    let end = ImageSpec { offset: i64::MAX as u64 - 511, ..PLAIN };
    refused(attach(&path, &end), Kind::Invalid, "511 bytes of");
    let end = ImageSpec { offset: i64::MAX as u64 - 1023, ..PLAIN };
    assert_eq!(attach(&path, &end).unwrap().geometry().size, 512);
}

#[test]
fn drops_cached_pages() {
    let directory = temporary();
    let path = directory.path().join("image");
    fs::write(&path, vec![1; 4 * MIB as usize]).unwrap();
    let cached = || {
        let command = format!("fincore --bytes --noheadings --output RES {}", path.display());
        run(&command).map(|text| text.trim().parse::<u64>().unwrap())
    };
    match cached() {
        Ok(before) => assert!(before > 0, "the test itself is wrong"),
        Err(why) => return skipped(&why),
    }
    let _image = attach(&path, &PLAIN).unwrap();
    assert_eq!(cached(), Ok(0));
}
