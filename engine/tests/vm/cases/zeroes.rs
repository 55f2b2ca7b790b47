// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Discard and write-zeroes: what must become zero does, what must stay stays, blocks are freed or
//! kept as asked.

use std::fs::File;
use std::time::Duration;

use rustix::fs::{FallocateFlags, SeekFrom, fallocate, seek};

use super::{IO_MODES, KIB, MIB};
use crate::daemon::{Daemon, queue_attribute};
use crate::disk::{self, Disk, allocated, same};
use crate::harness::{At, Case, Ctx, Needs, Res, case, ensure};
use crate::ledger::{OnError, Writers};
use crate::model::{Numbers, pattern};
use crate::store::Store;
use crate::tools;

/// Zero a range of a block device, keeping its blocks (REQ_NOUNMAP).
const KEEP: FallocateFlags = FallocateFlags::ZERO_RANGE;
/// Zero a range of a block device; its blocks may go.
const FREE: FallocateFlags = FallocateFlags::PUNCH_HOLE.union(FallocateFlags::KEEP_SIZE);

pub(super) fn cases() -> Vec<Case> {
    let mut all = Vec::new();
    for io_mode in IO_MODES {
        all.push(case(format!("zeroes::byte_exact::{io_mode}"), Needs::IoMode(io_mode), 150, move |ctx| {
            byte_exact(ctx, io_mode)
        }));
    }
    for kind in ["xfs", "ext4"] {
        all.push(case(format!("zeroes::nounmap_keeps_blocks::{kind}"), Needs::Ublk, 90, move |ctx| {
            nounmap_keeps_blocks(ctx, kind)
        }));
        all.push(case(format!("discard::punches::{kind}"), Needs::Ublk, 90, move |ctx| {
            discard_punches(ctx, kind)
        }));
    }
    all.push(case("discard::keeps_neighbours_under_load", Needs::Ublk, 120, discard_under_load));
    all
}

fn store(ctx: &Ctx, kind: &str) -> Res<Store> {
    match kind {
        "xfs" => Store::xfs(ctx),
        _ => Store::ext4(ctx),
    }
}

/// A hundred and sixty zeroings and writes at any sector, compared with the same done in memory,
/// while others write to the second half of the device.
fn byte_exact(ctx: &Ctx, io_mode: &str) -> Res {
    const HALF: u64 = 16 * MIB;
    let store = Store::xfs(ctx)?;
    let image = store.allocated("image", 2 * HALF)?;
    let daemon = Daemon::start(ctx)?;
    let device = daemon.attach(&[&image, "--io-mode", io_mode, "--block-size", "512"])?;
    let mut expected = pattern(7, usize::try_from(HALF)?);
    disk::write_all(&device, &expected)?;

    // The ledger counts blocks from its device's start, so it gets a device of its own on the same
    // image: the upper half.
    let half = HALF.to_string();
    let other = store.sparse("other", HALF)?;
    let neighbour = daemon.attach(&[&other, "--io-mode", io_mode])?;
    let writers = Writers::start(&neighbour, HALF, 2, OnError::End)?;

    let open = Disk::open(&device)?;
    let mut numbers = Numbers::new(11);
    for round in 0..160_u64 {
        let offset = numbers.below(HALF / 512) * 512;
        let limit = [8 * KIB, 64 * KIB, MIB][usize::try_from(round % 3)?];
        let len = (1 + numbers.below(limit / 512)) * 512;
        let len = len.min(HALF - offset);
        let range = usize::try_from(offset)?..usize::try_from(offset + len)?;
        match round % 10 {
            0..=2 => open.write(offset, &refill(&mut expected, range, round))?,
            3..=5 => {
                fallocate(open.file(), KEEP, offset, len).at("zero range")?;
                expected[range].fill(0);
            }
            6..=8 => {
                fallocate(open.file(), FREE, offset, len).at("punch")?;
                expected[range].fill(0);
            }
            _ => {
                let (offset, len) = (offset.to_string(), len.to_string());
                tools::ok(&["blkdiscard", "-z", "-o", &offset, "-l", &len, &device])?;
                expected[range].fill(0);
            }
        }
        if round % 40 == 39 {
            let found = disk::read_all(&device, 0, HALF)?;
            same(&format!("device after round {round}"), &found, &expected)?;
        }
    }
    drop(open);
    let ledger = writers.stop(Duration::from_secs(20))?;
    ensure!(ledger.errors().is_empty(), "writers met errors: {:?}", ledger.errors());
    ledger.check(&neighbour, 0)?;
    let upper = disk::read_all(&device, HALF, HALF)?;
    same("the untouched half", &upper, &vec![0; upper.len()])?;
    let stats = daemon.stats(&device)?;
    ensure!(stats["discards"].as_u64() >= Some(80) && stats["errors"] == 0, "stats of {half} bytes: {stats}");
    daemon.ok(&["detach", "--all"])?;
    same("image", &disk::read_all(&image, 0, HALF)?, &expected)?;
    daemon.stop()
}

/// New content for a range of the model; also returned.
fn refill(model: &mut [u8], range: std::ops::Range<usize>, seed: u64) -> Vec<u8> {
    let data = pattern(seed, range.len());
    model[range].copy_from_slice(&data);
    data
}

/// A filled image of 16 MiB and its content.
fn filled(store: &Store) -> Res<(String, Vec<u8>)> {
    let image = store.allocated("image", 16 * MIB)?;
    let data = pattern(3, usize::try_from(16 * MIB)?);
    disk::write_all(&image, &data)?;
    Ok((image, data))
}

