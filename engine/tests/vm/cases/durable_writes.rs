// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `attach --durable`: each write is durable when it completes, and nobody flushes.
//!
//! The store has a volatile cache, which a power cut empties. Files that would make such writes slow
//! are refused.

use std::io::Write;

use super::MIB;
use crate::daemon::{self, Daemon};
use crate::disk::{Disk, same};
use crate::harness::{At, Case, Ctx, Needs, Res, case, ensure};
use crate::model::pattern;
use crate::store::{Mount, Shape, Store};
use crate::tools;

pub(super) fn cases() -> Vec<Case> {
    let mut all = vec![case("durable_writes::refused", Needs::Ublk, 180, refused)];
    all.push(case("durable_writes::refused_without_fua", Needs::Ublk, 90, refused_without_fua));
    all.push(case("durable_writes::grows", Needs::Resize, 120, grows));
    for kind in ["xfs", "ext4"] {
        all.push(case(
            format!("durable_writes::power_cut::{kind}"),
            Needs::Recovery("copy"),
            240,
            move |ctx| power_cut(ctx, kind),
        ));
    }
    all.push(case("durable_writes::power_cut::record_lost", Needs::Recovery("copy"), 180, record_lost));
    all
}

/// A device with a volatile write cache that requests can write through.
fn cached() -> Shape {
    Shape { cache_mib: 64, fua: true, ..Shape::default() }
}

/// An image without holes.
fn written(store: &Store, name: &str, bytes: u64) -> Res<String> {
    let path = store.path(name);
    let mut file = std::fs::File::create(&path).at(&path)?;
    for _ in 0..bytes / MIB {
        file.write_all(&[0; MIB as usize]).at(&path)?;
    }
    file.sync_all().at(&path)?;
    Ok(path)
}

/// Frees the memory below an image of zeroes; its blocks stay written. null_blk keeps a page in its
/// volatile cache only if it has none below.
fn free_below(store: &Store, image: &str) -> Res {
    const BLOCK: u64 = 4096;
    let listed = tools::ok(&["filefrag", "-b4096", "-v", image])?;
    let mut freed = 0;
    // "   0:        0..    8191:      34048..     42239:   8192:             last,eof"
    for line in listed.lines().filter(|line| line.matches("..").count() == 2) {
        let fields: Vec<&str> =
            line.split([':', '.']).map(str::trim).filter(|field| !field.is_empty()).collect();
        let (from, count) = (fields[3].parse::<u64>()? * BLOCK, fields[5].parse::<u64>()? * BLOCK);
        let (from, count) = (from.to_string(), count.to_string());
        tools::ok(&["blkdiscard", "--force", "-o", &from, "-l", &count, &store.disk.node()])?;
        freed += 1;
    }
    ensure!(freed > 0, "no extents: {listed}");
    Ok(())
}

const BLOCKS: u64 = 120;

fn at(block: u64) -> u64 {
    block * 7 * 4096
}

/// The store loses its cache, and comes back; the returned image is opened there.
fn cut(ctx: &Ctx, store: Store, daemon: Daemon, image: &str) -> Res<(Mount, Disk, crate::store::Disk)> {
    // Shut down the file system first: the removal of a disk syncs a live file system.
    tools::ok(&["xfs_io", "-x", "-c", "shutdown", &store.path(".")])?;
    store.disk.set("power", 0)?;
    daemon.ok(&["detach", "--all", "--force"])?;
    daemon.stop()?;
    let below = store.into_disk()?;
    below.set("power", 1)?;
    let mount = Mount::new(&below.node(), &ctx.path("store"), &[])?;
    let disk = Disk::open_read(image)?;
    Ok((mount, disk, below))
}

fn lost(disk: &Disk, blocks: std::ops::Range<u64>) -> Res<u64> {
    let mut lost = 0;
    for block in blocks {
        lost += u64::from(disk.read(at(block), 4096)? != pattern(block, 4096));
    }
    Ok(lost)
}

