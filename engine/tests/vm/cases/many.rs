// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Many devices, many times: hundreds at once, a thousand in a row, more I/O than buffers.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::MIB;
use crate::daemon::{Daemon, Footprint};
use crate::disk::{Disk, read_all, same};
use crate::fio;
use crate::harness::{At, Case, Ctx, Needs, Res, case, ensure, fail};
use crate::model::pattern;
use crate::store::{Shape, Store};
use crate::tools::tail;

pub(super) fn cases() -> Vec<Case> {
    vec![
        case("many::two_instances", Needs::Ublk, 120, two_instances),
        case("many::two_hundred", Needs::Ublk, 400, two_hundred),
        case("many::churn", Needs::Ublk, 900, churn),
        case("many::more_io_than_buffers::auto", Needs::IoMode("auto"), 400, |ctx| {
            more_io_than_buffers(ctx, "auto")
        }),
        case("many::more_io_than_buffers::batch", Needs::IoMode("batch"), 400, |ctx| {
            more_io_than_buffers(ctx, "batch")
        }),
    ]
}

/// Two instances use the same device names and the same file names for different things.
fn two_instances(ctx: &Ctx) -> Res {
    let store = Store::xfs(ctx)?;
    let daemon = Daemon::start(ctx)?;
    let mut devices = Vec::new();
    for instance in ["red", "blue"] {
        daemon.ok(&["instance", "create", instance, "--max", "4"])?;
        std::fs::create_dir(store.path(instance))?;
        for number in 0..2 {
            let image = store.sparse(&format!("{instance}/disk{number}"), 8 * MIB)?;
            let device = daemon.attach(&["-i", instance, &image])?;
            ensure!(
                device.ends_with(&format!("/{instance}/loop{number}")),
                "device {number} of {instance} is {device}"
            );
            devices.push((image, device));
        }
    }
    for (index, (_, device)) in devices.iter().enumerate() {
        Disk::open(device)?.write(MIB, &pattern(index as u64, 65536))?;
    }
    for (index, (image, device)) in devices.iter().enumerate() {
        let expected = pattern(index as u64, 65536);
        same(device, &Disk::open_read(device)?.read(MIB, 65536)?, &expected)?;
        same(image, &Disk::open_read(image)?.read(MIB, 65536)?, &expected)?;
    }
    // Emptying one instance leaves the other alone.
    daemon.ok(&["instance", "remove", "red", "--force"])?;
    let left = daemon.json(&["list"])?;
    let left = left.as_array().cloned().unwrap_or_default();
    ensure!(
        left.len() == 2 && left.iter().all(|d| d["instance"] == "blue"),
        "left after removing red: {left:?}"
    );
    let (_, device) = &devices[2];
    let data = Disk::open_read(device)?.read(MIB, 65536)?;
    same(device, &data, &pattern(2, 65536))?;
    daemon.ok(&["detach", "--all"])?;
    daemon.stop()
}

/// Attaches `count` small images, a few commands at a time; gives image and device of each.
fn attach_many(
    daemon: &Daemon,
    store: &Store,
    count: u64,
    bytes: u64,
    words: &[&str],
) -> Res<Vec<(String, String)>> {
    let next = AtomicU64::new(0);
    let attach = || -> Res<Vec<(String, String)>> {
        let mut mine = Vec::new();
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= count {
                return Ok(mine);
            }
            let image = store.sparse(&format!("image{number}"), bytes)?;
            let device = daemon.attach(&[words, &[&image]].concat())?;
            mine.push((image, device));
        }
    };
    let results: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..3).map(|_| scope.spawn(attach)).collect();
        threads.into_iter().map(|thread| thread.join()).collect()
    });
    let mut devices = Vec::new();
    for result in results {
        match result {
            Ok(mine) => devices.extend(mine?),
            Err(_) => fail!("an attaching thread panicked"),
        }
    }
    Ok(devices)
}

