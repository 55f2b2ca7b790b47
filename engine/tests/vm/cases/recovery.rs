// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The daemon dies while devices are in use.

use std::time::Duration;

use super::{IO_MODES, MIB};
use crate::daemon::Daemon;
use crate::disk;
use crate::fio;
use crate::harness::{At, Case, Ctx, Needs, Res, case, ensure};
use crate::ledger::{OnError, Writers};
use crate::store::Store;

pub(super) fn cases() -> Vec<Case> {
    let mut all = Vec::new();
    for io_mode in IO_MODES {
        let name = format!("recovery::kill_under_verify::{io_mode}");
        all.push(case(name, Needs::Recovery(io_mode), 240, move |ctx| {
            ends_under_verify(ctx, io_mode, Daemon::kill)
        }));
        let name = format!("recovery::kill_keeps_acknowledged::{io_mode}");
        let kept = case(name, Needs::Recovery(io_mode), 180, move |ctx| {
            ends_keep_acknowledged(ctx, io_mode, Daemon::kill)
        });
        all.push(kept.variant_if(io_mode == "auto"));
    }
    all.push(case("recovery::configured_devices", Needs::Recovery("copy"), 120, configured_devices));
    all.push(case("recovery::kill_with_many_devices", Needs::Recovery("copy"), 180, kill_with_many_devices));
    all
}

/// How a daemon comes to its end.
pub(super) type End = fn(&mut Daemon) -> Res;

/// fio --verify goes on over two ends of the daemon and does not see an error.
pub(super) fn ends_under_verify(ctx: &Ctx, io_mode: &str, end: End) -> Res {
    const SIZE: u64 = 96 * MIB;
    let store = Store::xfs(ctx)?;
    let image = store.allocated("image", SIZE)?;
    let mut daemon = Daemon::leaving(ctx)?;
    let device = daemon.attach(&[&image, "--io-mode", io_mode])?;
    let before = daemon.info(&device)?;
    let ids = daemon.ublk_ids();

    // Slow enough to be at work, reading and writing, when the daemon is killed.
    let jobs = format!(
        "[global]
filename={device}
ioengine=io_uring
direct=1
verify=crc32c
verify_fatal=1
randrepeat=1
size=48m
thread
[writer]
rw=randwrite
bssplit=512/10:4k/60:64k/20:256k/10
iodepth=16
rate=,3m
[mixed]
rw=randrw
bsrange=512-128k
blockalign=512
iodepth=8
offset=48m
rate=2m,2m
"
    );
    let mut work = fio::start(ctx, &jobs)?;
    for round in 1..=2 {
        std::thread::sleep(Duration::from_secs(2));
        ensure!(work.alive(), "fio ended before the daemon did");
        end(&mut daemon)?;
        ensure!(
            daemon.ublk_ids() == ids,
            "the device went with the daemon: {:?} of {ids:?}",
            daemon.ublk_ids()
        );
        std::thread::sleep(Duration::from_millis(300 * round));
        daemon.restart().at("start after the end")?;
    }
    ensure!(work.alive(), "fio ended before the last restart");
    let after = daemon.info(&device)?;
    ensure!(after == before, "not the same device: {after}, was {before}");
    work.finish(Duration::from_secs(120))?.clean()?;

    let shown = disk::read_all(&device, 0, SIZE)?;
    disk::same("image", &disk::read_all(&image, 0, SIZE)?, &shown)?;
    daemon.detach(&device)?;
    // A device that was taken back leaves its number free like any other.
    let again = daemon.attach(&[&image, "--io-mode", io_mode])?;
    ensure!(again == device, "{device} came back as {again}");
    disk::same("device", &disk::read_all(&again, 0, SIZE)?, &shown)?;
    daemon.detach(&again)?;
    daemon.stop()
}

/// Every write that was acknowledged before, during and after three ends of the daemon is there.
pub(super) fn ends_keep_acknowledged(ctx: &Ctx, io_mode: &str, end: End) -> Res {
    let store = Store::xfs(ctx)?;
    let image = store.sparse("image", 64 * MIB)?;
    let mut daemon = Daemon::leaving(ctx)?;
    let device = daemon.attach(&[&image, "--io-mode", io_mode])?;
    let writers = Writers::start(&device, 64 * MIB, 8, OnError::End)?;
    for _ in 0..3 {
        writers.progress(200, Duration::from_secs(30))?;
        end(&mut daemon)?;
        daemon.restart()?;
    }
    writers.progress(200, Duration::from_secs(30))?;
    let ledger = writers.stop(Duration::from_secs(30))?;
    ensure!(ledger.errors().is_empty(), "writers met errors: {:?}", ledger.errors());
    ledger.check(&device, 0)?;
    daemon.detach(&device)?;
    ledger.check(&image, 0)?;
    ctx.note(format!("{} blocks acknowledged, none lost", ledger.acknowledged()));
    daemon.stop()
}

/// Twenty devices in two instances, idle and busy, are all taken back under their names.
fn kill_with_many_devices(ctx: &Ctx) -> Res {
    let store = Store::xfs(ctx)?;
    let mut daemon = Daemon::start(ctx)?;
    daemon.ok(&["instance", "create", "other", "--max", "32"])?;
    let mut devices = Vec::new();
    for number in 0..20 {
        let image = store.sparse(&format!("image{number}"), 4 * MIB)?;
        let instance = ["default", "other"][number % 2];
        devices.push(daemon.attach(&["-i", instance, &image])?);
        disk::Disk::open(&devices[number])?.write(4096, &vec![number as u8 + 1; 4096])?;
    }
    let before = daemon.json(&["list"])?;
    daemon.kill()?;
    daemon.restart()?;
    let after = daemon.json(&["list"])?;
    ensure!(after == before, "was {before}, is {after}");
    for (number, device) in devices.iter().enumerate() {
        let data = disk::Disk::open(device)?.read(4096, 4096)?;
        disk::same(device, &data, &vec![number as u8 + 1; 4096])?;
    }
    daemon.ok(&["detach", "--all"])?;
    ensure!(daemon.ublk_ids().is_empty(), "left after detach --all: {:?}", daemon.ublk_ids());
    daemon.stop()
}

/// A device of the configuration that was recovered is not attached anew, however its entry may
/// share the image.
fn configured_devices(ctx: &Ctx) -> Res {
    let store = Store::ext4(ctx)?;
    let (image, config) = (store.sparse("image", 8 * MIB)?, ctx.path("config.toml"));
    std::fs::write(&config, format!("[[device]]\nimage = '{image}'\nforce = true\n"))?;
    let mut daemon = Daemon::with(ctx, &["--config", &config])?;
    let before = daemon.json(&["list"])?;
    ensure!(before[0]["image"] == image.as_str(), "{before}");
    daemon.kill()?;
    daemon.restart()?;
    let after = daemon.json(&["list"])?;
    ensure!(after == before, "before {before}, after {after}");
    let log = daemon.log();
    ensure!(log.contains(&format!("{config}, line 1: {image} is already attached")), "{log}");
    daemon.stop()
}
