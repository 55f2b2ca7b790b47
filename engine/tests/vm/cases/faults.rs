// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Faults below a device become errors of the device; the daemon keeps running.

use std::time::Duration;

use super::{IO_MODES, KIB, MIB};
use crate::daemon::Daemon;
use crate::disk::{self, Disk, same};
use crate::fio;
use crate::harness::{At, Case, Ctx, Needs, Res, case, ensure, fail};
use crate::ledger::{OnError, Writers};
use crate::model::pattern;
use crate::store::{self, Shape, Store};
use crate::tools;

type Body = fn(&Ctx, &str) -> Res;

pub(super) fn cases() -> Vec<Case> {
    let bodies: [(&str, Body); 4] = [
        ("image_truncated_under_io", truncated),
        ("store_full_under_sparse_image", full),
        ("bad_sectors_below", bad_sectors),
        ("bad_sectors_below_lone_writes", lone_writes),
    ];
    let mut all = Vec::new();
    for io_mode in IO_MODES {
        for (name, body) in bodies {
            let name = format!("faults::{name}::{io_mode}");
            let case = case(name, Needs::IoMode(io_mode), 150, move |ctx| body(ctx, io_mode));
            all.push(case.variant_if(io_mode == "auto"));
        }
    }
    all
}

fn errno(result: std::io::Result<impl Sized>) -> Res<i32> {
    match result {
        Ok(_) => fail!("succeeded unexpectedly"),
        Err(error) => Ok(error.raw_os_error().unwrap_or(0)),
    }
}

/// Reads past the new end fail with EIO; reads before it succeed.
fn truncated(ctx: &Ctx, io_mode: &str) -> Res {
    const END: u64 = 16 * MIB + 3 * 512;
    let store = Store::xfs(ctx)?;
    let image = store.allocated("image", 32 * MIB)?;
    let data = pattern(12, 32 << 20);
    disk::write_all(&image, &data)?;
    let mut daemon = Daemon::start(ctx)?;
    let device = daemon.attach(&[&image, "--io-mode", io_mode])?;
    ensure!(daemon.info(&device)?["state"] == "live", "not live");
    let jobs = format!(
        "[readers]
filename={device}
ioengine=io_uring
direct=1
rw=randread
bssplit=512/20:4k/60:128k/20
iodepth=16
size=16m
time_based
runtime=5
"
    );
    let mut work = fio::start(ctx, &jobs)?;
    std::thread::sleep(Duration::from_secs(2));
    std::fs::File::options().write(true).open(&image)?.set_len(END)?;

    let disk = Disk::open_read(&device)?;
    for (offset, len) in [
        (24 * MIB, 4096),
        (END, 512),
        (32 * MIB - 512, 512),
        // Across the end.
        (16 * MIB, 4096),
        (15 * MIB, 2 << 20),
    ] {
        let code = match disk.try_read(offset, len) {
            // The block layer may split a large read; the part before the end is valid.
            Ok(got) if (got.len() as u64) <= END.saturating_sub(offset) && !got.is_empty() => {
                let start = usize::try_from(offset)?;
                same("before the end", &got, &data[start..start + got.len()])?;
                continue;
            }
            result => errno(result).at(format!("read {len} at {offset}"))?,
        };
        ensure!(code == libc::EIO, "read {len} at {offset}: errno {code}");
    }
    let last = disk.read(END - 1536, 1536)?;
    let start = usize::try_from(END - 1536)?;
    same("up to the end", &last, &data[start..start + 1536])?;
    ensure!(work.alive(), "fio ended before the image was truncated");
    work.finish(Duration::from_secs(60))?.clean()?;
    let info = daemon.info(&device)?;
    ensure!(info["state"] == "degraded", "not degraded: {info}");
    ensure!(daemon.stats(&device)?["errors"].as_u64() >= Some(3), "errors not counted");
    daemon.check_alive()?;
    drop(disk);
    daemon.detach(&device)?;
    daemon.stop()
}

/// The file system below a sparse image is full: writes to holes fail, acknowledged data stays, and
/// writes succeed again once there is space.
fn full(ctx: &Ctx, io_mode: &str) -> Res {
    const SIZE: u64 = 64 * MIB;
    let shape = Shape { size_mib: 320, ..Shape::default() };
    let store = Store::new(ctx, "xfs", &shape)?;
    let image = store.sparse("image", SIZE)?;
    let mut daemon = Daemon::start(ctx)?;
    let device = daemon.attach(&[&image, "--io-mode", io_mode])?;
    let filler = store.path("filler");
    tools::sh(format!(
        "free=$(( $(stat -f -c '%a * %S' {image}) )); fallocate -l $(( free - 12 * 1048576 )) {filler}"
    ))?;
    let writers = Writers::start(&device, SIZE, 4, OnError::GoOn)?;
    writers.failures(40, Duration::from_secs(60))?;
    let ledger = writers.stop(Duration::from_secs(30))?;
    let errors = ledger.errors();
    let strange = errors.iter().find(|e| !e.contains("os error 28") && !e.contains("os error 5"));
    ensure!(strange.is_none(), "unexpected error: {strange:?}");
    ensure!(ledger.acknowledged() > 100, "hardly anything was written");
    ledger.check(&device, 0)?;
    daemon.check_alive()?;
    ctx.note(format!(
        "{} blocks acknowledged, then {} errors, the first: {}",
        ledger.acknowledged(),
        errors.len(),
        errors[0]
    ));
    std::fs::remove_file(&filler)?;
    tools::ok(&["sync", "-f", &image])?;
    let data = pattern(13, usize::try_from(SIZE)?);
    disk::write_all(&device, &data).at("write once there is space again")?;
    daemon.detach(&device)?;
    same("image", &disk::read_all(&image, 0, SIZE)?, &data)?;
    daemon.stop()
}

