// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The lifetime of devices that the kernel serves: without a daemon, under the next one, and beside
//! the host's own loop devices.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use super::MIB;
use crate::daemon::{Daemon, disk_name};
use crate::disk::same;
use crate::fio;
use crate::harness::{At, Case, Ctx, Needs, Res, case, ensure, fail, skip};
use crate::host;
use crate::model::pattern;
use crate::store::{Mount, Store, mkfs};
use crate::tools;

pub(super) fn cases() -> Vec<Case> {
    vec![
        case("lifetime::io_outlives_a_killed_daemon", Needs::Ublk, 180, io_outlives_a_killed_daemon),
        case("lifetime::a_stop_leaves_devices", Needs::Ublk, 90, a_stop_leaves_devices),
        case("lifetime::detach_in_use", Needs::Ublk, 90, detach_in_use),
        case("lifetime::detach_writes_back", Needs::Ublk, 120, detach_writes_back),
        case("lifetime::a_lost_record_is_listed", Needs::Ublk, 90, a_lost_record_is_listed),
        case("lifetime::devices_of_others_stay", Needs::Ublk, 90, devices_of_others_stay),
        case("lifetime::unbound_by_losetup", Needs::Ublk, 60, unbound_by_losetup),
        case("lifetime::losetup_is_undisturbed", Needs::Ublk, 600, losetup_is_undisturbed),
        case("lifetime::partitions_have_names", Needs::Ublk, 60, partitions_have_names),
        case("lifetime::the_first_number_is_configured", Needs::Ublk, 60, the_first_number_is_configured),
        case("lifetime::statistics", Needs::Ublk, 60, statistics),
        case("lifetime::options_of_queues_are_refused", Needs::Ublk, 60, options_of_queues_are_refused),
        case(
            "lifetime::doctor_names_what_the_kernel_lacks",
            Needs::Ublk,
            60,
            doctor_names_what_the_kernel_lacks,
        ),
    ]
}

fn open(device: &str) -> Res<File> {
    OpenOptions::new().read(true).write(true).open(device).at(device)
}

/// The attribute of a loop device in sysfs.
fn attribute(disk: &str, name: &str) -> String {
    fs::read_to_string(format!("/sys/block/{disk}/{name}")).unwrap_or_default().trim().to_owned()
}

fn is_bound(disk: &str) -> bool {
    Path::new(&format!("/sys/block/{disk}/loop/backing_file")).exists()
}

/// fio verifies what it wrote while the daemon dies and the next one takes its devices over.
fn io_outlives_a_killed_daemon(ctx: &Ctx) -> Res {
    let store = Store::ext4(ctx)?;
    let image = store.sparse("image", 64 * MIB)?;
    let mut daemon = Daemon::start(ctx)?;
    let device = daemon.attach(&[&image])?;
    let disk = disk_name(&device)?;
    let node = format!("/dev/{disk}");
    // Longer than the restarts below: an emulated machine needs seconds for each. It leaves its CPU
    // to them.
    let load = if host::is_virtual() { "runtime=40\nrate_iops=400\nsize=16M" } else { "runtime=8\nsize=64M" };
    let jobs = format!(
        "[global]\nfilename={node}\nioengine=libaio\niodepth=8\ndirect=1\nbs=4k\n\
         verify=crc32c\nverify_fatal=1\ntime_based=1\n{load}\n[job]\nrw=randwrite\n"
    );
    let mut load = fio::start(ctx, &jobs)?;
    for _ in 0..3 {
        std::thread::sleep(Duration::from_millis(500));
        daemon.kill()?;
        if !load.alive() {
            fail!("fio ended when the daemon was killed: {:?}", load.finish(Duration::from_secs(5))?);
        }
        File::open(&node).at("without a daemon")?;
        daemon.restart()?;
        let info = daemon.info(&device)?;
        ensure!(info["state"] == "live" && info["node"] == node.as_str(), "{info}");
    }
    load.finish(Duration::from_secs(90))?.clean()?;
    let shared = daemon.log().lines().filter(|line| line.contains("shares")).count();
    ensure!(shared == 0, "a device shares its image with itself: {}", daemon.log());
    daemon.detach(&device)?;
    ensure!(!Path::new(&format!("/sys/block/{disk}")).exists(), "{disk} is still there");
    daemon.stop()
}

