// SPDX-License-Identifier: Apache-2.0 OR MIT
//! SIGTERM while devices are in use, as at a restart of the service.

use std::time::{Duration, Instant};

use super::recovery::{ends_keep_acknowledged, ends_under_verify};
use super::{IO_MODES, MIB};
use crate::daemon::Daemon;
use crate::disk;
use crate::harness::{At, Case, Ctx, Needs, Res, case, ensure};
use crate::ledger::{OnError, Writers};
use crate::store::{Mount, Shape, Store, fsck, mkfs};
use crate::tools;

/// Deadline for a stop on a slow CPU, independent of the number of devices.
const STOPPED: Duration = Duration::from_secs(15);

pub(super) fn cases() -> Vec<Case> {
    let mut all = Vec::new();
    for io_mode in IO_MODES {
        let name = format!("stop::restart_under_verify::{io_mode}");
        let verified =
            case(name, Needs::Recovery(io_mode), 240, move |ctx| ends_under_verify(ctx, io_mode, terminate));
        all.push(verified.variant_if(io_mode == "auto"));
        let name = format!("stop::restart_keeps_acknowledged::{io_mode}");
        let kept = case(name, Needs::Recovery(io_mode), 180, move |ctx| {
            ends_keep_acknowledged(ctx, io_mode, terminate)
        });
        all.push(kept.variant_if(io_mode == "auto"));
        let name = format!("stop::detach_all_under_load::{io_mode}");
        all.push(case(name, Needs::IoMode(io_mode), 180, move |ctx| detach_all_under_load(ctx, io_mode)));
    }
    all.push(case(
        "stop::mounted_file_systems_survive",
        Needs::Recovery("copy"),
        200,
        mounted_file_systems_survive,
    ));
    all.push(case("stop::many_devices_are_recovered", Needs::Recovery("copy"), 300, many_devices_wait));
    all.push(case("stop::detach_all_logs_what_is_lost", Needs::Ublk, 200, detach_all_is_logged));
    all.push(case("stop::forced_detach_logs_what_is_lost", Needs::Ublk, 200, forced_is_logged));
    all.push(case("stop::pool_end_logs_what_is_lost", Needs::Private, 200, pool_end_is_logged));
    all.push(case("stop::hung_foreign_disk_does_not_block", Needs::Ublk, 200, another_disk_hangs));
    all.push(case(
        "stop::unreadable_state_is_an_error",
        Needs::Recovery("copy"),
        120,
        unreadable_state_is_logged,
    ));
    all.push(case("stop::release_mounts", Needs::Ublk, 200, release_mounts));
    all
}

fn terminate(daemon: &mut Daemon) -> Res {
    daemon.terminate().map(drop)
}

/// Expects a line of the log with this level and all of these words.
fn logged(daemon: &Daemon, level: &str, words: &[&str]) -> Res {
    let log = daemon.log();
    let found = log.lines().any(|line| line.contains(level) && words.iter().all(|word| line.contains(word)));
    ensure!(found, "no {level} with {words:?} in the log:\n{log}");
    Ok(())
}

/// Devices keep names, numbers and content over several restarts; file systems stay mounted, and
/// writes without a daemon wait.
fn mounted_file_systems_survive(ctx: &Ctx) -> Res {
    let store = Store::xfs(ctx)?;
    let mut daemon = Daemon::leaving(ctx)?;
    let mut mounts = Vec::new();
    for kind in ["ext4", "xfs"] {
        let device = daemon.attach(&[&store.sparse(kind, 320 * MIB)?])?;
        mkfs(kind, &device)?;
        mounts.push((device.clone(), Mount::new(&device, &ctx.path(kind), &[])?));
    }
    daemon.attach(&[&store.sparse("idle", MIB)?])?;
    let before = daemon.json(&["list"])?;
    for round in 0..3 {
        let write = |word: &str| {
            let each = mounts.iter().map(|(_, mount)| {
                format!(
                    "head -c 3000000 /dev/urandom > {0}/{word}{round}; sync -f {0}/{word}{round}\n",
                    mount.dir
                )
            });
            each.collect::<String>()
        };
        tools::sh(write("before"))?;
        let took = daemon.terminate()?;
        ensure!(took < STOPPED, "the stop took {took:?}");
        logged(&daemon, "INFO", &["3 devices wait for the next daemon"])?;
        let mut command = std::process::Command::new("bash");
        command.args(["-ec", &write("meanwhile")]);
        let mut writes = tools::Running::start(command)?;
        std::thread::sleep(Duration::from_millis(300));
        ensure!(writes.alive(), "a write ended without a daemon");
        daemon.restart()?;
        writes.finish(Duration::from_secs(60))?.ok()?;
        let after = daemon.json(&["list"])?;
        ensure!(after == before, "was {before}, is {after}");
        logged(&daemon, "INFO", &["default/loop2", "was recovered"])?;
    }
    for (kind, (device, mount)) in ["ext4", "xfs"].iter().zip(mounts) {
        tools::sh(format!("cd {}; sha256sum *[0-9] > {}", mount.dir, ctx.path("sums")))?;
        mount.umount()?;
        fsck(kind, &device)?;
        let mount = Mount::new(&device, &ctx.path(kind), &[])?;
        tools::sh(format!(
            "cd {}; test $(ls | grep -c '[0-9]') = 6; sha256sum -c {}",
            mount.dir,
            ctx.path("sums")
        ))
        .at("after the restarts")?;
        mount.umount()?;
    }
    ensure!(!daemon.log().contains(" WARN "), "warnings at an ordinary restart:\n{}", daemon.log());
    daemon.ok(&["detach", "--all"])?;
    daemon.stop()
}

