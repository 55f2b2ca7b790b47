// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Limits of a device's I/O: rates of a real load, changes while it runs, and ends of the device and
//! the daemon while requests wait.

use std::time::{Duration, Instant};

use super::MIB;
use crate::daemon::Daemon;
use crate::fio::{self, Fio};
use crate::harness::{Case, Ctx, Needs, Res, case, ensure, fail};
use crate::store::Store;
use crate::tools;

pub(super) fn cases() -> Vec<Case> {
    vec![
        case("io_limits::rates", Needs::Ublk, 180, rates),
        case("io_limits::forced_end", Needs::Ublk, 90, forced_end),
        case("io_limits::next_daemon", Needs::Recovery("copy"), 120, next_daemon),
    ]
}

/// How long a rate is measured.
const MEASURED: Duration = Duration::from_secs(5);

/// Starts a load, and waits until its first burst has passed.
fn load(ctx: &Ctx, daemon: &Daemon, device: &str, job: &str) -> Res<Fio> {
    let common = "disk_util=0\ndirect=1\nioengine=libaio\niodepth=16\nsize=64m\ntime_based\nruntime=60\n";
    let fio = fio::start(ctx, &format!("[load]\nfilename={device}\n{common}{job}\n"))?;
    // Under emulation fio needs seconds before its first request.
    let begun = || (daemon.stats(device).ok()?["inFlight"].as_u64()? > 0).then_some(());
    ensure!(tools::until(Duration::from_secs(30), begun).is_some(), "no request of fio in 30 s");
    std::thread::sleep(Duration::from_secs(1));
    Ok(fio)
}

/// Reads and writes per second, and bytes per second.
fn rate(daemon: &Daemon, device: &str) -> Res<(f64, f64)> {
    let sample = || -> Res<[f64; 3]> {
        let stats = daemon.stats(device)?;
        let sum = |keys: [&str; 2]| keys.iter().map(|key| stats[*key].as_f64().unwrap_or(0.0)).sum();
        Ok([
            sum(["reads", "writes"]),
            sum(["readBytes", "writeBytes"]),
            stats["atNs"].as_f64().unwrap_or(0.0) / 1e9,
        ])
    };
    let before = sample()?;
    std::thread::sleep(MEASURED);
    let after = sample()?;
    let seconds = after[2] - before[2];
    Ok(((after[0] - before[0]) / seconds, (after[1] - before[1]) / seconds))
}

fn expect(what: &str, rate: f64, limit: f64) -> Res {
    let share = rate / limit;
    ensure!((0.97..1.03).contains(&share), "{what}: {rate:.1} per second, limit {limit}");
    Ok(())
}

/// Each limit, live changes, and a neighbour without limits.
fn rates(ctx: &Ctx) -> Res {
    let store = Store::ext4(ctx)?;
    let images = [store.allocated("limited", 64 * MIB)?, store.allocated("free", 64 * MIB)?];
    let daemon = Daemon::start(ctx)?;
    let device = daemon.attach(&[&images[0], "--iops", "300"])?;
    let free = daemon.attach(&[&images[1]])?;
    let limits = |device: &str| -> Res<String> {
        let info = daemon.info(device)?;
        Ok(format!("{} {}", info["iops"], info["bytesPerSecond"]))
    };
    ensure!((limits(&device)?, limits(&free)?) == ("300 0".to_owned(), "0 0".to_owned()), "at attach");

    let running = load(ctx, &daemon, &device, "rw=randrw\nbs=4k")?;
    expect("300 IOPS", rate(&daemon, &device)?.0, 300.0)?;
    daemon.ok(&["limit", "--device", &device, "--iops", "100"])?;
    std::thread::sleep(Duration::from_secs(1));
    expect("100 IOPS", rate(&daemon, &device)?.0, 100.0)?;
    let stats = daemon.stats(&device)?;
    ensure!(stats["held"].as_u64() > Some(500) && stats["inFlight"].as_u64() > Some(8), "{stats}");
    let other = load(ctx, &daemon, &free, "rw=randread\nbs=4k")?;
    let beside = rate(&daemon, &free)?.0;
    ensure!((1000.0..).contains(&beside), "the neighbour does {beside} IOPS");
    end(&daemon, &free, other)?;
    end(&daemon, &device, running)?;

    let device = daemon.attach(&[&images[0], "--bandwidth", "10M"])?;
    let running = load(ctx, &daemon, &device, "rw=write\nbs=128k")?;
    expect("10 MiB per second", rate(&daemon, &device)?.1, (10 * MIB) as f64)?;
    daemon.ok(&["limit", "--device", &device, "--bandwidth", "none"])?;
    std::thread::sleep(Duration::from_secs(1));
    let without = rate(&daemon, &device)?.1;
    ensure!(((15 * MIB) as f64..).contains(&without), "{without} bytes per second without limits");
    ensure!(limits(&device)? == "0 0", "after 'none'");
    end(&daemon, &device, running)?;
    daemon.stop()
}

/// Ends a device under load by force.
fn end(daemon: &Daemon, device: &str, load: Fio) -> Res {
    let start = Instant::now();
    daemon.ok(&["detach", "--force", device])?;
    ensure!(start.elapsed() < Duration::from_secs(15), "the end took {:?}", start.elapsed());
    load.finish(Duration::from_secs(60))?;
    Ok(())
}

/// A forced end does not wait for the limits.
fn forced_end(ctx: &Ctx) -> Res {
    let store = Store::ext4(ctx)?;
    let image = store.allocated("image", 64 * MIB)?;
    let daemon = Daemon::start(ctx)?;
    let device = daemon.attach(&[&image, "--iops", "1"])?;
    let running = load(ctx, &daemon, &device, "rw=randwrite\nbs=4k")?;
    let waiting = daemon.stats(&device)?["inFlight"].as_u64();
    ensure!(waiting > Some(8), "{waiting:?} requests wait");
    end(&daemon, &device, running)?;
    daemon.stop()
}

/// The limits outlive an orderly stop, during which requests wait, and a kill.
fn next_daemon(ctx: &Ctx) -> Res {
    let store = Store::ext4(ctx)?;
    let image = store.allocated("image", 64 * MIB)?;
    let mut daemon = Daemon::leaving(ctx)?;
    let device = daemon.attach(&[&image, "--iops", "1"])?;
    daemon.ok(&["limit", "--device", &device, "--iops", "20"])?;
    let running = load(ctx, &daemon, &device, "rw=randwrite\nbs=4k")?;
    for round in 0..2 {
        std::thread::sleep(Duration::from_secs(2));
        match round {
            0 => {
                let took = daemon.terminate()?;
                ensure!(took < Duration::from_secs(5), "the stop took {took:?}");
            }
            _ => daemon.kill()?,
        }
        daemon.restart()?;
        std::thread::sleep(Duration::from_secs(2));
        let (iops, _) = rate(&daemon, &device)?;
        if !(18.0..22.0).contains(&iops) {
            fail!("round {round}: {iops} IOPS in the next daemon, limit 20");
        }
    }
    end(&daemon, &device, running)?;
    daemon.stop()
}