/// SIGTERM leaves devices in use and idle ones; `--detach-all` and the next daemon's `detach` end
/// them.
fn a_stop_leaves_devices(ctx: &Ctx) -> Res {
    let store = Store::ext4(ctx)?;
    let images = [store.sparse("a", 32 * MIB)?, store.sparse("b", 32 * MIB)?];
    let mut daemon = Daemon::leaving(ctx)?;
    let devices = [daemon.attach(&[&images[0]])?, daemon.attach(&[&images[1]])?];
    let disks = [disk_name(&devices[0])?, disk_name(&devices[1])?];
    mkfs("ext4", &devices[0])?;
    let dir = ctx.path("mnt");
    let mount = Mount::new(&devices[0], &dir, &[])?;
    daemon.terminate()?;
    ensure!(daemon.log().contains("2 devices go on without the daemon"), "{}", daemon.log());
    fs::write(format!("{dir}/file"), pattern(3, 1 << 20)).at("without a daemon")?;
    ensure!(disks.iter().all(|disk| is_bound(disk)), "a device went with the daemon");
    daemon.restart()?;
    for device in &devices {
        ensure!(daemon.info(device)?["state"] == "live", "{device} is not live");
    }
    same("file", &fs::read(format!("{dir}/file"))?, &pattern(3, 1 << 20))?;
    let done = daemon.cli(&["detach", "--all"])?;
    ensure!(done.code == 4 && done.err.contains(&format!("mounted on {dir}")), "{done:?}");
    mount.umount()?;
    daemon.ok(&["detach", &devices[0]])?;
    ensure!(!disks.iter().any(|disk| is_bound(disk)), "a detached device is still bound");
    daemon.terminate().map(drop)
}

/// Numbers from a configured one on; the next daemon finds the devices whatever it is configured to.
fn the_first_number_is_configured(ctx: &Ctx) -> Res {
    let store = Store::ext4(ctx)?;
    let image = store.sparse("image", MIB)?;
    let config = ctx.path("config");
    fs::write(&config, "first_loop_number = 70000\n")?;
    let mut daemon = Daemon::with(ctx, &["--config", &config])?;
    let device = daemon.attach(&[&image])?;
    ensure!(disk_name(&device)? == "loop70000", "{device} is {}", disk_name(&device)?);
    daemon.kill()?;
    fs::write(&config, "")?;
    daemon.restart()?;
    ensure!(daemon.info(&device)?["node"] == "/dev/loop70000", "{}", daemon.info(&device)?);
    daemon.ok(&["detach", "/dev/loop70000"])?;
    daemon.kill()?;
    for number in ["0", "1048576"] {
        fs::write(&config, format!("first_loop_number = {number}\n"))?;
        let refused = daemon.cli(&["serve", "--backend", "loop", "--config", &config])?;
        ensure!(
            refused.code != 0 && refused.err.contains(&format!("cannot have the number {number}")),
            "{refused:?}"
        );
    }
    fs::write(&config, "")?;
    daemon.restart()?;
    daemon.stop()
}

/// A detach loses nothing that a close left to the last close. LOOP_CLR_FD does: the driver refuses
/// I/O from then on.
fn detach_writes_back(ctx: &Ctx) -> Res {
    let store = Store::ext4(ctx)?;
    let image = store.sparse("image", MIB)?;
    let daemon = Daemon::start(ctx)?;
    for round in 0..40u8 {
        let device = daemon.attach(&[&image])?;
        let (writer, reader) = (open(&device)?, File::open(&device)?);
        writer.write_all_at(&[round; 512], 0)?;
        drop(writer);
        // The detach waits for the reader, and tries again and again.
        let detached = std::thread::scope(|scope| {
            let detach = scope.spawn(|| daemon.cli(&["detach", &device]));
            std::thread::sleep(Duration::from_millis(60 + u64::from(round) * 3));
            drop(reader);
            detach.join()
        });
        let done = detached.map_err(|_| "panicked")??;
        if done.code != 0 {
            daemon.detach(&device)?;
        }
        let mut found = [0; 512];
        File::open(&image)?.read_exact_at(&mut found, 0)?;
        ensure!(found == [round; 512], "round {round}: the write was lost: {:?}", &found[..4]);
    }
    daemon.stop()
}