/// A stop with many devices is fast, and the next daemon recovers all of them.
fn many_devices_wait(ctx: &Ctx) -> Res {
    let store = Store::xfs(ctx)?;
    let mut daemon = Daemon::leaving(ctx)?;
    let devices = if ctx.host.full { 120 } else { 40 };
    for number in 0..devices {
        let image = store.sparse(&format!("image{number}"), MIB)?;
        daemon.attach(&["--io-mode", &ctx.host.io_modes[0], "--depth", "16", &image])?;
    }
    let before = daemon.json(&["list"])?;
    let took = daemon.terminate()?;
    ctx.note(format!("{devices} devices left waiting in {took:.1?}"));
    ensure!(took < STOPPED, "the stop took {took:?}");
    daemon.restart()?;
    let after = daemon.json(&["list"])?;
    ensure!(after == before, "was {before}, is {after}");
    daemon.ok(&["detach", "--all"])?;
    daemon.stop()
}

/// With --detach-all under load: ends in time, leaves no device, loses no acknowledged write.
fn detach_all_under_load(ctx: &Ctx, io_mode: &str) -> Res {
    let store = Store::xfs(ctx)?;
    let image = store.sparse("image", 64 * MIB)?;
    let idle = store.sparse("idle", 8 * MIB)?;
    let mut daemon = Daemon::start(ctx)?;
    let device = daemon.attach(&[&image, "--io-mode", io_mode])?;
    daemon.attach(&[&idle, "--io-mode", io_mode])?;
    let writers = Writers::start(&device, 64 * MIB, 12, OnError::End)?;
    writers.progress(300, Duration::from_secs(30))?;
    daemon.sigterm()?;
    daemon.wait_drained()?;
    let ledger = writers.stop(Duration::from_secs(30))?;
    ensure!(!ledger.errors().is_empty(), "the device was removed, but no writer got an error");
    ledger.check(&image, 0)?;
    ctx.note(format!("{} blocks acknowledged, none lost", ledger.acknowledged()));
    // A daemon that detached all has nothing to recover.
    daemon.restart()?;
    let left = daemon.json(&["list"])?;
    ensure!(left.as_array().is_some_and(Vec::is_empty), "devices came back after --detach-all: {left}");
    daemon.stop()
}

/// With --detach-all, a mounted device does not delay the daemon's exit. Synced data is in the
/// image, and the log names the device that lost data.
fn detach_all_is_logged(ctx: &Ctx) -> Res {
    let store = Store::xfs(ctx)?;
    let image = store.sparse("image", 64 * MIB)?;
    let mut daemon = Daemon::start(ctx)?;
    let device = daemon.attach(&[&image])?;
    daemon.attach(&[&store.sparse("idle", MIB)?])?;
    mkfs("ext4", &device)?;
    let mount = Mount::new(&device, &ctx.path("mnt"), &[])?;
    tools::sh(format!(
        "head -c 1000000 /dev/urandom > {0}/synced; sha256sum < {0}/synced > {1}; sync -f {0}/synced",
        mount.dir,
        ctx.path("sum")
    ))?;
    daemon.sigterm()?;
    daemon.wait_drained()?;
    logged(&daemon, "WARN", &["loop0 of instance default", &image, "mounted on", &mount.dir])?;
    ensure!(!daemon.log().contains("loop1 of"), "the log names the idle device");
    // The file system has lost its disk; unmounting it must still work.
    drop(mount);
    daemon.restart()?;
    let device = daemon.attach(&[&image])?;
    let mount = Mount::new(&device, &ctx.path("mnt"), &[])?;
    tools::sh(format!("sha256sum < {}/synced | cmp - {}", mount.dir, ctx.path("sum")))
        .at("a synced file after SIGTERM")?;
    mount.umount()?;
    fsck("ext4", &device)?;
    daemon.detach(&device)?;
    daemon.stop()
}