/// Nothing is lost of a durable device, whatever wrote and over two daemons; of an ordinary one that
/// nobody flushes, something is.
fn power_cut(ctx: &Ctx, kind: &str) -> Res {
    const ZEROED: u64 = 16 * MIB;
    let store = Store::new(ctx, kind, &cached())?;
    let image = written(&store, "image", 32 * MIB)?;
    let ordinary = written(&store, "ordinary", 8 * MIB)?;
    free_below(&store, &image)?;
    free_below(&store, &ordinary)?;
    let mut daemon = Daemon::start(ctx)?;
    let device = daemon.attach(&[&image, "--durable"])?;
    ensure!(daemon.info(&device)?["durable"] == true, "list does not say so");
    for (attribute, expected) in [
        ("write_cache", "write through"),
        ("fua", "0"),
        ("discard_max_bytes", "0"),
        ("write_zeroes_max_bytes", "0"),
    ] {
        let found = daemon::queue_attribute(&device, attribute)?;
        ensure!(found.trim() == expected, "{attribute} is {found}");
    }
    let disk = Disk::open(&device)?;
    let third = BLOCKS / 3;
    for block in 0..third {
        disk.write(at(block), &pattern(block, 4096))?;
    }
    tools::ok(&["blkdiscard", "-z", "-f", "-o", &ZEROED.to_string(), "-l", &MIB.to_string(), &device])?;
    daemon.kill()?;
    daemon.restart()?;
    ensure!(daemon.info(&device)?["durable"] == true, "the next daemon does not say so");
    for block in third..2 * third {
        disk.write(at(block), &pattern(block, 4096))?;
    }
    // Through the page cache of the device.
    let cached = std::fs::File::options().write(true).open(&device).at(&device)?;
    for block in 2 * third..BLOCKS {
        std::os::unix::fs::FileExt::write_all_at(&cached, &pattern(block, 4096), at(block)).at(&device)?;
    }
    cached.sync_all().at(&device)?;
    let stats = daemon.stats(&device)?;
    ensure!(stats["flushes"] == 0 && stats["errors"] == 0, "flushed: {stats}");
    let other = daemon.attach(&[&ordinary])?;
    let plain = Disk::open(&other)?;
    for block in 0..BLOCKS {
        plain.write(at(block), &pattern(block, 4096))?;
    }
    drop((disk, cached, plain));
    let (mount, kept, below) = cut(ctx, store, daemon, &image)?;
    for block in 0..BLOCKS {
        same(&format!("block {block}"), &kept.read(at(block), 4096)?, &pattern(block, 4096))?;
    }
    same("zeroes", &kept.read(ZEROED, MIB as usize)?, &vec![0; MIB as usize])?;
    let of_plain = Disk::open_read(&ordinary)?;
    let gone = lost(&of_plain, 0..BLOCKS)?;
    ensure!(gone > 0, "this power cut loses nothing: it proves nothing");
    ctx.note(format!("all {BLOCKS} writes are there; of the ordinary device {gone} are lost"));
    drop((kept, of_plain));
    mount.umount()?;
    drop(below);
    Ok(())
}

/// The next daemon finds no record of the device: it learns from the driver that nobody flushes it.
fn record_lost(ctx: &Ctx) -> Res {
    let store = Store::new(ctx, "xfs", &cached())?;
    let image = written(&store, "image", 16 * MIB)?;
    free_below(&store, &image)?;
    let mut daemon = Daemon::start(ctx)?;
    let device = daemon.attach(&[&image, "--durable"])?;
    daemon.kill()?;
    let record = format!("{}/.state/default/loop0.json", ctx.path("run"));
    std::fs::remove_file(&record).at(&record)?;
    daemon.restart()?;
    daemon.ok(&["recover", &device, "--image", &image])?;
    // The same size: a resize must not forget it either.
    if ctx.host.resize {
        daemon.ok(&["resize", &device])?;
    }
    ensure!(daemon.info(&device)?["durable"] == true, "list does not say so");
    let disk = Disk::open(&device)?;
    for block in 0..BLOCKS {
        disk.write(at(block), &pattern(block, 4096))?;
    }
    drop(disk);
    let (mount, kept, below) = cut(ctx, store, daemon, &image)?;
    let gone = lost(&kept, 0..BLOCKS)?;
    ensure!(gone == 0, "{gone} of {BLOCKS} writes are lost");
    drop(kept);
    mount.umount()?;
    drop(below);
    Ok(())
}