/// A device in use stays as it was. With force, its last user's close unbinds it.
fn detach_in_use(ctx: &Ctx) -> Res {
    let store = Store::ext4(ctx)?;
    let image = store.sparse("image", 8 * MIB)?;
    let mut daemon = Daemon::start(ctx)?;
    let device = daemon.attach(&[&image])?;
    let disk = disk_name(&device)?;
    let file = open(&device)?;
    for words in [&["detach", &device][..], &["detach", "--all"]] {
        let done = daemon.cli(words)?;
        ensure!(done.code == 4 && done.err.contains("is in use: open in pid"), "{words:?}: {done:?}");
        ensure!(attribute(&disk, "loop/autoclear") == "0", "a refused detach has set autoclear");
    }
    drop(file);
    ensure!(is_bound(&disk), "a close after a refused detach has unbound the device");
    let file = open(&device)?;
    daemon.ok(&["detach", &device, "--force"])?;
    ensure!(!Path::new(&device).exists(), "the name stayed");
    let log = daemon.log();
    ensure!(log.contains(&format!("the kernel keeps /dev/{disk} until its last user closes it")), "{log}");
    file.write_all_at(b"still works", MIB).at("after a forced detach")?;
    file.sync_all()?;
    let done = daemon.cli(&["attach", &image])?;
    ensure!(done.code == 4 && done.err.contains(&format!("in use by /dev/{disk}")), "{done:?}");
    // The next daemon does not take it over.
    daemon.kill()?;
    daemon.restart()?;
    let devices = daemon.json(&["list"])?;
    ensure!(devices.as_array().is_some_and(Vec::is_empty), "{devices}");
    drop(file);
    let unbound = tools::until(Duration::from_secs(5), || (!is_bound(&disk)).then_some(()));
    ensure!(unbound.is_some(), "{disk} stays bound after its last close");
    same("image", &fs::read(&image)?[MIB as usize..][..11], b"still works")?;
    // Its number is used again.
    let device = daemon.attach(&[&image])?;
    ensure!(disk_name(&device)? == disk, "{device} is not {disk}");
    daemon.stop()
}

/// A device of ours whose state file is lost is listed as stuck, and recovered manually.
fn a_lost_record_is_listed(ctx: &Ctx) -> Res {
    let store = Store::ext4(ctx)?;
    let image = store.sparse("image", 8 * MIB)?;
    let mut daemon = Daemon::start(ctx)?;
    let device = daemon.attach(&[&image])?;
    let file = open(&device)?;
    daemon.kill()?;
    fs::remove_file(ctx.path("run/.state/default/loop0.json"))?;
    daemon.restart()?;
    let info = daemon.info(&device)?;
    ensure!(info["state"] == "stuck", "{info}");
    file.write_all_at(b"x", 0).at("while it is stuck")?;
    // The kernel serves it all the same: a second writer would destroy the image.
    let done = daemon.cli(&["attach", &image])?;
    ensure!(done.code == 4 && done.err.contains("in use by /dev/loop"), "{done:?}");
    daemon.ok(&["recover", &device, "--image", &image])?;
    let info = daemon.info(&device)?;
    ensure!(info["state"] == "live" && info["image"] == image.as_str(), "{info}");
    drop(file);
    daemon.detach(&device)?;
    daemon.stop()
}

/// Loop devices of others are neither taken over nor changed, whatever their numbers.
fn devices_of_others_stay(ctx: &Ctx) -> Res {
    let store = Store::ext4(ctx)?;
    let (ours, theirs) = (store.sparse("ours", 8 * MIB)?, store.sparse("theirs", 8 * MIB)?);
    let mut daemon = Daemon::start(ctx)?;
    let device = daemon.attach(&[&ours])?;
    let number: u32 = disk_name(&device)?.trim_start_matches("loop").parse()?;
    let foreign = format!("/dev/loop{}", number + 1);
    tools::ok(&["losetup", &foreign, &theirs])?;
    let check = || -> Res {
        ensure!(tools::ok(&["losetup", "-nO", "BACK-FILE", &foreign])?.trim() == theirs, "{foreign}");
        Ok(())
    };
    let tried = (|| -> Res {
        let second = daemon.attach(&[&store.sparse("second", 8 * MIB)?])?;
        ensure!(disk_name(&second)? == format!("loop{}", number + 2), "{second}");
        daemon.kill()?;
        daemon.restart()?;
        let devices = daemon.json(&["list"])?;
        ensure!(devices.as_array().is_some_and(|all| all.len() == 2), "{devices}");
        let done = daemon.cli(&["detach", &foreign, "--force"])?;
        ensure!(done.code == 3, "{done:?}");
        let done = daemon.cli(&["attach", &theirs])?;
        ensure!(done.code == 4 && done.err.contains(&format!("in use by {foreign}")), "{done:?}");
        daemon.ok(&["detach", "--all"])?;
        check()
    })();
    tools::ok(&["losetup", "-d", &foreign])?;
    tried?;
    // Its number is free for ours; the daemon removes the device in the end.
    let devices = [daemon.attach(&[&ours])?, daemon.attach(&[&theirs])?];
    ensure!(disk_name(&devices[1])? == format!("loop{}", number + 1), "{devices:?}");
    daemon.stop()
}

