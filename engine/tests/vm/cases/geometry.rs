// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Geometry of devices: block size, size, offset into the image. Read-only devices.

use super::{KIB, MIB};
use crate::daemon::{Daemon, queue_attribute};
use crate::disk::{self, Disk, same};
use crate::harness::{Case, Ctx, Needs, Res, case, ensure};
use crate::model::pattern;
use crate::store::{self, Mount, Shape, Store};
use crate::tools;

pub(super) fn cases() -> Vec<Case> {
    vec![
        case("geometry::block_sizes", Needs::Ublk, 90, block_sizes),
        case("geometry::large_sectors_below", Needs::Ublk, 90, large_sectors_below),
        case("geometry::read_only", Needs::Ublk, 120, read_only),
        case("geometry::offset_and_limit", Needs::Ublk, 90, offset_and_limit),
        case("geometry::odd_size", Needs::Ublk, 60, odd_size),
        case("geometry::block_device_as_image", Needs::Ublk, 90, block_device),
        case("geometry::scheduler_and_cache", Needs::Ublk, 60, scheduler),
    ]
}

/// Zeroes a range with blkdiscard or, if the device is a file, with fallocate.
fn zero(device: &str, offset: u64, len: u64) -> Res {
    let (offset, len) = (offset.to_string(), len.to_string());
    match crate::BACKEND {
        "ublk" | "loop" => tools::ok(&["blkdiscard", "-z", "-o", &offset, "-l", &len, device])?,
        _ => tools::ok(&["fallocate", "--zero-range", "-o", &offset, "-l", &len, device])?,
    };
    Ok(())
}

/// Whether the kernel's own loop devices can have blocks larger than a page.
pub(super) fn kernel_has_large_blocks(store: &Store) -> Res<bool> {
    let image = store.sparse("large-blocks", MIB)?;
    let bound = tools::run(&["losetup", "-f", "--show", "-b", "65536", &image])?;
    if bound.code == 0 {
        tools::ok(&["losetup", "-d", bound.out.trim()])?;
    }
    Ok(bound.code == 0)
}

fn block_sizes(ctx: &Ctx) -> Res {
    let store = Store::xfs(ctx)?;
    let image = store.sparse("image", 8 * MIB)?;
    let daemon = Daemon::start(ctx)?;
    let large = crate::BACKEND == "loop" && kernel_has_large_blocks(&store)?;
    for size in
        [512_usize, 1024, 2048, 4096].into_iter().chain(large.then_some([8192, 65536]).into_iter().flatten())
    {
        let device = daemon.attach(&[&image, "--block-size", &size.to_string()])?;
        let shown = queue_attribute(&device, "logical_block_size")?;
        ensure!(shown == size.to_string(), "asked for {size}, got {shown}");
        ensure!(daemon.info(&device)?["blockSizeBytes"] == size, "list shows another block size");
        let disk = Disk::open(&device)?;
        let data = pattern(size as u64, size);
        // An odd block number, to detect a smaller alignment.
        disk.write(3 * size as u64, &data)?;
        same("a block", &disk.read(3 * size as u64, size)?, &data)?;
        if size > 512 {
            let refused = disk.try_write(512, &[1; 512]);
            ensure!(refused.is_err(), "wrote 512 bytes to a device with blocks of {size}");
        }
        drop(disk);
        daemon.detach(&device)?;
        let found = Disk::open_read(&image)?.read(3 * size as u64, size)?;
        same("image", &found, &data)?;
    }
    if !large {
        let refused = daemon.cli(&["attach", &image, "--block-size", "64K"])?;
        ensure!(refused.code != 0 && !refused.err.is_empty(), "{refused:?}");
        ensure!(daemon.json(&["list"])?.as_array().is_some_and(Vec::is_empty), "a refused device is listed");
    }
    let device = daemon.attach(&[&image])?;
    let shown = queue_attribute(&device, "logical_block_size")?;
    ensure!(shown == "512", "the default block size is {shown}, expected 512");
    daemon.detach(&device)?;
    daemon.stop()
}