/// Two hundred devices in one instance: all usable, none mixed up, all gone again.
fn two_hundred(ctx: &Ctx) -> Res {
    const COUNT: u64 = 200;
    let store = Store::xfs(ctx)?;
    let mut daemon = Daemon::start(ctx)?;
    daemon.ok(&["instance", "create", "crowd", "--max", "200"])?;
    // One device first, so that the threads of the instance are there.
    let idle = store.sparse("idle", MIB)?;
    let first = daemon.attach(&["-i", "crowd", &idle])?;
    let before = daemon.footprint()?;
    daemon.detach(&first)?;

    let started = Instant::now();
    let devices = attach_many(&daemon, &store, COUNT, MIB, &["-i", "crowd"])?;
    let seconds = started.elapsed().as_secs_f64();
    ensure!(daemon.ublk_ids().len() == 200, "not 200 devices");
    let extra = store.sparse("extra", MIB)?;
    let refused = daemon.cli(&["attach", "-i", "crowd", &extra])?;
    ensure!(refused.code == 5, "device 201 of 200: {refused:?}");
    let full = daemon.footprint()?;
    ensure!(
        full.threads == before.threads,
        "threads grow with devices: {} for one, {} for 200",
        before.threads,
        full.threads
    );
    ctx.note(format!(
        "200 devices attached in {seconds:.1} s by command; daemon: {} KiB resident, {} threads, {} files",
        daemon.resident_kib()?,
        full.threads,
        full.fds.values().sum::<usize>()
    ));

    for (index, (_, device)) in devices.iter().enumerate() {
        let disk = Disk::open(device)?;
        disk.write(0, &pattern(index as u64, 4096))?;
        disk.write(MIB - 4096, &pattern(!(index as u64), 4096))?;
    }
    for (index, (image, device)) in devices.iter().enumerate() {
        for path in [device, image] {
            let disk = Disk::open_read(path)?;
            same(path, &disk.read(0, 4096)?, &pattern(index as u64, 4096))?;
            let last = disk.read(MIB - 4096, 4096)?;
            same(path, &last, &pattern(!(index as u64), 4096))?;
        }
    }
    let started = Instant::now();
    daemon.ok(&["detach", "--all"])?;
    ctx.note(format!("all detached in {:.1} s", started.elapsed().as_secs_f64()));
    let left = daemon.ublk_ids();
    ensure!(left.is_empty(), "left after detach --all: {left:?}");
    daemon.check_alive()?;
    daemon.stop()
}

/// A thousand rounds of attach, use, detach, a hundred every day: nothing grows, nothing hangs.
fn churn(ctx: &Ctx) -> Res {
    const LANES: u64 = 3;
    let rounds = if ctx.host.full { 1000 } else { 100 };
    let store = Store::xfs(ctx)?;
    let daemon = Daemon::start(ctx)?;
    let images: Vec<String> =
        (0..LANES).map(|lane| store.sparse(&format!("image{lane}"), 4 * MIB)).collect::<Res<_>>()?;
    let round = |lane: u64, number: u64| -> Res {
        let image = &images[usize::try_from(lane)?];
        let device = daemon.attach(&[image])?;
        let disk = Disk::open(&device)?;
        let data = pattern(number, 4096);
        disk.write((number % 1024) * 4096, &data)?;
        same(&device, &disk.read((number % 1024) * 4096, 4096)?, &data)?;
        drop(disk);
        // Its name may belong to another lane's device at once: only `detach` itself is checked.
        daemon.ok(&["detach", &device])?;
        Ok(())
    };
    // A few rounds to warm up; what is there then must be there at the end, no more.
    for number in 0..6 {
        round(number % LANES, number)?;
    }
    let before = daemon.footprint()?;
    let resident = daemon.resident_kib()?;

    let started = Instant::now();
    let next = AtomicU64::new(0);
    let highest = AtomicU64::new(0);
    let work = |lane: u64| -> Res {
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= rounds {
                break;
            }
            let result = round(lane, number).at(format!("round {number}"));
            if result.is_err() {
                next.store(rounds, Ordering::Relaxed);
            }
            result?;
            for id in daemon.ublk_ids() {
                highest.fetch_max(id.into(), Ordering::Relaxed);
            }
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let lanes: Vec<_> = (0..LANES).map(|lane| scope.spawn(move || work(lane))).collect();
        lanes.into_iter().try_for_each(|lane| lane.join().map_err(|_| "a lane panicked")?)
    })?;

    // Threads for calls that block come with calls at the same time, and go when they are idle.
    let settled = Instant::now() + Duration::from_secs(20);
    let mut after: Footprint = daemon.footprint()?;
    while after.threads > before.threads && Instant::now() < settled {
        std::thread::sleep(Duration::from_millis(500));
        after = daemon.footprint()?;
    }
    ensure!(after.threads <= before.threads && after.fds == before.fds, "was {before:?}, is {after:?}");
    let highest = highest.load(Ordering::Relaxed);
    let base = u64::from(daemon_base(&daemon));
    ensure!(highest < base + 2 * LANES + 1, "ublk ids are not reused: {highest} after {rounds} rounds");
    let grown = daemon.resident_kib()?.saturating_sub(resident);
    ensure!(grown < 4096, "grew by {grown} KiB in {rounds} rounds");
    let left = daemon.ublk_ids();
    ensure!(left.is_empty(), "left: {left:?}");
    let complaints = daemon.log().lines().filter(|l| l.contains("ERROR")).count();
    ensure!(complaints == 0, "logged: {}", tail(&daemon.log(), 5));
    ctx.note(format!(
        "{rounds} rounds, {LANES} at a time, {:.0} ms each, {grown} KiB more, highest id {highest}",
        started.elapsed().as_secs_f64() * 1e3 / rounds as f64
    ));
    daemon.stop()
}

