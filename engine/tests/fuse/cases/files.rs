// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Properties of files: size, blocks, truncation, holes, cached and direct I/O.

mod caching;

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::time::Duration;

use rustix::fs::{FallocateFlags, fallocate};

use caching::{cached_and_direct, cached_load, durable, full_store, more_requests_than_tags};

use super::MIB;
use crate::daemon::Daemon;
use crate::disk::{self, Disk, same};
use crate::harness::{At, Case, Ctx, Needs, Res, case, ensure, fail, skip};
use crate::model::pattern;
use crate::store::{Mount, Store, mkfs};
use crate::{fio, tools};

const RUN: Duration = Duration::from_secs(120);

pub(super) fn cases() -> Vec<Case> {
    vec![
        case("files::metadata", Needs::Ublk, 60, metadata),
        case("files::block_sizes", Needs::Ublk, 60, block_sizes),
        case("files::copies", Needs::Ublk, 90, copies),
        case("files::truncation", Needs::Ublk, 60, truncation),
        case("files::past_the_end", Needs::Ublk, 90, past_the_end),
        case("files::read_only", Needs::Ublk, 60, read_only),
        case("files::holes", Needs::Ublk, 60, holes),
        case("files::unsupported_operations", Needs::Ublk, 60, unsupported_operations),
        case("files::cached_and_direct_agree", Needs::Ublk, 120, cached_and_direct),
        case("files::verified_through_the_cache", Needs::Ublk, 180, cached_load),
        case("files::more_requests_than_tags", Needs::Ublk, 180, more_requests_than_tags),
        case("files::durable_writes", Needs::Ublk, 60, durable),
        case("files::qemu_img", Needs::Ublk, 90, qemu_img),
        case("files::grow_below_a_loop_device", Needs::Ublk, 120, grow),
        case("files::full_store_seen_by_the_cache", Needs::Ublk, 90, full_store),
    ]
}

fn open(device: &str) -> Res<File> {
    OpenOptions::new().read(true).write(true).open(device).at(device)
}

#[track_caller]
fn errno<T: std::fmt::Debug>(what: &str, result: std::io::Result<T>, expected: i32) -> Res {
    match result {
        Err(error) if error.raw_os_error() == Some(expected) => Ok(()),
        other => fail!("{what}: {other:?}, expected errno {expected}"),
    }
}