/// Each refusal names the file and the cause, and leaves nothing.
fn refused(ctx: &Ctx) -> Res {
    let store = Store::new(ctx, "xfs", &cached())?;
    let image = written(&store, "image", 8 * MIB)?;
    let sparse = store.sparse("sparse", 8 * MIB)?;
    let unwritten = store.allocated("unwritten", 8 * MIB)?;
    let half = store.path("half");
    tools::ok(&["cp", "--sparse=never", "--reflink=never", &image, &half])?;
    tools::ok(&["truncate", "-s", "16M", &half])?;
    let shared = store.path("shared");
    tools::ok(&["cp", "--reflink=always", &written(&store, "original", 8 * MIB)?, &shared])?;
    let tmpfs = Mount::new("none", &ctx.path("tmpfs"), &["-t", "tmpfs"])?;
    let memory = format!("{}/memory", tmpfs.dir);
    std::fs::write(&memory, vec![1; MIB as usize]).at(&memory)?;
    let daemon = Daemon::start(ctx)?;
    for (image, says) in [
        (&sparse, "has a hole or unwritten blocks at byte 0"),
        (&unwritten, "has a hole or unwritten blocks at byte 0"),
        (&half, "has a hole or unwritten blocks at byte 8388608"),
        (&shared, "shares blocks with another file"),
        (&memory, "is not on one block device"),
    ] {
        let done = daemon.cli(&["attach", image, "--durable"])?;
        ensure!(done.code == 7 && done.err.contains(image.as_str()) && done.err.contains(says), "{done:?}");
        ensure!(daemon.ublk_ids().is_empty(), "{image}: a device is left");
    }
    // The first half alone is written.
    let device = daemon.attach(&[&half, "--durable", "--size-limit", "8M"])?;
    daemon.detach(&device)?;
    for option in ["--read-only", "--buffered"] {
        let done = daemon.cli(&["attach", &image, "--durable", option])?;
        ensure!(done.code == 2, "{option}: {done:?}");
    }

    daemon.stop()
}

/// A device grows into what is written, not into anything else.
fn grows(ctx: &Ctx) -> Res {
    let store = Store::new(ctx, "ext4", &cached())?;
    let image = written(&store, "image", 8 * MIB)?;
    let daemon = Daemon::start(ctx)?;
    let device = daemon.attach(&[&image, "--durable"])?;
    let done = daemon.cli(&["resize", &device, "--size", "16M"])?;
    ensure!(done.code == 2 && done.err.contains("not written"), "{done:?}");
    tools::ok(&["truncate", "-s", "16M", &image])?;
    let done = daemon.cli(&["resize", &device])?;
    ensure!(
        done.code == 7 && done.err.contains("has a hole or unwritten blocks at byte 8388608"),
        "{done:?}"
    );
    tools::sh(format!("head -c 8M /dev/zero | dd of={image} bs=1M seek=8 conv=notrunc status=none"))?;
    daemon.ok(&["resize", &device])?;
    ensure!(daemon.info(&device)?["sizeBytes"] == 16 * MIB, "not resized");
    daemon.detach(&device)?;
    daemon.stop()
}

/// A store whose cache cannot be written through.
fn refused_without_fua(ctx: &Ctx) -> Res {
    let store = Store::new(ctx, "ext4", &Shape { cache_mib: 8, ..Shape::default() })?;
    let image = written(&store, "image", 8 * MIB)?;
    let daemon = Daemon::start(ctx)?;
    let done = daemon.cli(&["attach", &image, "--durable"])?;
    ensure!(done.code == 7 && done.err.contains("cannot write through its cache"), "{done:?}");
    ensure!(daemon.ublk_ids().is_empty(), "a device is left");
    daemon.stop()
}
