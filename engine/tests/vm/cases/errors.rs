// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Bad input: one line with the cause and the next step, a documented exit status, no leftovers.

use std::path::Path;
use std::process::Command;

use super::MIB;
use crate::daemon::Daemon;
use crate::disk::Disk;
use crate::harness::{At, Case, Ctx, Needs, Res, case, ensure};
use crate::store::{Mount, Store, mkfs};
use crate::tools::{self, Done, Running, SHORT};

pub(super) fn cases() -> Vec<Case> {
    vec![
        case("errors::bad_images", Needs::Ublk, 150, bad_images),
        case("errors::no_direct_io", Needs::Ublk, 90, no_direct_io),
        case("errors::second_writer_is_refused", Needs::Ublk, 90, second_writer_is_refused),
        case("errors::instances_and_quota", Needs::Ublk, 120, instances_and_quota),
        case("errors::in_use", Needs::Ublk, 90, in_use),
        case("errors::dead_daemon", Needs::Ublk, 90, dead_daemon),
        case("errors::second_daemon", Needs::Ublk, 90, second_daemon),
        case("errors::no_driver", Needs::Ublk, 90, no_driver),
        case("errors::other_user", Needs::Ublk, 90, other_user),
    ]
}

/// Expects one line on standard error, no standard output, and one of these exit statuses.
fn refused(done: &Done, codes: &[i32], says: &str) -> Res {
    ensure!(
        codes.contains(&done.code),
        "{}: exit status {}, expected {codes:?}: {}",
        done.what,
        done.code,
        done.err
    );
    ensure!(
        done.err.trim_end().lines().count() == 1 && done.out.is_empty(),
        "{}: not one line on standard error: {done:?}",
        done.what
    );
    ensure!(done.err.to_lowercase().contains(says), "{}: does not say '{says}': {}", done.what, done.err);
    Ok(())
}

/// Expects a usage error: one line with the cause, then a hint at the help.
fn usage(done: &Done, says: &str) -> Res {
    let mut first = done.clone();
    if done.err.starts_with("error: ") {
        first.err = done.err.lines().next().unwrap_or_default().to_string();
    }
    refused(&first, &[2], says)
}

/// Checks that there are no devices, and no more names or open files than before.
fn nothing_left(daemon: &mut Daemon, before: &crate::daemon::Footprint) -> Res {
    daemon.check_alive()?;
    let devices = daemon.json(&["list"])?;
    ensure!(devices.as_array().is_some_and(Vec::is_empty), "left in list: {devices}");
    let ids = daemon.ublk_ids();
    ensure!(ids.is_empty(), "left in the kernel: {ids:?}");
    daemon.footprint_is(before)
}

/// A daemon that has had a device before, so that its threads run.
fn warm(ctx: &Ctx, store: &Store) -> Res<(Daemon, crate::daemon::Footprint)> {
    let daemon = Daemon::start(ctx)?;
    let image = store.sparse("warm", MIB)?;
    let device = daemon.attach(&[&image])?;
    daemon.detach(&device)?;
    let footprint = daemon.settled_footprint()?;
    Ok((daemon, footprint))
}