/// A forced detach of a device in use, alone or with its instance, logs the device and its use.
fn forced_is_logged(ctx: &Ctx) -> Res {
    let store = Store::xfs(ctx)?;
    let daemon = Daemon::start(ctx)?;
    daemon.ok(&["instance", "create", "other"])?;
    let image = store.sparse("image", 64 * MIB)?;
    let device = daemon.attach(&[&image])?;
    mkfs("ext4", &device)?;
    let mount = Mount::new(&device, &ctx.path("mnt"), &[])?;
    daemon.ok(&["detach", "--force", &device])?;
    logged(&daemon, "WARN", &["loop0 of instance default", &image, "mounted on", &mount.dir])?;
    drop(mount);
    let open = store.sparse("open", MIB)?;
    let device = daemon.attach(&["-i", "other", &open])?;
    let held = std::fs::File::open(&device)?;
    daemon.ok(&["instance", "remove", "--force", "other"])?;
    if ctx.host.io_modes[0] == "batch" {
        logged(&daemon, "WARN", &["loop0 of instance other", &open, "(open)"])?;
    }
    drop(held);
    daemon.stop()
}

/// A private pool cannot outlive the daemon: its devices in use are logged.
fn pool_end_is_logged(ctx: &Ctx) -> Res {
    let store = Store::xfs(ctx)?;
    let image = store.sparse("image", 16 * MIB)?;
    let mut daemon = Daemon::start(ctx)?;
    let mut command = daemon.command(&["run", "--name", "mine", "--", "bash", "-c"]);
    let (ready, dir) = (ctx.path("ready"), ctx.path("inside"));
    // Mounted in the mount namespace of the command only.
    command.arg(format!(
        "losetup /dev/loop3 {image}; mkfs.ext4 -q /dev/loop3; mkdir {dir}; mount /dev/loop3 {dir}; touch {ready}; \
         sleep 1000"
    ));
    let running = tools::Running::start(command)?;
    let up = tools::until(Duration::from_secs(60), || std::fs::exists(&ready).ok()?.then_some(()));
    ensure!(up.is_some(), "the pool did not come up");
    daemon.sigterm()?;
    daemon.wait_drained()?;
    logged(&daemon, "WARN", &["loop3 of pool", "mine", &image, &format!("mounted on {dir}")])?;
    drop(running);
    daemon.restart()?;
    daemon.stop()
}

