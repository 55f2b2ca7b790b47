// SPDX-License-Identifier: Apache-2.0 OR MIT
//! fio writes, reads back and compares, at sizes from a sector to a mebibyte and many depths.

use std::time::Duration;

use super::{IO_MODES, MIB};
use crate::daemon::Daemon;
use crate::disk;
use crate::fio;
use crate::harness::{Case, Ctx, Needs, Res, case, ensure};
use crate::store::Store;

const RUN: Duration = Duration::from_secs(150);

pub(super) fn cases() -> Vec<Case> {
    let mut all = Vec::new();
    for io_mode in IO_MODES {
        all.push(case(format!("verify::mixed::{io_mode}"), Needs::IoMode(io_mode), 240, move |ctx| {
            mixed(ctx, io_mode, 24, &[], &[])
        }));
        let one_queue =
            case(format!("verify::one_queue::{io_mode}"), Needs::IoMode(io_mode), 240, move |ctx| {
                mixed(ctx, io_mode, 8, &[], &["--queues", "1", "--depth", "16"])
            });
        all.push(one_queue.variant_if(io_mode != "copy"));
    }
    for io_mode in ["auto", "batch"] {
        for (name, linked) in [("linked", "on"), ("unlinked", "off")] {
            let options = ["--linked-commit", linked];
            let case = case(format!("verify::{name}::{io_mode}"), Needs::IoMode(io_mode), 240, move |ctx| {
                mixed(ctx, io_mode, 12, &options, &[])
            });
            all.push(case.variant_if((name == "linked") != (io_mode == "auto")));
        }
    }
    all.push(case("verify::buffered", Needs::Ublk, 240, buffered));
    all
}

/// Four jobs on separate parts: small at depth 1; mixed at depth 32; small at depth 128; reads and
/// writes with fsync.
fn jobs(device: &str, part_mib: u64) -> String {
    format!(
        "[global]
filename={device}
ioengine=io_uring
direct=1
verify=crc32c
verify_fatal=1
do_verify=1
randrepeat=1
size={part_mib}m
thread
[one]
rw=randwrite
iodepth=1
bssplit=512/20:1k/10:4k/40:12k/20:64k/10
offset=0
io_size=6m
[deep]
rw=randwrite
iodepth=32
bssplit=512/5:3k/5:4k/40:40k/10:128k/20:512k/10:1m/10
offset={part_mib}m
[deeper]
rw=randwrite
iodepth=128
bssplit=512/30:4k/60:8k/10
offset={two}m
io_size=10m
[mixed]
rw=randrw
rwmixread=40
fsync=24
iodepth=16
bsrange=512-1m
blockalign=512
offset={three}m
",
        two = 2 * part_mib,
        three = 3 * part_mib
    )
}

fn mixed(ctx: &Ctx, io_mode: &str, part_mib: u64, serve: &[&str], attach: &[&str]) -> Res {
    let store = Store::xfs(ctx)?;
    // Half allocated, half holes, to cover both kinds of write.
    let bytes = 4 * part_mib * MIB;
    let image = store.allocated("image", bytes / 2)?;
    std::fs::File::options().write(true).open(&image)?.set_len(bytes)?;
    let mut daemon = Daemon::with(ctx, serve)?;
    let device = daemon.attach(&[&[&image[..], "--io-mode", io_mode], attach].concat())?;
    let used = daemon.info(&device)?["ioMode"].clone();
    ensure!(used == io_mode, "asked for I/O mode {io_mode}, got {used}");

    let report = fio::run(ctx, &jobs(&device, part_mib), RUN)?;
    ensure!(
        report.written > part_mib * MIB && report.read > part_mib * MIB,
        "fio did too little: {report:?}"
    );
    let stats = daemon.stats(&device)?;
    ensure!(stats["errors"] == 0, "errors counted: {stats}");
    ensure!(
        stats["writeBytes"].as_u64() >= Some(report.written),
        "fio wrote {} bytes, the statistics are {stats}",
        report.written
    );
    // Device and image have the same bytes, read with direct I/O.
    let shown = disk::read_all(&device, 0, bytes)?;
    disk::same("image and device", &disk::read_all(&image, 0, bytes)?, &shown)?;
    daemon.check_alive()?;
    daemon.detach(&device)?;
    disk::same("image after detach", &disk::read_all(&image, 0, bytes)?, &shown)?;
    daemon.stop()
}

/// `--buffered`: the page cache instead of direct I/O, on a tmpfs.
fn buffered(ctx: &Ctx) -> Res {
    const PART_MIB: u64 = 12;
    let image = ctx.path("image");
    std::fs::File::create(&image)?.set_len(4 * PART_MIB * MIB)?;
    let daemon = Daemon::start(ctx)?;
    let device = daemon.attach(&[&image, "--buffered"])?;
    let info = daemon.info(&device)?;
    ensure!(info["buffered"] == true, "not shown as buffered: {info}");
    fio::run(ctx, &jobs(&device, PART_MIB), RUN)?;
    let shown = disk::read_all(&device, 0, 4 * PART_MIB * MIB)?;
    daemon.detach(&device)?;
    disk::same("image after detach", &std::fs::read(&image)?, &shown)?;
    daemon.stop()
}