fn bad_images(ctx: &Ctx) -> Res {
    let store = Store::xfs(ctx)?;
    let (mut daemon, before) = warm(ctx, &store)?;
    let good = store.sparse("good", MIB)?;
    let empty = store.sparse("empty", 0)?;
    let tiny = store.sparse("tiny", 100)?;
    let locked = store.sparse("locked", MIB)?;
    tools::ok(&["chattr", "+i", &locked])?;
    let missing = store.path("missing");
    let directory = store.path(".");
    let table: [(&[&str], i32, &str); 12] = [
        (&[&missing], 3, "missing"),
        (&[&empty], 2, "empty"),
        (&[&tiny], 2, "tiny"),
        (&[&directory], 2, "directory"),
        (&["/dev/null"], 2, "null"),
        (&[&locked], 6, "read-only"),
        (&[&good, "--offset", "100"], 2, "offset"),
        (&[&good, "--offset", "1M"], 2, "offset"),
        (&[&good, "--offset", "2G"], 2, "offset"),
        (&[&good, "--size-limit", "100"], 2, "100"),
        (&[&good, "--block-size", "4096", "--offset", "512"], 2, "offset"),
        (&[&good, "-i", "nowhere"], 3, "nowhere"),
    ];
    for (words, code, says) in table {
        let done = daemon.cli(&[&["attach"], words].concat())?;
        refused(&done, &[code], says)?;
    }
    for (option, value) in [
        ("--block-size", "3000"),
        ("--block-size", "131072"),
        ("--depth", "0"),
        ("--queues", "0"),
        ("--io-mode", "sideways"),
    ] {
        usage(&daemon.cli(&["attach", &good, option, value])?, option)?;
    }
    for size in ["10X", "", "0", "-5", "99999999999T"] {
        let path = store.path("new");
        let done = daemon.cli(&["create", &path, &format!("--size={size}")])?;
        usage(&done, "size").at(format!("create --size={size}"))?;
        ensure!(!Path::new(&path).exists(), "created a file of size '{size}'");
    }
    refused(&daemon.cli(&["create", &good, "--size", "1M"])?, &[4], "good")?;
    let path = store.path("huge");
    let done = daemon.cli(&["create", &path, "--size", "4G", "--preallocate"])?;
    refused(&done, &[5], "huge")?;
    ensure!(!Path::new(&path).exists(), "half an image was left");
    for words in [
        &["detach", "/run/nothing/loop7"][..],
        &["detach", "loop7"],
        &["resize", "loop7"],
        &["stats", "loop7"],
    ] {
        refused(&daemon.cli(words)?, &[3], "loop7")?;
    }
    tools::ok(&["chattr", "-i", &locked])?;
    nothing_left(&mut daemon, &before)?;
    daemon.stop()
}

/// Without direct I/O, the error suggests --buffered, and --buffered works.
fn no_direct_io(ctx: &Ctx) -> Res {
    let store = Store::xfs(ctx)?;
    let mut daemon = Daemon::start(ctx)?;
    // ext4 with data=journal has no direct I/O.
    let journal = store.sparse("journal", 64 * MIB)?;
    let outer = daemon.attach(&[&journal])?;
    mkfs("ext4", &outer)?;
    let mount = Mount::new(&outer, &ctx.path("mnt"), &["-o", "data=journal"])?;
    let image = format!("{}/image", mount.dir);
    std::fs::File::create(&image)?.set_len(MIB)?;
    let before = daemon.settled_footprint()?;
    refused(&daemon.cli(&["attach", &image])?, &[7], "--buffered")?;
    daemon.footprint_is(&before)?;
    ensure!(daemon.ublk_ids().len() == 1, "a device was left: {:?}", daemon.ublk_ids());
    let device = daemon.attach(&[&image, "--buffered"])?;
    Disk::open(&device)?.write(0, &[5; 4096])?;
    daemon.detach(&device)?;
    ensure!(std::fs::read(&image)?[..4096] == [5; 4096], "not written");
    mount.umount()?;
    daemon.check_alive()?;
    daemon.detach(&outer)?;
    daemon.stop()
}

/// A second writer is refused under every name of the image.
fn second_writer_is_refused(ctx: &Ctx) -> Res {
    let store = Store::xfs(ctx)?;
    let daemon = Daemon::start(ctx)?;
    daemon.ok(&["instance", "create", "other", "--max", "4"])?;
    let image = store.sparse("image", MIB)?;
    let (hard, soft) = (store.path("hard"), store.path("soft"));
    std::fs::hard_link(&image, &hard)?;
    std::os::unix::fs::symlink(&image, &soft)?;
    let device = daemon.attach(&[&image])?;
    for name in [&image, &hard, &soft] {
        refused(&daemon.cli(&["attach", name])?, &[4], "attached")?;
        refused(&daemon.cli(&["attach", "-i", "other", name])?, &[4], "attached")?;
    }
    ensure!(daemon.ublk_ids().len() == 1, "{:?}", daemon.ublk_ids());
    Disk::open(&device)?.write(0, &[1; 4096])?;
    daemon.detach(&device)?;
    let again = daemon.attach(&["-i", "other", &hard])?;
    daemon.detach(&again)?;
    daemon.stop()
}