/// A device that losetup unbinds is listed as stuck, and can be detached.
fn unbound_by_losetup(ctx: &Ctx) -> Res {
    let store = Store::ext4(ctx)?;
    let image = store.sparse("image", 8 * MIB)?;
    let daemon = Daemon::start(ctx)?;
    let device = daemon.attach(&[&image])?;
    tools::ok(&["losetup", "-d", &format!("/dev/{}", disk_name(&device)?)])?;
    let info = daemon.info(&device)?;
    let why = "another program has unbound it; detach it, and attach its image again";
    ensure!(info["state"] == "stuck" && info["reason"] == why, "{info}");
    daemon.detach(&device)?;
    daemon.stop()
}

/// `losetup -f` of the host finds its own numbers while devices come and go.
fn losetup_is_undisturbed(ctx: &Ctx) -> Res {
    let store = Store::ext4(ctx)?;
    let (ours, theirs) = (store.sparse("ours", 8 * MIB)?, store.sparse("theirs", 8 * MIB)?);
    let daemon = Daemon::start(ctx)?;
    std::thread::scope(|scope| -> Res {
        let attaching = scope.spawn(|| -> Res {
            for _ in 0..if ctx.host.full { 3000 } else { 30 } {
                let device = daemon.attach(&[&ours])?;
                daemon.detach(&device)?;
            }
            Ok(())
        });
        let mut rounds = 0;
        while !attaching.is_finished() {
            let node = tools::ok(&["losetup", "-f", "--show", &theirs])?;
            let number: u32 = node.trim().trim_start_matches("/dev/loop").parse().at(&node)?;
            tools::ok(&["losetup", "-d", node.trim()])?;
            ensure!(number < 1 << 15, "losetup -f found {node}");
            rounds += 1;
        }
        ctx.note(format!("{rounds} rounds of losetup"));
        attaching.join().map_err(|_| "the thread panicked")?
    })?;
    daemon.stop()
}

/// Partitions have names beside the device's, which follow the table, under each daemon.
fn partitions_have_names(ctx: &Ctx) -> Res {
    let store = Store::ext4(ctx)?;
    let image = store.sparse("image", 16 * MIB)?;
    tools::sh(format!("printf 'label: gpt\\nsize=4M\\nsize=4M\\n' | sfdisk -q {image}"))?;
    let kernels = tools::ok(&["losetup", "-fP", "--show", &image])?;
    let scans = File::open(format!("{}p1", kernels.trim())).is_ok();
    tools::ok(&["losetup", "-d", kernels.trim()])?;
    if !scans {
        skip!("this kernel finds no partitions on its own loop devices, either");
    }
    let mut daemon = Daemon::start(ctx)?;
    let device = daemon.attach(&[&image, "--partscan"])?;
    let names = |wanted: &[u32]| -> Res {
        let found = || (1..4).filter(|n| File::open(format!("{device}p{n}")).is_ok()).collect::<Vec<u32>>();
        let reached = tools::until(Duration::from_secs(10), || (found() == wanted).then_some(()));
        ensure!(reached.is_some(), "partitions {:?}, expected {wanted:?}", found());
        Ok(())
    };
    names(&[1, 2])?;
    tools::sh(format!("echo 'size=2M' | sfdisk -q --append {device}"))?;
    names(&[1, 2, 3])?;
    daemon.kill()?;
    daemon.restart()?;
    tools::ok(&["sfdisk", "-q", "--delete", &device, "1"])?;
    names(&[2, 3])?;
    daemon.detach(&device)?;
    names(&[])?;
    daemon.stop()
}