/// If direct I/O needs blocks of 4096 bytes, devices have them, and 512 is refused.
fn large_sectors_below(ctx: &Ctx) -> Res {
    let shape = Shape { block_size: 4096, ..Shape::default() };
    let store = Store::new(ctx, "ext4", &shape)?;
    let image = store.sparse("image", 8 * MIB)?;
    let daemon = Daemon::start(ctx)?;
    let device = daemon.attach(&[&image])?;
    let shown = queue_attribute(&device, "logical_block_size")?;
    ensure!(shown == "4096", "logical block size {shown} on 4K sectors");
    let disk = Disk::open(&device)?;
    let data = pattern(1, 12288);
    disk.write(4096, &data)?;
    same("device", &disk.read(4096, 12288)?, &data)?;
    drop(disk);
    daemon.detach(&device)?;
    let refused = daemon.cli(&["attach", &image, "--block-size", "512"])?;
    ensure!(refused.code == 2 && refused.err.contains("4096"), "512 on 4K sectors: {refused:?}");
    daemon.stop()
}

fn read_only(ctx: &Ctx) -> Res {
    let store = Store::xfs(ctx)?;
    let image = store.sparse("image", 64 * MIB)?;
    store::mkfs("ext4", &image)?;
    let before = tools::ok(&["sha256sum", &image])?;
    // Not even root can open it for writing: attach must not try.
    tools::ok(&["chattr", "+i", &image])?;
    let daemon = Daemon::start(ctx)?;
    let device = daemon.attach(&[&image, "--read-only"])?;
    ensure!(tools::ok(&["blockdev", "--getro", &device])? == "1", "not read-only");
    ensure!(daemon.info(&device)?["readOnly"] == true, "list says writable");
    if let Ok(disk) = Disk::open(&device) {
        let written = disk.try_write(0, &[1; 4096]);
        ensure!(written.is_err(), "wrote to a read-only device");
    }
    let discard = tools::run(&["blkdiscard", "-f", &device])?;
    ensure!(discard.code != 0, "discarded blocks of a read-only device");
    let mount = Mount::new(&device, &ctx.path("mnt"), &["-o", "ro,noload"])?;
    tools::ok(&["ls", &mount.dir])?;
    let touched = tools::run(&["touch", &format!("{}/file", mount.dir)])?;
    ensure!(touched.code != 0, "created a file on a read-only device");
    mount.umount()?;
    // Readers may share an image.
    let second = daemon.attach(&[&image, "--read-only"])?;
    let (one, two) = (disk::read_all(&device, 0, MIB)?, disk::read_all(&second, 0, MIB)?);
    same("the second reader", &two, &one)?;
    daemon.ok(&["detach", "--all"])?;
    tools::ok(&["chattr", "-i", &image])?;
    ensure!(tools::ok(&["sha256sum", &image])? == before, "the image changed");
    daemon.stop()
}

/// A device is a window of its image: the rest is neither visible nor changed.
fn offset_and_limit(ctx: &Ctx) -> Res {
    const OFFSET: u64 = MIB + 512;
    const LIMIT: u64 = 3 * MIB + 1024;
    let store = Store::xfs(ctx)?;
    let image = store.allocated("image", 8 * MIB)?;
    let mut expected = pattern(5, 8 << 20);
    disk::write_all(&image, &expected)?;
    let daemon = Daemon::start(ctx)?;
    let (offset, limit) = (OFFSET.to_string(), LIMIT.to_string());
    let device = daemon.attach(&[&image, "--offset", &offset, "--size-limit", &limit])?;
    ensure!(disk::size(&device)? == LIMIT, "size {} instead of {LIMIT}", disk::size(&device)?);
    let window = usize::try_from(OFFSET)?..usize::try_from(OFFSET + LIMIT)?;
    same("window", &disk::read_all(&device, 0, LIMIT)?, &expected[window.clone()])?;
    let disk = Disk::open(&device)?;
    for at in [0, 64 * KIB + 512, LIMIT - 512] {
        let data = pattern(at, 512);
        disk.write(at, &data)?;
        let start = usize::try_from(OFFSET + at)?;
        expected[start..start + 512].copy_from_slice(&data);
    }
    ensure!(disk.try_write(LIMIT, &[1; 512]).is_err(), "wrote past the end");
    drop(disk);
    // Zero the whole window, and not a byte more.
    zero(&device, 0, LIMIT)?;
    expected[window].fill(0);
    daemon.detach(&device)?;
    same("image", &disk::read_all(&image, 0, 8 * MIB)?, &expected)?;

    let device = daemon.attach(&[&image, "--offset", "7M", "--size-limit", "1G"])?;
    ensure!(disk::size(&device)? == MIB, "a size limit past the end of the image enlarges the device");
    daemon.detach(&device)?;
    daemon.stop()
}

