// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Commands on a real device: attach --run, create, and the commands that show state.

use std::time::Duration;

use super::MIB;
use crate::daemon::Daemon;
use crate::disk::{self, Disk, same};
use crate::harness::{At, Case, Ctx, Needs, Res, case, ensure};
use crate::model::pattern;
use crate::store::Store;
use crate::tools::{self, Running};

pub(super) fn cases() -> Vec<Case> {
    vec![
        case("commands::attach_run", Needs::Ublk, 90, attach_run),
        case("commands::create", Needs::Ublk, 90, create),
        case("commands::list_and_stats", Needs::Ublk, 90, show_state),
        case("commands::numbers_and_names", Needs::Ublk, 90, numbers_and_names),
        case("commands::doctor_in_other_namespaces", Needs::Ublk, 240, doctor_in_other_namespaces),
    ]
}

/// `attach --run`: the command gets the device, its exit status is returned, the device is
/// detached.
fn attach_run(ctx: &Ctx) -> Res {
    let store = Store::xfs(ctx)?;
    let image = store.sparse("image", 64 * MIB)?;
    let daemon = Daemon::start(ctx)?;
    let gone = |what: &str| -> Res {
        let left = daemon.ublk_ids();
        ensure!(left.is_empty(), "{what}: left {left:?}");
        Ok(())
    };
    daemon.ok(&["attach", &image, "--run", "mkfs.ext4", "-q"])?;
    gone("after mkfs")?;
    daemon.ok(&["attach", &image, "--run", "e2fsck", "-fn", "{}"])?;
    gone("after e2fsck")?;
    let script = "test -b \"$LOOPENGINE_DEVICE\" && exit 37";
    let done = daemon.cli(&["attach", &image, "--run", "sh", "-c", script])?;
    ensure!(done.code == 37, "exit status 37 became {done:?}");
    gone("after a failure")?;
    let done = daemon.cli(&["attach", &image, "--run", "/no/such/program"])?;
    ensure!(done.code != 0 && done.err.trim_end().lines().count() == 1, "a missing program: {done:?}");
    gone("after a missing program")?;
    let done = daemon.cli(&["attach", &image, "--run", "sh", "-c", "kill -9 $$"])?;
    ensure!(done.code == 137, "SIGKILL became {done:?}");
    gone("after SIGKILL")?;
    daemon.stop()
}

fn create(ctx: &Ctx) -> Res {
    let store = Store::xfs(ctx)?;
    let daemon = Daemon::start(ctx)?;
    let (sparse, full) = (store.path("sparse"), store.path("full"));
    daemon.ok(&["create", &sparse, "--size", "100M"])?;
    daemon.ok(&["create", &full, "--size", "20M", "--preallocate"])?;
    ensure!(
        disk::size(&sparse)? == 100 * MIB && disk::allocated(&sparse)? < MIB,
        "the sparse image has {} bytes, {} allocated",
        disk::size(&sparse)?,
        disk::allocated(&sparse)?
    );
    ensure!(
        disk::size(&full)? == 20 * MIB && disk::allocated(&full)? >= 20 * MIB,
        "the full image has {} bytes, {} allocated",
        disk::size(&full)?,
        disk::allocated(&full)?
    );
    for image in [&sparse, &full] {
        let device = daemon.attach(&[image])?;
        let data = pattern(1, 1 << 20);
        disk::write_all(&device, &data)?;
        same(image, &disk::read_all(&device, 0, MIB)?, &data)?;
        let rest = Disk::open_read(&device)?.read(10 * MIB, 1 << 20)?;
        same("a hole", &rest, &vec![0; 1 << 20])?;
        daemon.detach(&device)?;
    }
    daemon.stop()
}