/// `ls -l` shows a file of the device's size; `list` shows its I/O mode.
fn metadata(ctx: &Ctx) -> Res {
    let store = Store::ext4(ctx)?;
    let image = store.sparse("image", 8 * MIB)?;
    let daemon = Daemon::start(ctx)?;
    let device = daemon.attach(&[&image])?;
    let meta = std::fs::symlink_metadata(&device)?;
    ensure!(meta.is_file() && meta.len() == 8 * MIB, "not a file of 8 MiB: {meta:?}");
    ensure!((meta.mode() & 0o7777, meta.uid(), meta.gid()) == (0o600, 0, 0), "mode or owner: {meta:?}");
    let info = daemon.info(&device)?;
    ensure!(info["ioMode"] == "fuse" && info["node"] == device.as_str(), "list: {info}");
    // As with a node in /dev, owner and mode can be changed.
    tools::ok(&["chown", "12:34", &device])?;
    tools::ok(&["chmod", "640", &device])?;
    let meta = std::fs::metadata(&device)?;
    ensure!((meta.mode() & 0o7777, meta.uid(), meta.gid()) == (0o640, 12, 34), "mode or owner: {meta:?}");
    let other = tools::run(&["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "cat", &device])?;
    ensure!(other.code != 0, "another user read the file");
    let features = daemon.json(&["features"])?;
    ensure!(features["backends"].as_array().is_some_and(|f| f.iter().any(|f| f == "fuse")), "{features}");
    let other = store.sparse("other", MIB)?;
    for (words, code) in [(&["attach", &other, "--io-mode", "auto"][..], 7), (&["attach", &device], 2)] {
        let done = daemon.cli(words)?;
        ensure!(done.code == code && done.err.trim_end().lines().count() == 1, "{words:?}: {done:?}");
    }
    daemon.detach(&device)?;
    let again = daemon.attach(&[&image, "--io-mode", "fuse", "--number", "5"])?;
    ensure!(again.ends_with("/default/loop5"), "number 5 is {again}");
    daemon.detach(&again)?;
    daemon.stop()
}

fn block_sizes(ctx: &Ctx) -> Res {
    let store = Store::ext4(ctx)?;
    let image = store.sparse("image", 8 * MIB)?;
    let daemon = Daemon::start(ctx)?;
    for size in [512_usize, 4096] {
        let device = daemon.attach(&[&image, "--block-size", &size.to_string()])?;
        ensure!(daemon.info(&device)?["blockSizeBytes"] == size, "list shows another block size");
        let disk = Disk::open(&device)?;
        let data = pattern(size as u64, size);
        disk.write(3 * size as u64, &data)?;
        same("a block", &disk.read(3 * size as u64, size)?, &data)?;
        errno("half a block", disk.try_write(0, &vec![1; size / 2]), libc::EINVAL)?;
        errno("between blocks", disk.try_write(size as u64 / 2, &vec![1; size]), libc::EINVAL)?;
        errno("reading half a block", disk.try_read(0, size / 2), libc::EINVAL)?;
        drop(disk);
        // Cached I/O allows any offset and length.
        let file = open(&device)?;
        file.write_all_at(b"anything", 70_001)?;
        file.sync_all()?;
        drop(file);
        daemon.detach(&device)?;
        let found = Disk::open_read(&image)?.read(17 * 4096, 4096)?;
        same("image", &found[369..377], b"anything")?;
        ensure!(found.iter().filter(|byte| **byte != 0).count() == 8, "adjacent bytes were changed");
    }
    daemon.stop()
}

/// cp in and out. Holes of the source replace old content.
fn copies(ctx: &Ctx) -> Res {
    const SIZE: u64 = 32 * MIB;
    let store = Store::ext4(ctx)?;
    let image = store.allocated("image", SIZE)?;
    disk::write_all(&image, &pattern(1, usize::try_from(SIZE)?))?;
    let source = store.sparse("source", SIZE)?;
    File::options().write(true).open(&source)?.write_all_at(&pattern(2, 5 << 20), 3 * MIB + 777)?;
    let expected = std::fs::read(&source)?;
    let daemon = Daemon::start(ctx)?;
    let device = daemon.attach(&[&image])?;
    let out = store.path("out");
    tools::ok(&["cp", &device, &out])?;
    same("copied out", &std::fs::read(&out)?, &pattern(1, usize::try_from(SIZE)?))?;
    tools::ok(&["cp", &source, &device])?;
    ensure!(disk::size(&device)? == SIZE, "{} bytes after cp", disk::size(&device)?);
    tools::ok(&["cp", &device, &out])?;
    same("copied in, and out again", &std::fs::read(&out)?, &expected)?;
    daemon.detach(&device)?;
    same("image", &std::fs::read(&image)?, &expected)?;
    // Copy a part: the rest stays.
    let device = daemon.attach(&[&image])?;
    tools::ok(&[
        "dd",
        &format!("if={out}"),
        &format!("of={device}"),
        "bs=1M",
        "count=1",
        "seek=20",
        "conv=notrunc",
    ])?;
    daemon.detach(&device)?;
    let mut after = expected.clone();
    after.copy_within(0..1 << 20, 20 << 20);
    same("after dd", &std::fs::read(&image)?, &after)?;
    daemon.stop()
}

fn truncating_at(device: &str) -> std::io::Result<File> {
    OpenOptions::new().write(true).truncate(true).open(device)
}

fn truncation(ctx: &Ctx) -> Res {
    const SIZE: u64 = 8 * MIB;
    let store = Store::ext4(ctx)?;
    let image = store.allocated("image", SIZE)?;
    let data = pattern(3, usize::try_from(SIZE)?);
    disk::write_all(&image, &data)?;
    let daemon = Daemon::start(ctx)?;
    let device = daemon.attach(&[&image])?;
    let file = open(&device)?;
    // Dirty pages, which must not come back.
    file.write_all_at(&data[..4096], 0)?;
    let truncating = || truncating_at(&device);
    errno("O_TRUNC with another opener", truncating(), libc::EBUSY)?;
    errno("a smaller size", file.set_len(MIB), libc::EPERM)?;
    errno("a larger size", file.set_len(2 * SIZE), libc::ENOSPC)?;
    file.set_len(SIZE).at("the same size")?;
    same("after refused truncations", &std::fs::read(&device)?, &data)?;
    drop(file);
    // A descriptor that has just been closed does not count.
    for _ in 0..50 {
        drop(open(&device)?);
        let file = truncating().at("O_TRUNC right after a close")?;
        ensure!(file.metadata()?.len() == SIZE, "the size changed");
    }
    same("emptied", &std::fs::read(&device)?, &vec![0; data.len()])?;
    ensure!(disk::allocated(&image)? < MIB, "blocks were not freed");
    daemon.detach(&device)?;
    // Too large to zero with one request.
    let image = store.sparse("large", 5 << 30)?;
    let device = daemon.attach(&[&image])?;
    for at in [0, (2 << 30) - 4096, (5 << 30) - 4096] {
        open(&device)?.write_all_at(&data[..4096], at)?;
    }
    drop(truncating_at(&device).at("O_TRUNC of 5 GiB")?);
    for at in [0, (2 << 30) - 4096, (5 << 30) - 4096] {
        same("emptied", &Disk::open_read(&device)?.read(at, 4096)?, &[0; 4096])?;
    }
    daemon.detach(&device)?;
    daemon.stop()
}

/// The part within the size is written, the rest fails with ENOSPC: direct writes at once, cached
/// ones at fsync.
fn past_the_end(ctx: &Ctx) -> Res {
    // Neither whole pages nor whole blocks of 4096 bytes.
    const SIZE: u64 = MIB + 3 * 512;
    let store = Store::ext4(ctx)?;
    let image = store.sparse("image", SIZE)?;
    let daemon = Daemon::start(ctx)?;
    let device = daemon.attach(&[&image, "--block-size", "512"])?;
    let data = pattern(4, 2 << 20);
    let len = usize::try_from(SIZE)?;
    for direct in [false, true] {
        let mut options = OpenOptions::new();
        options.read(true).write(true);
        if direct {
            let disk = Disk::open(&device)?;
            let done = disk.try_write(SIZE - 1024, &data[..4096])?;
            ensure!(done == 1024, "a direct write across the end took {done} bytes");
            errno("a direct write past the end", disk.try_write(SIZE, &data[..512]), libc::ENOSPC)?;
            errno("far past the end", disk.try_write(64 * MIB, &data[..4096]), libc::ENOSPC)?;
            ensure!(disk.try_read(SIZE, 4096)?.is_empty(), "a direct read past the end returned data");
        } else {
            let file = options.open(&device)?;
            let _ = file.write_all_at(&data, 0);
            errno("fsync after writing past the end", file.sync_all(), libc::ENOSPC)?;
        }
        // The kernel learns the true size a moment later.
        let shown = tools::until(Duration::from_secs(5), || {
            std::fs::metadata(&device).ok().filter(|meta| meta.len() == SIZE)
        });
        ensure!(shown.is_some(), "the size is {}, expected {SIZE}", std::fs::metadata(&device)?.len());
        let found = std::fs::read(&device)?;
        same("within the size", &found[..len - 1024], &data[..len - 1024])?;
        let tail = if direct { &data[..1024] } else { &data[len - 1024..len] };
        same("the last blocks", &found[len - 1024..], tail)?;
    }
    ensure!(std::fs::metadata(&image)?.len() == SIZE, "the image grew");
    daemon.detach(&device)?;
    same("image", &std::fs::read(&image)?[..4096], &data[..4096])?;
    daemon.stop()
}

fn read_only(ctx: &Ctx) -> Res {
    let store = Store::ext4(ctx)?;
    let image = store.sparse("image", 64 * MIB)?;
    mkfs("ext4", &image)?;
    let before = tools::ok(&["sha256sum", &image])?;
    // Not even root can open it for writing: attach must not try.
    tools::ok(&["chattr", "+i", &image])?;
    let daemon = Daemon::start(ctx)?;
    let device = daemon.attach(&[&image, "--read-only"])?;
    ensure!(std::fs::metadata(&device)?.mode() & 0o777 == 0o400, "the mode is not 0400");
    errno("open for writing", OpenOptions::new().write(true).open(&device), libc::EROFS)?;
    errno("truncation", OpenOptions::new().write(true).truncate(true).open(&device), libc::EROFS)?;
    tools::ok(&["chmod", "600", &device])?;
    ensure!(std::fs::metadata(&device)?.mode() & 0o222 == 0, "the mode is writable");
    let mount = Mount::new(&device, &ctx.path("mnt"), &["-o", "loop,ro,noload"])?;
    tools::ok(&["ls", &mount.dir])?;
    mount.umount()?;
    let second = daemon.attach(&[&image, "--read-only"])?;
    same("the second reader", &std::fs::read(&second)?, &std::fs::read(&device)?)?;
    daemon.ok(&["detach", "--all"])?;
    tools::ok(&["chattr", "-i", &image])?;
    ensure!(tools::ok(&["sha256sum", &image])? == before, "the image changed");
    daemon.stop()
}

/// fallocate zeroes exactly the requested bytes.
fn holes(ctx: &Ctx) -> Res {
    const SIZE: u64 = 8 * MIB;
    let store = Store::ext4(ctx)?;
    let image = store.allocated("image", SIZE)?;
    let mut model = pattern(5, usize::try_from(SIZE)?);
    disk::write_all(&image, &model)?;
    let daemon = Daemon::start(ctx)?;
    let device = daemon.attach(&[&image])?;
    let file = open(&device)?;
    // Dirty pages: punched data must not come back from the cache.
    file.write_all_at(&[7; 8192], MIB)?;
    model[1 << 20..(1 << 20) + 8192].fill(7);
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    for (flags, offset, len) in [
        (punch, MIB - 100, 5000),
        (punch, 2 * MIB, 2 * MIB),
        (FallocateFlags::ZERO_RANGE, 5 * MIB + 13, 1),
        (FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE, 5 * MIB + 4096, 70_000),
        (punch, SIZE - 4096, MIB),
    ] {
        fallocate(&file, flags, offset, len).map_err(|error| format!("{flags:?} {offset} {len}: {error}"))?;
        let (start, end) = (usize::try_from(offset)?, usize::try_from((offset + len).min(SIZE))?);
        model[start..end].fill(0);
    }
    let refused = fallocate(&file, FallocateFlags::ZERO_RANGE, SIZE - 4096, 8192);
    ensure!(refused == Err(rustix::io::Errno::NOSPC), "zeroing past the end: {refused:?}");
    let refused = fallocate(&file, FallocateFlags::COLLAPSE_RANGE, 0, 4096);
    ensure!(refused == Err(rustix::io::Errno::OPNOTSUPP), "another mode: {refused:?}");
    same("cached", &std::fs::read(&device)?, &model)?;
    file.sync_all()?;
    same("direct", &disk::read_all(&device, 0, SIZE)?, &model)?;
    drop(file);
    daemon.detach(&device)?;
    same("image", &std::fs::read(&image)?, &model)?;
    ensure!(disk::allocated(&image)? <= SIZE - 2 * MIB, "no block was freed");
    daemon.stop()
}

/// The directory contains the attached devices, and refuses other entries.
fn unsupported_operations(ctx: &Ctx) -> Res {
    let store = Store::ext4(ctx)?;
    let image = store.sparse("image", MIB)?;
    let daemon = Daemon::start(ctx)?;
    let device = daemon.attach(&[&image])?;
    let dir = std::path::Path::new(&device).parent().ok_or("no parent")?.to_owned();
    let (new, path) = (dir.join("new"), std::path::Path::new(&device));
    errno("create", File::create(&new), libc::EPERM)?;
    errno("mkdir", std::fs::create_dir(&new), libc::EPERM)?;
    errno("unlink", std::fs::remove_file(path), libc::EPERM)?;
    errno("rename", std::fs::rename(path, &new), libc::EPERM)?;
    errno("link", std::fs::hard_link(path, &new), libc::EPERM)?;
    errno("symlink", std::os::unix::fs::symlink("x", &new), libc::EPERM)?;
    errno("an unknown name", File::open(dir.join("loop1")), libc::ENOENT)?;
    let names: Vec<_> = std::fs::read_dir(&dir)?.flatten().map(|entry| entry.file_name()).collect();
    ensure!(names == ["loop0"], "{names:?}");
    daemon.detach(&device)?;
    ensure!(std::fs::read_dir(&dir)?.next().is_none(), "the name stayed");
    daemon.stop()
}

/// qemu-img converts into the file, and compares.
fn qemu_img(ctx: &Ctx) -> Res {
    if tools::run(&["sh", "-c", "command -v qemu-img"])?.code != 0 {
        skip!("qemu-img is not installed");
    }
    let store = Store::ext4(ctx)?;
    let image = store.sparse("image", 16 * MIB)?;
    let source = store.sparse("source", 16 * MIB)?;
    File::options().write(true).open(&source)?.write_all_at(&pattern(6, 3 << 20), 5 * MIB)?;
    let qcow = store.path("source.qcow2");
    tools::ok(&["qemu-img", "convert", "-f", "raw", "-O", "qcow2", &source, &qcow])?;
    let daemon = Daemon::start(ctx)?;
    let device = daemon.attach(&[&image])?;
    for cache in ["writeback", "none"] {
        tools::ok(&["qemu-img", "convert", "-n", "-t", cache, "-O", "raw", &qcow, &device])?;
        tools::ok(&["qemu-img", "compare", "-f", "raw", "-F", "qcow2", &device, &qcow])?;
    }
    daemon.detach(&device)?;
    same("image", &std::fs::read(&image)?, &std::fs::read(&source)?)?;
    daemon.stop()
}

/// Image, file, loop device and file system grow while they are in use.
fn grow(ctx: &Ctx) -> Res {
    let store = Store::ext4(ctx)?;
    let image = store.sparse("image", 400 * MIB)?;
    let daemon = Daemon::start(ctx)?;
    let device = daemon.attach(&[&image])?;
    mkfs("xfs", &device)?;
    let mount = Mount::new(&device, &ctx.path("mnt"), &["-o", "loop"])?;
    let node = tools::ok(&["findmnt", "-no", "SOURCE", &mount.dir])?;
    File::options().write(true).open(&image)?.set_len(600 * MIB)?;
    daemon.ok(&["resize", &device])?;
    ensure!(disk::size(&device)? == 600 * MIB, "{} bytes", disk::size(&device)?);
    tools::ok(&["losetup", "--set-capacity", &node])?;
    tools::ok(&["xfs_growfs", &mount.dir])?;
    std::fs::write(format!("{}/large", mount.dir), pattern(10, 420 << 20))?;
    mount.umount()?;
    // Daemons of other tests, which start meanwhile, have copies of all mounts until they end.
    let is_mounted =
        || errno("", OpenOptions::new().read(true).custom_flags(libc::O_EXCL).open(&node), libc::EBUSY);
    let gone = tools::until(Duration::from_secs(30), || is_mounted().is_err().then_some(()));
    ensure!(gone.is_some(), "{node} is still mounted in another mount namespace");
    crate::store::fsck("xfs", &device)?;
    daemon.detach(&device)?;
    crate::store::fsck("xfs", &image)?;
    daemon.stop()
}
