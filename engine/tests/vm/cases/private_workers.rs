// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Pools of one user share workers, as the devices of an instance do; what hangs in one pool does not
//! stall another.

use std::time::Duration;

use super::private_hung::Server;
use super::private_script::{Inside, Script};
use crate::daemon::Daemon;
use crate::disk::Disk;
use crate::harness::{Case, Ctx, Needs, Res, case, ensure};
use crate::tools;

/// Threads that come with the load, and not with pools: those of `event_threads` and of the runtime.
const OTHER_THREADS: usize = 4;

/// More than io_uring has threads for two workers.
const READERS: u64 = 160;
/// Until they all wait, on an emulated CPU.
const SLOW: Duration = Duration::from_secs(60);

pub(super) fn cases() -> Vec<Case> {
    vec![
        case("private_workers::do_not_grow_with_pools", Needs::Private, 400, do_not_grow_with_pools),
        case("private_workers::hang_for_one_pool_only", Needs::Private, 300, hang_for_one_pool_only),
    ]
}

/// A pool with one device, until the script is killed.
fn pool(ctx: &Ctx, daemon: &Daemon, name: &str) -> Res<Script> {
    let inside = Inside::new(ctx, daemon).with(&["--name", name]);
    let script = format!("works bind losetup /dev/loop0 image-{name}; pause {name}; exec sleep 1000");
    let script = inside.start(&script)?;
    let script = script.wait(name)?;
    script.resume(name)?;
    Ok(script)
}

fn image(ctx: &Ctx, name: &str) -> Res {
    Ok(std::fs::File::create(ctx.path(&format!("image-{name}")))?.set_len(1 << 20)?)
}

fn do_not_grow_with_pools(ctx: &Ctx) -> Res {
    let daemon = Daemon::start(ctx)?;
    let names: Vec<String> = (0..20).map(|number| format!("p{number}")).collect();
    names.iter().try_for_each(|name| image(ctx, name))?;
    let mut pools: Vec<Script> =
        names[..2].iter().map(|name| pool(ctx, &daemon, name)).collect::<Res<_>>()?;
    let (two, two_kib) = (daemon.settled_footprint()?.threads, daemon.resident_kib()?);
    for name in &names[2..] {
        pools.push(pool(ctx, &daemon, name)?);
    }
    let (twenty, twenty_kib) = (daemon.settled_footprint()?.threads, daemon.resident_kib()?);
    ctx.note(format!("2 pools: {two} threads, {two_kib} KiB; 20 pools: {twenty} threads, {twenty_kib} KiB"));
    ensure!(twenty <= two + OTHER_THREADS, "threads grow with pools: {two} for 2, {twenty} for 20");
    pools.into_iter().for_each(Script::kill);
    daemon.stop()
}

/// Requests in flight on disks of ublk.
fn in_flight() -> u64 {
    let disks = std::fs::read_dir("/sys/block").into_iter().flatten().flatten();
    let ublk = disks.filter(|disk| disk.file_name().to_string_lossy().starts_with("ublkb"));
    let texts = ublk.filter_map(|disk| std::fs::read_to_string(disk.path().join("inflight")).ok());
    texts
        .flat_map(|text| text.split_whitespace().filter_map(|n| n.parse::<u64>().ok()).collect::<Vec<_>>())
        .sum()
}

/// More requests hang than io_uring has threads for a worker. The other pool is root's too.
fn hang_for_one_pool_only(ctx: &Ctx) -> Res {
    let server = Server::start(ctx)?;
    let daemon = Daemon::start(ctx)?;
    let hung = Inside::new(ctx, &daemon)
        .with(&["--name", "hung"])
        .start(r#"works "one" losetup /dev/loop0 hung/one; echo $$ > hung.pid; pause bound; sleep 1000"#)?;
    let hung = hung.wait("bound")?;
    let other = Inside::new(ctx, &daemon).with(&["--name", "other"]).start(
        r#"
        image a 1M; works "a" losetup /dev/loop0 a; pause other
        for cpu in 0 1 0 1; do
            works "written on CPU $cpu" timeout -k 1 20 taskset -c $cpu \
                dd if=/dev/urandom of=/dev/loop0 bs=64k count=4 conv=fsync
        done"#,
    )?;
    let other = other.wait("other")?;
    server.stop_answering()?;
    let pid = std::fs::read_to_string(ctx.path("hung.pid"))?;
    let device = format!("/proc/{}/root/dev/loopfs/loop0", pid.trim());
    // They wait in the kernel until the server is gone.
    let mut readers = Vec::new();
    for number in 0..READERS {
        let disk = Disk::open_read(&device)?;
        readers.push(std::thread::spawn(move || disk.try_read(number * 4096, 4096).is_err()));
    }
    let all_hang = || (in_flight() >= READERS).then_some(());
    ensure!(tools::until(SLOW, all_hang).is_some(), "{} requests in flight", in_flight());
    other.resume("other")?;
    other.finish()?;
    Inside::new(ctx, &daemon).run(
        r#"
        image b 1M; works "b" losetup /dev/loop0 b
        works "fsync" timeout -k 1 20 dd if=/dev/urandom of=/dev/loop0 bs=64k count=4 conv=fsync"#,
    )?;
    ensure!(in_flight() >= READERS, "the server answered: the test proves nothing");
    server.kill();
    for reader in readers {
        ensure!(reader.join().is_ok_and(|failed| failed), "the hung device was read");
    }
    hung.kill();
    daemon.stop()
}