/// Refuses an image that is not whole blocks, and suggests --size-limit. With that, the rest of the
/// image stays unchanged.
fn odd_size(ctx: &Ctx) -> Res {
    const SIZE: u64 = MIB + 3 * 512 + 100;
    let store = Store::xfs(ctx)?;
    let image = store.path("image");
    let data = pattern(6, usize::try_from(SIZE)?);
    std::fs::write(&image, &data)?;
    let daemon = Daemon::start(ctx)?;
    for (block, size) in [("512", MIB + 3 * 512), ("4096", MIB)] {
        let limit = size.to_string();
        let refused = daemon.cli(&["attach", &image, "--block-size", block])?;
        ensure!(
            refused.code == 2 && refused.err.contains(&format!("--size-limit {limit}")),
            "{SIZE} bytes with blocks of {block}: {refused:?}"
        );
        let device = daemon.attach(&[&image, "--block-size", block, "--size-limit", &limit])?;
        ensure!(disk::size(&device)? == size, "{} bytes with blocks of {block}", disk::size(&device)?);
        let found = disk::read_all(&device, 0, size)?;
        same("device", &found, &data[..usize::try_from(size)?])?;
        daemon.detach(&device)?;
    }
    let shown = MIB + 3 * 512;
    let device = daemon.attach(&[&image, "--block-size", "512", "--size-limit", &shown.to_string()])?;
    let zeroes = vec![0; usize::try_from(shown)?];
    disk::write_all(&device, &zeroes)?;
    daemon.detach(&device)?;
    let after = std::fs::read(&image)?;
    same("within the limit", &after[..zeroes.len()], &zeroes)?;
    same("the rest", &after[zeroes.len()..], &data[zeroes.len()..])?;
    daemon.stop()
}

/// An image may be a block device.
fn block_device(ctx: &Ctx) -> Res {
    let below = store::Disk::new(&Shape { size_mib: 64, ..Shape::default() })?;
    let data = pattern(8, 2 << 20);
    let daemon = Daemon::start(ctx)?;
    let words = ["--offset", "8M", "--size-limit", "32M"];
    let device = daemon.attach(&[&[&below.node()[..]], &words[..]].concat())?;
    ensure!(disk::size(&device)? == 32 * MIB, "size {}", disk::size(&device)?);
    disk::write_all(&device, &data)?;
    let found = Disk::open_read(&below.node())?.read(8 * MIB, 2 << 20)?;
    same("the device below", &found, &data)?;
    zero(&device, 512, 1536)?;
    let found = Disk::open_read(&device)?.read(0, 4096)?;
    same("start", &found[..512], &data[..512])?;
    same("zeroed", &found[512..2048], &[0; 1536])?;
    same("after it", &found[2048..], &data[2048..4096])?;
    daemon.detach(&device)?;
    daemon.stop()
}

/// No scheduler, which would undo batching; a volatile cache and FUA, so that flushes arrive.
fn scheduler(ctx: &Ctx) -> Res {
    let store = Store::xfs(ctx)?;
    let image = store.sparse("image", 8 * MIB)?;
    let daemon = Daemon::start(ctx)?;
    for queues in ["1", "2"] {
        let device = daemon.attach(&[&image, "--queues", queues])?;
        let chosen = queue_attribute(&device, "scheduler")?;
        ensure!(chosen.contains("[none]"), "scheduler {chosen} with {queues} queues");
        for (name, value) in [("write_cache", "write back"), ("fua", "1"), ("rotational", "0")] {
            let found = queue_attribute(&device, name)?;
            ensure!(found == value, "{name} is {found:?}, expected {value:?}");
        }
        daemon.detach(&device)?;
    }
    daemon.stop()
}