fn instances_and_quota(ctx: &Ctx) -> Res {
    let store = Store::xfs(ctx)?;
    let (mut daemon, _) = warm(ctx, &store)?;
    daemon.ok(&["instance", "create", "small", "--max", "2", "--workers", "1"])?;
    let before = daemon.settled_footprint()?;
    let exists = daemon.cli(&["instance", "create", "small"])?;
    refused(&exists, &[4], "small")?;
    for name in ["", "../up", ".hidden", "a/b", "white space", &"x".repeat(65)] {
        let done = daemon.cli(&["instance", "create", "--", name])?;
        refused(&done, &[2], "name").at(format!("instance '{name}'"))?;
    }
    refused(&daemon.cli(&["instance", "remove", "nowhere"])?, &[3], "nowhere")?;
    let images: Vec<String> =
        (0..3).map(|number| store.sparse(&format!("image{number}"), MIB)).collect::<Res<_>>()?;
    for image in &images[..2] {
        daemon.attach(&["-i", "small", image])?;
    }
    let full = daemon.cli(&["attach", "-i", "small", &images[2]])?;
    refused(&full, &[5], "small")?;
    ensure!(daemon.ublk_ids().len() == 2, "{:?}", daemon.ublk_ids());
    let occupied = daemon.cli(&["instance", "remove", "small"])?;
    refused(&occupied, &[4], "small")?;
    let list = daemon.json(&["instance", "list"])?;
    let small = list.as_array().into_iter().flatten().find(|i| i["name"] == "small");
    ensure!(small.is_some_and(|i| i["devices"] == 2 && i["maxDevices"] == 2), "instance list: {list}");
    daemon.ok(&["detach", "small/loop0"])?;
    let third = daemon.attach(&["-i", "small", &images[2]])?;
    ensure!(third.ends_with("/small/loop0"), "the free number is not used: {third}");
    daemon.ok(&["detach", "--all"])?;
    nothing_left(&mut daemon, &before)?;
    daemon.ok(&["instance", "remove", "small"])?;
    daemon.stop()
}

/// detach refuses a mounted device, except with --force.
fn in_use(ctx: &Ctx) -> Res {
    let store = Store::xfs(ctx)?;
    let mut daemon = Daemon::start(ctx)?;
    let image = store.sparse("image", 64 * MIB)?;
    let device = daemon.attach(&[&image])?;
    mkfs("ext4", &device)?;
    let mount = Mount::new(&device, &ctx.path("mnt"), &[])?;
    refused(&daemon.cli(&["detach", &device])?, &[4], "use")?;
    refused(&daemon.cli(&["detach", "--all"])?, &[4], "use")?;
    tools::sh(format!("echo works > {0}/file; sync -f {0}/file", mount.dir)).at("after a refused detach")?;
    daemon.ok(&["detach", &device, "--force"])?;
    drop(mount);
    daemon.check_alive()?;
    let device = daemon.attach(&[&image])?;
    let mount = Mount::new(&device, &ctx.path("mnt"), &[])?;
    let file = std::fs::read_to_string(format!("{}/file", mount.dir))?;
    ensure!(file == "works\n", "found {file:?}");
    mount.umount()?;
    daemon.detach(&device)?;
    daemon.stop()
}

