// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The next daemon cannot read the recorded state of its devices, or a daemon cannot record any.
//!
//! Knows where state and names are in the run directory. Changes to images are in `recovery_image`.

use std::time::Duration;

use super::MIB;
use crate::daemon::Daemon;
use crate::disk::{Disk, same};
use crate::harness::{Case, Ctx, Needs, Res, case, ensure};
use crate::store::{Mount, Store, mkfs};
use crate::tools::{self, Running};

pub(super) fn cases() -> Vec<Case> {
    let needs = Needs::Recovery("copy");
    vec![
        case("recovery_state::unreadable_state_is_stuck_and_recovered", needs, 180, unreadable_state),
        case("recovery_state::an_unreadable_instance_keeps_its_devices", needs, 120, unreadable_instance),
        case("recovery_state::lost_names_do_not_collide", needs, 150, lost_names),
        case("recovery_state::a_full_run_directory_is_named", Needs::Ublk, 120, full_run_directory),
    ]
}

fn stuck(daemon: &Daemon, device: &str, says: &str) -> Res {
    let info = daemon.info(device)?;
    let reason = info["reason"].as_str().unwrap_or_default();
    ensure!(info["state"] == "stuck" && reason.contains(says), "{device}: wanted '{says}' in {info}");
    Ok(())
}

/// For each defect of a state file: the device is listed, keeps its name, and can be recovered.
fn unreadable_state(ctx: &Ctx) -> Res {
    const OFFSET: u64 = MIB;
    let defects: [(&str, &str); 7] = [
        ("echo garbage > FILE", "not JSON"),
        ("truncate -s 100 FILE", "not JSON"),
        ("sed -i 's/\"version\": *1/\"version\": 99/' FILE", "version 99"),
        ("chown 1000 FILE", "user 1000"),
        ("chmod 666 FILE", "writable by others"),
        ("rm FILE", "missing"),
        ("rm FILE && mkfifo -m 600 FILE", "not a regular file"),
    ];
    let store = Store::xfs(ctx)?;
    let mut daemon = Daemon::start(ctx)?;
    let mut devices = Vec::new();
    for number in 0..defects.len() {
        let image = store.sparse(&format!("image{number}"), 4 * MIB)?;
        let device = daemon.attach(&[&image, "--offset", &OFFSET.to_string()])?;
        Disk::open(&device)?.write(4096, &vec![number as u8 + 1; 4096])?;
        devices.push((device, image));
    }
    let before = daemon.json(&["list"])?;
    daemon.kill()?;
    for (number, (defect, _)) in defects.iter().enumerate() {
        tools::sh(defect.replace("FILE", &format!("{}/.state/default/loop{number}.json", ctx.path("run"))))?;
    }
    daemon.restart()?;
    let log = daemon.log();
    for (number, ((device, _), (_, says))) in devices.iter().zip(defects).enumerate() {
        stuck(&daemon, device, says)?;
        let named = |l: &str| l.contains("ERROR") && l.contains(&format!("default/loop{number}"));
        ensure!(log.lines().any(named), "no error for loop{number}: {log}");
        let info = daemon.info(device)?;
        for same in ["node", "sizeBytes", "blockSizeBytes", "queues", "depth", "ioMode", "readOnly"] {
            ensure!(info[same] == before[number][same], "{same} of {info}, was {}", before[number]);
        }
    }

    // Other devices do not get the names of stuck ones, and users of stuck devices wait.
    let other = store.sparse("other", MIB)?;
    let next = daemon.attach(&[&other])?;
    ensure!(next.ends_with("/loop7"), "attach gave {next}");
    daemon.detach(&next)?;
    let mut command = std::process::Command::new("dd");
    command.args([&format!("if={}", devices[0].0), "of=/dev/null", "bs=4k", "count=1", "iflag=direct"]);
    let mut reader = Running::start(command)?;
    std::thread::sleep(Duration::from_millis(300));
    ensure!(reader.alive(), "a reader did not wait");

    // Devices stay stuck until `recover`.
    daemon.kill()?;
    daemon.restart()?;
    for (device, _) in &devices {
        stuck(&daemon, device, "")?;
    }
    let (last, rest) = devices.split_last().ok_or("no devices")?;
    let offset = OFFSET.to_string();
    for (number, (device, image)) in rest.iter().enumerate() {
        daemon.ok(&["recover", device, "--image", image, "--offset", &offset])?;
        let mut info = daemon.info(device)?;
        info["sizeLimitBytes"] = before[number]["sizeLimitBytes"].clone();
        let mut was = before[number].clone();
        // Only the state file has it.
        was["sinceUnixSeconds"] = serde_json::Value::Null;
        ensure!(info == was, "{info}, was {was}");
        same(device, &Disk::open(device)?.read(4096, 4096)?, &vec![number as u8 + 1; 4096])?;
    }
    reader.finish(Duration::from_secs(20))?.ok()?;
    daemon.ok(&["detach", "--force", &last.0])?;
    ensure!(daemon.ublk_ids().len() == rest.len(), "left: {:?}", daemon.ublk_ids());
    let other = daemon.attach(&[&other])?;
    ensure!(other == last.0, "attach gave {other}");
    daemon.ok(&["detach", "--all"])?;
    daemon.stop()
}