/// Bad sectors fail the requests that touch them, and no others.
fn bad_sectors(ctx: &Ctx, io_mode: &str) -> Res {
    let below = store::Disk::new(&Shape { size_mib: 32, ..Shape::default() })?;
    let mut data = pattern(14, 4 << 20);
    disk::write_all(&below.node(), &data)?;
    let mut daemon = Daemon::start(ctx)?;
    let device = daemon.attach(&[&below.node(), "--io-mode", io_mode])?;
    let disk = Disk::open(&device)?;
    // Without and, if the kernel supports them, with transfers that stop at the bad sector.
    for partial in ["0", "1"] {
        if below.set("badblocks_partial_io", partial).is_err() && partial == "1" {
            break;
        }
        // 512 KiB + 1 KiB to 512 KiB + 2 KiB.
        below.set("badblocks", "+1026-1027")?;
        let bad = 513 * KIB;
        for (offset, len) in [(bad, 1024), (bad - 512, 1024), (512 * KIB, 65536), (0, 1 << 20)] {
            match disk.try_read(offset, len) {
                Ok(got) => {
                    let valid = usize::try_from(bad.saturating_sub(offset))?;
                    let start = usize::try_from(offset)?;
                    ensure!(
                        got.len() <= valid,
                        "read {len} at {offset} gave {} bytes, {valid} are good",
                        got.len()
                    );
                    same("good bytes", &got, &data[start..start + got.len()])?;
                }
                result => {
                    let code = errno(result)?;
                    ensure!(code == libc::EIO, "read {len} at {offset}: errno {code}");
                }
            }
        }
        match disk.try_write(512 * KIB, &[9; 4096]) {
            Ok(done) => ensure!(done <= 1024, "a write over bad sectors: {done} bytes"),
            result => ensure!(errno(result)? == libc::EIO, "a write: not EIO"),
        }
        for at in [512 * KIB - 4096, 516 * KIB] {
            let start = usize::try_from(at)?;
            let found = disk.read(at, 4096)?;
            same("an adjacent block", &found, &data[start..start + 4096])?;
        }
        below.set("badblocks", "-1026-1027")?;
        let fresh = pattern(15, 4096);
        disk.write(512 * KIB, &fresh).at("writing to healed sectors")?;
        data[512 << 10..516 << 10].copy_from_slice(&fresh);
        same("all", &disk::read_all(&device, 0, 4 * MIB)?, &data)?;
    }
    ensure!(daemon.stats(&device)?["errors"].as_u64() >= Some(3), "errors not counted");
    daemon.check_alive()?;
    drop(disk);
    daemon.detach(&device)?;
    daemon.stop()
}

/// Writes that are each followed by a flush are durable themselves: no fdatasync is left to do. One
/// that fails says so, and the next ones work.
fn lone_writes(ctx: &Ctx, io_mode: &str) -> Res {
    let below = store::Disk::new(&Shape { size_mib: 32, ..Shape::default() })?;
    let mut daemon = Daemon::start(ctx)?;
    let device = daemon.attach(&[&below.node(), "--io-mode", io_mode])?;
    let disk = Disk::open(&device)?;
    let write = |block: u64, seed: u64| disk.write(block * 4 * KIB, &pattern(seed, 4096));
    let syncs = || Ok::<_, crate::harness::Stop>(daemon.stats(&device)?["syncs"].as_u64());
    let mut data = Vec::new();
    // From a flush on, the ends of writes are seen.
    disk.sync()?;
    for round in 0..12 {
        write(round, round)?;
        disk.sync()?;
        data.push((round, round));
    }
    let before = syncs()?;
    // Blocks 100 and 101.
    below.set("badblocks", "+800-815")?;
    for block in [100, 101] {
        let failed = errno(disk.try_write(block * 4 * KIB, &[9; 4096]))?;
        ensure!(failed == libc::EIO, "a write to a bad sector: errno {failed}");
        disk.sync()?;
        write(block + 10, block).at("beside a bad sector")?;
        disk.sync()?;
        data.push((block + 10, block));
    }
    ensure!(syncs()? == before, "{:?} syncs, {before:?} before", syncs()?);
    below.set("badblocks", "-800-815")?;
    write(100, 77).at("to a healed sector")?;
    disk.sync()?;
    data.push((100, 77));
    // Two writes before a flush: the second is an ordinary one.
    for block in [200, 201] {
        write(block, block)?;
        data.push((block, block));
    }
    disk.sync()?;
    ensure!(syncs()? > before, "no fdatasync for an ordinary write");
    for (block, seed) in data {
        same("a block", &Disk::open_read(&below.node())?.read(block * 4 * KIB, 4096)?, &pattern(seed, 4096))?;
    }
    drop(disk);
    daemon.detach(&device)?;
    daemon.check_alive()?;
    daemon.stop()
}
