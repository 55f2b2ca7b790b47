// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Flush and FUA: durable writes survive a power loss of the device below the image.

use std::fs::OpenOptions;
use std::os::unix::fs::{FileExt, OpenOptionsExt};

use super::MIB;
use crate::daemon::Daemon;
use crate::disk::{Aligned, Disk, same};
use crate::harness::{At, Case, Ctx, Needs, Res, case, ensure};
use crate::model::pattern;
use crate::store::{Mount, Shape, Store};
use crate::tools;

pub(super) fn cases() -> Vec<Case> {
    let mut all = vec![case("durability::flush_and_fua_reach_the_store", Needs::Ublk, 90, reach_the_store)];
    for kind in ["xfs", "ext4"] {
        all.push(case(format!("durability::power_cut::{kind}"), Needs::Ublk, 120, move |ctx| {
            power_cut(ctx, kind)
        }));
    }
    all
}

/// A device with a volatile write cache.
fn volatile() -> Shape {
    Shape { cache_mib: 64, ..Shape::default() }
}

/// Opens a device so that every write is durable when it returns (FUA).
fn open_durable(device: &str) -> Res<std::fs::File> {
    OpenOptions::new().write(true).custom_flags(libc::O_DIRECT | libc::O_DSYNC).open(device).at(device)
}

fn reach_the_store(ctx: &Ctx) -> Res {
    let store = Store::new(ctx, "xfs", &volatile())?;
    let image = store.allocated("image", 8 * MIB)?;
    let daemon = Daemon::start(ctx)?;
    let device = daemon.attach(&[&image])?;
    let disk = Disk::open(&device)?;
    let counted = || -> Res<u64> { Ok(daemon.stats(&device)?["flushes"].as_u64().unwrap_or(0)) };
    for round in 0..5 {
        let (below, above) = (store.disk.flushes()?, counted()?);
        disk.write(round * 4096, &pattern(round, 4096))?;
        disk.sync()?;
        ensure!(counted()? > above, "fsync on the device: no flush counted");
        ensure!(store.disk.flushes()? > below, "fsync on the device: no flush reached the store");
    }
    let durable = open_durable(&device)?;
    for round in 5..10 {
        let below = store.disk.flushes()?;
        let data = Aligned::of(&pattern(round, 4096));
        durable.write_all_at(data.get(), round * 4096)?;
        ensure!(store.disk.flushes()? > below, "a FUA write: neither flush nor FUA reached the store");
    }
    drop((disk, durable));
    daemon.detach(&device)?;
    daemon.stop()
}

/// The store's device loses its write cache while the daemon uses it.
fn power_cut(ctx: &Ctx, kind: &str) -> Res {
    const SYNCED: u64 = 200;
    const FUA: u64 = 240;
    const UNSYNCED: u64 = 400;
    let at = |block: u64| block * 7 * 4096;
    let store = Store::new(ctx, kind, &volatile())?;
    // Sparse: the file system must make its block allocations durable, too.
    let image = store.sparse("image", 32 * MIB)?;
    tools::ok(&["sync", "-f", &image])?;
    let mut daemon = Daemon::start(ctx)?;
    let device = daemon.attach(&[&image])?;
    let disk = Disk::open(&device)?;
    for block in 0..SYNCED {
        disk.write(at(block), &pattern(block, 4096))?;
    }
    disk.sync()?;
    let durable = open_durable(&device)?;
    for block in SYNCED..FUA {
        durable.write_all_at(Aligned::of(&pattern(block, 4096)).get(), at(block))?;
    }
    for block in FUA..UNSYNCED {
        disk.write(at(block), &pattern(block, 4096))?;
    }
    // Shut down the file system first: the removal of a disk syncs a live file system.
    tools::ok(&["xfs_io", "-x", "-c", "shutdown", &store.path(".")])?;
    store.disk.set("power", 0)?;
    drop((disk, durable));
    // The daemon runs, and detaches the device although its image is gone.
    daemon.check_alive()?;
    daemon.ok(&["detach", &device, "--force"])?;
    daemon.stop()?;

    let below = store.into_disk()?;
    below.set("power", 1)?;
    let mount = Mount::new(&below.node(), &ctx.path("store"), &[])?;
    let disk = Disk::open_read(&image)?;
    for block in 0..FUA {
        let what = match block {
            0..SYNCED => "written before fsync",
            _ => "written with FUA",
        };
        let found = disk.read(at(block), 4096)?;
        same(&format!("block {block}, {what}"), &found, &pattern(block, 4096))?;
    }
    let mut lost = 0;
    for block in FUA..UNSYNCED {
        let found = disk.read(at(block), 4096)?;
        lost += u64::from(found != pattern(block, 4096));
    }
    ctx.note(format!("all {FUA} durable blocks are there; of {} others {lost} are lost", UNSYNCED - FUA));
    drop(disk);
    mount.umount()
}