fn nounmap_keeps_blocks(ctx: &Ctx, kind: &str) -> Res {
    let store = store(ctx, kind)?;
    let (image, mut expected) = filled(&store)?;
    let full = allocated(&image)?;
    let daemon = Daemon::start(ctx)?;
    let device = daemon.attach(&[&image])?;
    let open = Disk::open(&device)?;

    // One sector off both ways: edges within file system blocks.
    let (offset, len) = (MIB + 512, 4 * MIB - 1024);
    let range = usize::try_from(offset)?..usize::try_from(offset + len)?;
    fallocate(open.file(), KEEP, offset, len).at("zero range")?;
    expected[range].fill(0);
    let after = allocated(&image)?;
    ensure!(after >= full, "zeroing that keeps blocks freed {}", full - after);
    same("after zeroing", &disk::read_all(&device, 0, 16 * MIB)?, &expected)?;
    let (words, range) = (["-o", "9437184", "-l", "1048576"], 9 << 20..10 << 20);
    tools::ok(&[&["blkdiscard", "-z"], &words[..], &[&device]].concat())?;
    expected[range].fill(0);
    ensure!(allocated(&image)? >= full, "blkdiscard --zeroout freed blocks");

    fallocate(open.file(), FREE, 6 * MIB + 512, 2 * MIB).at("punch")?;
    expected[(6 << 20) + 512..(8 << 20) + 512].fill(0);
    let after = allocated(&image)?;
    ensure!(
        after <= full - (2 * MIB - 64 * KIB),
        "zeroing that may free blocks kept them: {full} before, {after} after"
    );
    same("after punch", &disk::read_all(&device, 0, 16 * MIB)?, &expected)?;
    drop(open);
    daemon.detach(&device)?;
    same("image", &disk::read_all(&image, 0, 16 * MIB)?, &expected)?;
    daemon.stop()
}

fn discard_punches(ctx: &Ctx, kind: &str) -> Res {
    let store = store(ctx, kind)?;
    let (image, data) = filled(&store)?;
    let full = allocated(&image)?;
    let daemon = Daemon::start(ctx)?;
    let device = daemon.attach(&[&image])?;
    let limit: u64 = queue_attribute(&device, "discard_max_bytes")?.parse()?;
    ensure!(limit > 0, "the device takes no discard");

    tools::ok(&["blkdiscard", "-o", "4194304", "-l", "4194304", &device])?;
    let after = allocated(&image)?;
    ensure!(after <= full - 4 * MIB + 64 * KIB, "discard of 4 MiB freed {}", full - after);
    let file = File::open(&image)?;
    let hole = seek(&file, SeekFrom::Hole(0))?;
    let end = seek(&file, SeekFrom::Data(hole))?;
    ensure!(hole == 4 * MIB && end == 8 * MIB, "the hole is at {hole} to {end}");
    // Off by a sector at both ends: the blocks at the edges are shared with data that stays.
    let (offset, len) = (10 * MIB + 512, MIB);
    let words = ["-o", &offset.to_string(), "-l", &len.to_string()];
    tools::ok(&[&["blkdiscard"], &words[..], &[&device]].concat())?;
    let found = disk::read_all(&device, 0, 16 * MIB)?;
    let keep = [0..4 << 20, 8 << 20..usize::try_from(offset)?, usize::try_from(offset + len)?..16 << 20];
    for range in keep {
        let what = format!("kept {range:?}");
        same(&what, &found[range.clone()], &data[range])?;
    }
    same("the hole", &found[4 << 20..8 << 20], &vec![0; 4 << 20])?;
    // All of it: nothing may be left but what the file system itself needs.
    tools::ok(&["blkdiscard", &device])?;
    let rest = allocated(&image)?;
    ensure!(rest <= 64 * KIB, "{rest} bytes left after a full discard");
    daemon.detach(&device)?;
    daemon.stop()
}

/// Every other 64 KiB is discarded by several at once, while the rest is written.
fn discard_under_load(ctx: &Ctx) -> Res {
    const STEP: u64 = 64 * KIB;
    let store = Store::xfs(ctx)?;
    let (image, data) = filled(&store)?;
    let full = allocated(&image)?;
    let daemon = Daemon::start(ctx)?;
    let device = daemon.attach(&[&image])?;
    let fresh = pattern(4, usize::try_from(STEP)?);
    std::thread::scope(|scope| {
        let lanes: Vec<_> = (0..4_u64)
            .map(|lane| {
                let (device, fresh) = (&device, &fresh);
                scope.spawn(move || -> Res {
                    let open = Disk::open(device)?;
                    for step in (0..16 * MIB / STEP).filter(|step| step % 4 == lane) {
                        let offset = step * STEP;
                        match lane {
                            0 | 2 => {
                                let words = ["-o", &offset.to_string(), "-l", &STEP.to_string()];
                                // -f: not exclusively, for several are at it.
                                tools::ok(&[&["blkdiscard", "-f"], &words[..], &[device]].concat())?;
                            }
                            1 => (0..8).try_for_each(|_| open.write(offset, fresh))?,
                            _ => {}
                        }
                    }
                    Ok(())
                })
            })
            .collect();
        lanes.into_iter().try_for_each(|lane| lane.join().map_err(|_| "a lane panicked")?)
    })?;
    let found = disk::read_all(&device, 0, 16 * MIB)?;
    for step in 0..usize::try_from(16 * MIB / STEP)? {
        let len = usize::try_from(STEP)?;
        let range = step * len..(step + 1) * len;
        let what = format!("step {step}");
        match step % 4 {
            1 => same(&what, &found[range], &fresh)?,
            3 => same(&what, &found[range.clone()], &data[range])?,
            _ => {}
        }
    }
    let after = allocated(&image)?;
    ensure!(after <= full / 2 + MIB, "half was discarded; {full} before, {after} after");
    daemon.detach(&device)?;
    daemon.stop()
}