/// `stats` shows what the block layer counts.
fn statistics(ctx: &Ctx) -> Res {
    let store = Store::ext4(ctx)?;
    let image = store.sparse("image", 8 * MIB)?;
    let daemon = Daemon::start(ctx)?;
    let device = daemon.attach(&[&image])?;
    let before = daemon.stats(&device)?["writes"].as_u64();
    let node = format!("of={device}");
    tools::ok(&["dd", "if=/dev/zero", &node, "bs=64k", "count=8", "oflag=direct", "conv=notrunc,fsync"])?;
    let after = daemon.stats(&device)?;
    // A flush counts as a write without data, too.
    ensure!(before == Some(0) && after["writes"].as_u64() >= Some(8), "{after}");
    ensure!(after["writeBytes"] == 8 << 16, "{after}");
    ensure!(after["inFlight"] == 0 && after["flushes"].as_u64() >= Some(1), "{after}");
    daemon.ok(&["stats"])?;
    daemon.stop()
}

/// The daemon has no queues here: what configures them is refused, and nothing is left.
fn options_of_queues_are_refused(ctx: &Ctx) -> Res {
    let store = Store::ext4(ctx)?;
    let image = store.sparse("image", 8 * MIB)?;
    let daemon = Daemon::start(ctx)?;
    for (words, says) in [
        (&["--queues", "1"][..], "no queues"),
        (&["--depth", "8"], "no queues"),
        (&["--io-mode", "copy"], "I/O mode copy does not apply"),
        (&["--iops", "5"], "does not limit the I/O of a device"),
        (&["--bandwidth", "1M"], "does not limit the I/O of a device"),
        (&["--durable"], "only block devices over ublk support durable writes"),
    ] {
        let done = daemon.cli(&[&["attach", &image], words].concat())?;
        ensure!(done.code != 0 && done.err.contains(says), "{words:?}: {done:?}");
    }
    ensure!(daemon.ublk_ids().is_empty(), "a device was left");
    ensure!(daemon.footprint()?.threads < 8, "{:?}", daemon.footprint()?);
    let instances = daemon.json(&["instance", "list"])?;
    ensure!(instances[0]["backend"] == "loop" && instances[0]["workers"] == 0, "{instances}");
    let checks = daemon.cli(&["doctor", "--json"])?;
    let namespace = r#""name": "mount namespace","#;
    let checked = checks.out.split('{').find(|check| check.contains(namespace)).unwrap_or_default();
    ensure!(checked.contains(r#""verdict": "ok""#), "{checked}");
    daemon.stop()
}

/// On any kernel this backend works, and `doctor` says what else would need a newer one.
fn doctor_names_what_the_kernel_lacks(ctx: &Ctx) -> Res {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let release = release.trim();
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).filter_map(|number| number.parse().ok());
    let (Some(major), Some(minor)) = (numbers.next(), numbers.next()) else {
        fail!("a release without numbers: {release}");
    };
    let kernel: (u32, u32) = (major, minor);
    let daemon = Daemon::start(ctx)?;
    let features = daemon.json(&["features"])?;
    let backends = features["backends"].as_array().into_iter().flatten();
    ensure!(backends.into_iter().any(|backend| backend == "loop"), "{features}");

    let said = daemon.cli(&["doctor"])?.out;
    let words = |line: &str| line.split_whitespace().map(str::to_owned).collect::<Vec<_>>().join(" ");
    let lines: Vec<String> = said.lines().map(words).collect();
    let supported = format!("ok kernel loop devices Linux {release} supports them (since 6.1)");
    ensure!(lines.contains(&supported), "{said}");
    for (feature, since) in [("ublk devices", (6, 5)), ("private devices", (6, 9))] {
        let (major, minor) = since;
        let lacking = format!("warning {feature} need Linux {major}.{minor}: this is {release}");
        ensure!(lines.contains(&lacking) == (kernel < since), "{feature}: {said}");
    }
    if kernel < (6, 9) {
        for purpose in ["run", "mount", "podman"] {
            let done = daemon.cli(&["doctor", "--for", purpose])?;
            ensure!(done.code == 1, "{purpose}: {done:?}");
            let instead = if kernel < (6, 5) { "serve --backend loop" } else { "loopengine attach" };
            for part in [format!("need Linux 6.9: this is {release}"), instead.into()] {
                ensure!(done.out.contains(&part), "{purpose}: {done:?}");
            }
        }
    }
    daemon.stop()
}