/// The number after the ids that others use.
fn daemon_base(daemon: &Daemon) -> u32 {
    let all = crate::host::ublk_ids();
    let mine = daemon.ublk_ids();
    all.into_iter().filter(|id| !mine.contains(id)).max().map_or(0, |id| id + 1)
}

/// More than 20,000 requests at once on one ring, whose buffer table has 16,384 places.
fn more_io_than_buffers(ctx: &Ctx, io_mode: &str) -> Res {
    // Everyday with fewer devices, as attaching takes most of the time.
    let (count, depth): (u64, u64) = if ctx.host.full { (200, 128) } else { (40, 512) };
    let bytes = depth * 4096;
    let depth = depth.to_string();
    // A slow device below, so that requests pile up.
    let shape = Shape { latency_ns: 20_000_000, ..Shape::default() };
    let store = Store::new(ctx, "xfs", &shape)?;
    let mut daemon = Daemon::start(ctx)?;
    daemon.ok(&["instance", "create", "crowd", "--max", "200"])?;
    let words = ["-i", "crowd", "--queues", "1", "--depth", &depth, "--io-mode", io_mode];
    let devices = attach_many(&daemon, &store, count, bytes, &words)?;
    let mut jobs = format!(
        "[global]
ioengine=io_uring
direct=1
verify=crc32c
verify_fatal=1
rw=randwrite
bs=4k
iodepth={depth}
size={bytes}
thread
",
    );
    for (index, (_, device)) in devices.iter().enumerate() {
        jobs.push_str(&format!("[job{index}]\nfilename={device}\n"));
    }
    let report = fio::run(ctx, &jobs, Duration::from_secs(200))?;
    let stats = daemon.json(&["stats"])?;
    let sum = |name: &str| -> u64 {
        let all = stats.as_array().into_iter().flatten();
        all.filter_map(|entry| entry[name].as_u64()).sum()
    };
    ctx.note(format!("{} MiB verified, {} buffers registered by hand", report.read / MIB, sum("fallbacks")));
    ensure!(sum("errors") == 0, "errors counted: {}", sum("errors"));
    ensure!(sum("fallbacks") > 0, "the buffer table never overflowed");
    for (image, device) in &devices {
        let shown = read_all(device, 0, bytes)?;
        same(image, &read_all(image, 0, bytes)?, &shown)?;
    }
    daemon.check_alive()?;
    daemon.ok(&["detach", "--all"])?;
    daemon.stop()
}