fn dead_daemon(ctx: &Ctx) -> Res {
    let store = Store::xfs(ctx)?;
    let image = store.sparse("image", MIB)?;
    let mut daemon = Daemon::start(ctx)?;
    daemon.kill()?;
    let all_refused = |daemon: &Daemon| -> Res {
        for words in [
            &["attach", &image][..],
            &["detach", "--all"],
            &["resize", "loop0"],
            &["list"],
            &["list", "--json"],
            &["stats"],
            &["instance", "list"],
        ] {
            refused(&daemon.cli(words)?, &[8], "serve")?;
        }
        // As with env(1), 125 means that the command did not run.
        refused(&daemon.cli(&["attach", &image, "--run", "true"])?, &[125], "serve")?;
        Ok(())
    };
    all_refused(&daemon).at("after SIGKILL")?;
    daemon.restart()?;
    daemon.check_alive()?;
    daemon.sigterm()?;
    daemon.wait_drained()?;
    all_refused(&daemon).at("after SIGTERM")
}

fn second_daemon(ctx: &Ctx) -> Res {
    let mut daemon = Daemon::start(ctx)?;
    let second = Running::start(daemon.command(&["serve"]))?.finish(SHORT)?;
    ensure!(
        second.code == 4 && second.err.trim_end().lines().count() == 1,
        "a second daemon on the same directory: {second:?}"
    );
    daemon.check_alive()?;
    daemon.stop()
}

/// Without the driver, the error names the modprobe command.
fn no_driver(ctx: &Ctx) -> Res {
    tools::ok(&["modprobe", "-r", "ublk_drv"])?;
    let mut command = Command::new(&ctx.host.program);
    command.args(["serve", "--backend", "ublk", "--run-dir", &ctx.path("run")]);
    let done = Running::start(command).and_then(|running| running.finish(SHORT));
    tools::ok(&["modprobe", "ublk_drv"])?;
    refused(&done?, &[8], "modprobe ublk_drv")
}

/// Commands of another user fail, with the reason.
fn other_user(ctx: &Ctx) -> Res {
    let store = Store::xfs(ctx)?;
    let (mut daemon, before) = warm(ctx, &store)?;
    let image = store.sparse("image", MIB)?;
    tools::ok(&["chmod", "644", &image])?;
    let as_other = |words: &[&str]| {
        let plain = daemon.command(words);
        let mut command = Command::new("setpriv");
        command
            .args(["--reuid=65534", "--regid=65534", "--clear-groups"])
            .arg(plain.get_program())
            .args(plain.get_args());
        for (name, value) in plain.get_envs() {
            value.map(|value| command.env(name, value));
        }
        Running::start(command)?.finish(SHORT)
    };
    let device = daemon.attach(&[&image])?;
    for words in [
        &["attach", &image][..],
        &["attach", "--read-only", &image],
        &["list", "--instance", "default"],
        &["stats"],
        &["detach", "--all"],
        &["detach", &device],
    ] {
        refused(&as_other(words)?, &[6], "")?;
    }
    refused(&as_other(&["find", &image])?, &[3], "no device that this user can see")?;
    // doctor and attach suggest private devices, or name the kernel that these need.
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    let doctor: serde_json::Value = serde_json::from_str(&as_other(&["doctor", "--json"])?.out)?;
    let private = &doctor[0];
    ensure!(private["name"] == "private devices", "{doctor}");
    let hint = as_other(&["attach", &image])?.err;
    if private["verdict"] == "ok" {
        ensure!(hint.contains("'loopengine mount IMAGE DIR'"), "{hint}");
    } else {
        ensure!(private["found"] == format!("need Linux 7.0: this is {release}"), "{doctor}");
        ensure!(
            doctor.as_array().is_some_and(|checks| checks.len() == 1),
            "advice that does not help: {doctor}"
        );
        ensure!(hint.contains(&format!("private devices need Linux 7.0: this is {release}")), "{hint}");
        refused(&as_other(&["run", "--", "true"])?, &[125], &format!("linux 7.0: this is {release}"))?;
    }
    // list shows no devices of root.
    let listed = as_other(&["list", "--json"])?.ok()?.out;
    let nothing: serde_json::Value = serde_json::from_str(&listed)?;
    ensure!(nothing == serde_json::json!({ "devices": [], "pools": [] }), "{listed}");
    daemon.detach(&device)?;
    nothing_left(&mut daemon, &before)?;
    daemon.stop()
}