fn unreadable_instance(ctx: &Ctx) -> Res {
    let store = Store::xfs(ctx)?;
    let image = store.sparse("image", 4 * MIB)?;
    let mut daemon = Daemon::start(ctx)?;
    daemon.ok(&["instance", "create", "other", "--workers", "3"])?;
    let device = daemon.attach(&["-i", "other", &image])?;
    let before = daemon.info(&device)?;
    daemon.kill()?;
    let file = format!("{}/.state/other/instance.json", ctx.path("run"));
    std::fs::write(&file, "{")?;
    daemon.restart()?;
    ensure!(daemon.info(&device)? == before, "{}, was {before}", daemon.info(&device)?);
    let log = daemon.log();
    ensure!(log.lines().any(|l| l.contains("ERROR") && l.contains("instance other")), "no error: {log}");
    Disk::open(&device)?.write(0, &[1; 4096])?;
    daemon.detach(&device)?;
    daemon.ok(&["instance", "remove", "other"])?;
    daemon.stop()
}

/// A device without state and name is not removed, but listed as stuck.
fn lost_names(ctx: &Ctx) -> Res {
    let store = Store::xfs(ctx)?;
    let image = store.sparse("image", 64 * MIB)?;
    let mut daemon = Daemon::start(ctx)?;
    let device = daemon.attach(&[&image])?;
    mkfs("ext4", &device)?;
    let mount = Mount::new(&device, &ctx.path("mnt"), &[])?;
    tools::sh(format!("echo kept > {0}/file && sync -f {0}/file", mount.dir))?;
    daemon.kill()?;
    tools::sh(format!("rm -r {0}/.state {0}/default/loop0", ctx.path("run")))?;
    daemon.restart()?;
    let list = daemon.json(&["list"])?;
    let [lost] = list.as_array().map(Vec::as_slice).unwrap_or_default() else {
        crate::harness::fail!("one device wanted: {list}");
    };
    let name = lost["path"].as_str().ok_or("no path")?.to_owned();
    ensure!(lost["state"] == "stuck" && name != device, "list says {lost}");
    let other = store.sparse("other", MIB)?;
    let next = daemon.attach(&[&other])?;
    ensure!(next != name, "attach reused {name}");
    daemon.detach(&next)?;
    daemon.ok(&["recover", &name, "--image", &image])?;
    ensure!(tools::sh(format!("cat {}/file", mount.dir))? == "kept", "the file system lost a file");
    mount.umount()?;
    daemon.detach(&name)?;
    daemon.stop()
}

/// The state cannot be written: the attach fails without leftovers, and names the full directory.
fn full_run_directory(ctx: &Ctx) -> Res {
    let store = Store::xfs(ctx)?;
    let image = store.sparse("image", 4 * MIB)?;
    let run = ctx.path("run");
    let mount = Mount::new("none", &run, &["-t", "tmpfs", "-o", "size=128k,mode=711"])?;
    let mut daemon = Daemon::start(ctx)?;
    let filler = format!("{run}/filler");
    // Fails once the file system is full, as intended.
    let _ = tools::run(&["dd", "if=/dev/zero", &format!("of={filler}"), "bs=4k", "count=64"])?;
    let done = daemon.cli(&["attach", &image])?;
    ensure!(done.code == 5 && done.err.contains(&format!("{run}/.state/default")), "attach: {done:?}");
    ensure!(done.err.lines().count() == 1 && done.err.contains("full"), "attach: {done:?}");
    let left = tools::sh(format!("find {run}/.state {run}/default -name 'loop*'"))?;
    ensure!(left.is_empty() && daemon.ublk_ids().is_empty(), "left: {left} {:?}", daemon.ublk_ids());
    let list = daemon.json(&["list"])?;
    ensure!(list.as_array().is_some_and(Vec::is_empty), "left in list: {list}");
    std::fs::remove_file(&filler)?;
    let device = daemon.attach(&[&image])?;
    daemon.detach(&device)?;
    daemon.check_alive()?;
    // `stop` would complain about the mount of this case.
    drop(daemon);
    mount.umount()
}