/// Another disk hangs with pending writes: a forced detach and a stop with devices in use are as
/// fast as usual, and earlier writes to our devices are in their images.
fn another_disk_hangs(ctx: &Ctx) -> Res {
    let store = Store::xfs(ctx)?;
    let elsewhere = crate::store::Disk::new(&Shape::default())?;
    let name = format!("lehung{}", std::process::id());
    let sectors = disk::size(&elsewhere.node())? / 512;
    tools::ok(&[
        "dmsetup",
        "create",
        &name,
        "--table",
        &format!("0 {sectors} linear {} 0", elsewhere.node()),
    ])?;
    // Without udev, there are no links in /dev/mapper.
    let minor = tools::ok(&["dmsetup", "info", "-c", "--noheadings", "-o", "minor", &name])?;
    let hung = format!("/dev/dm-{}", minor.trim());
    mkfs("ext4", &hung)?;
    let strange = Mount::new(&hung, &ctx.path("strange"), &[])?;
    let mut daemon = Daemon::start(ctx)?;
    let images = [store.sparse("one", 64 * MIB)?, store.sparse("two", 64 * MIB)?];
    let devices = images.each_ref().map(|image| daemon.attach(&[image]));
    let [one, two] = devices;
    let (one, two) = (one?, two?);
    for (device, dir) in [(&one, "mnt1"), (&two, "mnt2")] {
        mkfs("ext4", device)?;
        // The mount is lost with its device: it cannot be unmounted in time.
        std::mem::forget(Mount::new(device, &ctx.path(dir), &[])?);
    }
    tools::ok(&["sync"])?;
    tools::sh(format!("echo later > {}/file; dmsetup suspend --noflush --nolockfs {name}", strange.dir))?;
    let written = "written just before";
    let ended = (|| {
        std::fs::write(ctx.path("mnt1/file"), written)?;
        let start = Instant::now();
        daemon.ok(&["detach", "--force", &one])?;
        ensure!(start.elapsed() < Duration::from_secs(8), "detach --force took {:?}", start.elapsed());
        std::fs::write(ctx.path("mnt2/file"), written)?;
        let took = daemon.terminate()?;
        ensure!(took < STOPPED, "the stop took {took:?}");
        ensure!(!daemon.log().contains("could not be written back"), "{}", daemon.log());
        Ok(())
    })();
    tools::ok(&["dmsetup", "resume", &name])?;
    tools::sh(format!("umount -l {} {}", ctx.path("mnt1"), ctx.path("mnt2")))?;
    strange.umount()?;
    tools::ok(&["dmsetup", "remove", "--retry", &name])?;
    ended?;
    for image in &images {
        // Replays the journal, which may have the data.
        let _ = tools::run(&["e2fsck", "-fy", image])?;
        let found = tools::run(&["debugfs", "-R", "cat /file", image])?.out;
        ensure!(found.trim() == written, "{image} has {found:?}");
    }
    Ok(())
}

/// Unreadable state, and a device that was not recovered, are logged as errors.
fn unreadable_state_is_logged(ctx: &Ctx) -> Res {
    let store = Store::xfs(ctx)?;
    let image = store.sparse("image", MIB)?;
    let mut daemon = Daemon::leaving(ctx)?;
    daemon.attach(&[&image])?;
    daemon.terminate()?;
    std::fs::rename(&image, store.path("moved"))?;
    std::fs::write(ctx.path("run/.state/default/loop7.json"), "nonsense")?;
    daemon.restart()?;
    logged(&daemon, "ERROR", &["loop7.json"])?;
    logged(&daemon, "ERROR", &["default/loop0", &image, "was not recovered"])?;
    std::fs::remove_file(ctx.path("run/.state/default/loop7.json"))?;
    Ok(())
}

/// `release-mounts`, which the unit runs at shutdown, unmounts everything on our devices, deepest
/// first, and disables swap on them, and nothing else. It does nothing while the machine stays up.
fn release_mounts(ctx: &Ctx) -> Res {
    let store = Store::xfs(ctx)?;
    let daemon = Daemon::start(ctx)?;
    let device = daemon.attach(&[&store.sparse("image", 128 * MIB)?])?;
    mkfs("ext4", &device)?;
    let mount = Mount::new(&device, &ctx.path("mnt"), &[])?;
    let swap = daemon.attach(&[&store.sparse("swap", 16 * MIB)?])?;
    tools::sh(format!(
        "mkswap -q {swap}; swapon {swap}; cd {0}
         mkdir in on; mount --bind in in; mount -t tmpfs x on
         truncate -s 8M file; dd if=/dev/zero of=file bs=1M count=8 conv=notrunc,fsync 2>/dev/null
         mkswap -q file; swapon file; echo there > in/file",
        mount.dir
    ))?;
    daemon.ok(&["release-mounts"])?;
    let count = "grep -c ' '$0 /proc/self/mountinfo";
    let mounted = tools::run(&["sh", "-c", count, &mount.dir])?.out;
    ensure!(mounted.trim() == "3", "a machine that stays up lost mounts: {mounted}");
    daemon.ok(&["release-mounts", "--now"])?;
    let mounts = std::fs::read_to_string("/proc/self/mountinfo")?;
    ensure!(!mounts.contains(&mount.dir), "still mounted: {mounts}");
    ensure!(mounts.contains(&ctx.path("store")), "the store was unmounted: {mounts}");
    let swaps = std::fs::read_to_string("/proc/swaps")?;
    ensure!(swaps.lines().count() == 1, "still used as swap: {swaps}");
    fsck("ext4", &device)?;
    let mount = Mount::new(&device, &ctx.path("mnt"), &[])?;
    tools::sh(format!("grep -q there {}/in/file", mount.dir))?;
    mount.umount()?;
    daemon.stop()
}