fn show_state(ctx: &Ctx) -> Res {
    let store = Store::xfs(ctx)?;
    let image = store.sparse("image", 8 * MIB)?;
    let daemon = Daemon::start(ctx)?;
    let device = daemon.attach(&[&image, "--depth", "32", "--queues", "2"])?;
    let info = daemon.info(&device)?;
    for (name, value) in [
        ("instance", "default".into()),
        ("number", 0.into()),
        ("image", image.clone().into()),
        ("state", "live".into()),
        ("sizeBytes", (8 * MIB).into()),
        ("depth", 32.into()),
        ("queues", 2.into()),
        ("readOnly", false.into()),
        ("buffered", false.into()),
        ("ioMode", ctx.host.io_modes[0].clone().into()),
    ] as [(&str, serde_json::Value); 10]
    {
        ensure!(info[name] == value, "{name} is {}, expected {value}", info[name]);
    }
    let disk = Disk::open(&device)?;
    for block in 0..50 {
        disk.write(block * 4096, &pattern(block, 4096))?;
        disk.read(block * 4096, 4096)?;
    }
    disk.sync()?;
    drop(disk);
    let stats = daemon.stats(&device)?;
    for (name, least) in [
        ("reads", 50),
        ("readBytes", 50 * 4096),
        ("writes", 50),
        ("writeBytes", 50 * 4096),
        ("flushes", 1),
        ("requests", 101),
        ("batches", 1),
    ] {
        ensure!(stats[name].as_u64() >= Some(least), "{name} below {least}: {stats}");
    }
    for (name, exactly) in [("errors", 0), ("inFlight", 0)] {
        ensure!(stats[name] == exactly, "{name} is not {exactly}: {stats}");
    }
    let features = daemon.json(&["features"])?;
    ensure!(features["kernel"] == tools::ok(&["uname", "-r"])?.as_str(), "features: {features}");
    for words in [&["list"][..], &["stats"], &["features"], &["instance", "list"]] {
        let text = daemon.ok(words)?;
        ensure!(!text.trim().is_empty(), "{words:?} prints nothing");
    }
    let text = daemon.ok(&["list"])?;
    ensure!(text.contains("loop0") && text.contains("image"), "list: {text}");
    let doctor = daemon.cli(&["doctor", &image, "--json"])?.ok().at("doctor")?;
    serde_json::from_str::<serde_json::Value>(&doctor.out).at("doctor --json")?;
    daemon.detach(&device)?;
    daemon.stop()
}

/// Device numbers start at 0 and are reused; every form of a device's name finds it.
fn numbers_and_names(ctx: &Ctx) -> Res {
    let store = Store::xfs(ctx)?;
    let daemon = Daemon::start(ctx)?;
    let mut devices = Vec::new();
    for number in 0..3 {
        let image = store.sparse(&format!("image{number}"), MIB)?;
        let device = daemon.attach(&[&image])?;
        ensure!(device.ends_with(&format!("/default/loop{number}")), "number {number} is {device}");
        devices.push(device);
    }
    let node = std::fs::canonicalize(&devices[2])?.display().to_string();
    let prefix = if crate::BACKEND == "loop" { "/dev/loop" } else { "/dev/ublkb" };
    ensure!(node.starts_with(prefix), "{} is {node}", devices[2]);
    ensure!(daemon.info(&devices[2])?["node"] == node.as_str(), "list shows another node");
    daemon.ok(&["detach", "loop1"])?;
    daemon.ok(&["detach", &node])?;
    let image = store.path("image1");
    let device = daemon.attach(&[&image])?;
    ensure!(device == devices[1], "the lowest free number is 1, got {device}");
    daemon.ok(&["detach", "default/loop0"])?;
    daemon.ok(&["detach", &device])?;
    daemon.stop()
}

/// `podman exec` enters the mount namespace of the container's first process, which can be the
/// daemon. In another PID namespace the daemon has no number.
fn doctor_in_other_namespaces(ctx: &Ctx) -> Res {
    let daemon = Daemon::start(ctx)?;
    let pid = daemon.pid()?.to_string();
    let checks = |prefix: &[&str]| -> Res<Vec<serde_json::Value>> {
        let mut command = daemon.command_of(prefix[0]);
        command.args(&prefix[1..]).args([&ctx.host.program, "doctor", "--json"]);
        let done = Running::start(command)?.finish(Duration::from_secs(30))?;
        serde_json::from_str(&done.out).at(format!("{prefix:?}: {done:?}"))
    };
    let check = |checks: &[serde_json::Value], name: &str| {
        checks.iter().find(|check| check["name"] == name).cloned().unwrap_or_default()
    };
    let entered = check(&checks(&["nsenter", "--target", &pid, "--mount"])?, "mount namespace");
    let (verdict, found) = match crate::BACKEND {
        "loop" => ("ok", "the kernel serves its devices"),
        "fuse" => ("ok", "so that users see its files"),
        _ => ("warning", "this process has entered that of the daemon"),
    };
    ensure!(entered["verdict"] == verdict && entered.to_string().contains(found), "{entered}");

    let elsewhere = checks(&["unshare", "--pid", "--fork", "--mount-proc"])?;
    let seen = check(&elsewhere, "daemon");
    ensure!(seen.to_string().contains("a process of another PID namespace serves 1"), "{seen}");
    for name in ["mount namespace", "open files"] {
        ensure!(check(&elsewhere, name).is_null(), "of another process: {}", check(&elsewhere, name));
    }
    daemon.stop()
}
