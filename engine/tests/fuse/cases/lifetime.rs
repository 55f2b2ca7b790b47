// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The lifetime of files, their file systems and their daemon.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::process::Command;
use std::time::Duration;

use super::MIB;
use crate::daemon::Daemon;
use crate::disk::{self, same};
use crate::harness::{At, Case, Ctx, Needs, Res, case, ensure, fail};
use crate::model::pattern;
use crate::store::{Mount, Store, mkfs};
use crate::tools;

pub(super) fn cases() -> Vec<Case> {
    vec![
        case("lifetime::detach_in_use", Needs::Ublk, 90, detach_in_use),
        case("lifetime::users_are_named", Needs::Ublk, 90, users_are_named),
        case("lifetime::forced_with_all_tags_in_flight", Needs::Ublk, 60, forced_while_busy),
        case("lifetime::forced_below_a_file_system", Needs::Ublk, 90, forced_below),
        case("lifetime::stale_file_fails", Needs::Ublk, 60, stale_file_fails),
        case("lifetime::killed_daemon", Needs::Ublk, 90, killed_daemon),
        case("lifetime::instances", Needs::Ublk, 60, instances),
        case("lifetime::many_devices", Needs::Ublk, 240, many_devices),
    ]
}

fn open(device: &str) -> Res<File> {
    OpenOptions::new().read(true).write(true).open(device).at(device)
}

fn error_of<T>(result: std::io::Result<T>) -> Res<i32> {
    match result {
        Ok(_) => fail!("succeeded unexpectedly"),
        Err(error) => Ok(error.raw_os_error().unwrap_or(0)),
    }
}

/// An open file is not detached, unless by force; then the image has all earlier writes.
fn detach_in_use(ctx: &Ctx) -> Res {
    let store = Store::ext4(ctx)?;
    let image = store.sparse("image", 8 * MIB)?;
    let mut daemon = Daemon::start(ctx)?;
    let device = daemon.attach(&[&image])?;
    let file = open(&device)?;
    let data = pattern(1, 4 << 20);
    for words in [&["detach", &device][..], &["detach", "--all"]] {
        let done = daemon.cli(words)?;
        ensure!(done.code == 4 && done.err.contains("in use"), "{words:?}: {done:?}");
    }
    file.write_all_at(b"still works", 5 * MIB).at("after a refused detach")?;
    file.write_all_at(&data, 0)?;
    daemon.ok(&["detach", &device, "--force"])?;
    ensure!(!std::path::Path::new(&device).exists(), "the name stayed");
    let mut byte = [0];
    let code = error_of(file.read_at(&mut byte, 0))?;
    ensure!(matches!(code, libc::ENODEV | libc::EIO), "reading a detached file: errno {code}");
    let written = file.write_at(b"x", 0).and_then(|_| file.sync_all());
    ensure!(written.is_err(), "a write to a detached file succeeded");
    drop(file);
    let mut expected = vec![0; 8 << 20];
    expected[..data.len()].copy_from_slice(&data);
    expected[5 << 20..(5 << 20) + 11].copy_from_slice(b"still works");
    same("image", &std::fs::read(&image)?, &expected)?;
    daemon.check_alive()?;
    // A file that has just been closed is not in use.
    for _ in 0..20 {
        let device = daemon.attach(&[&image])?;
        tools::ok(&["dd", "if=/dev/zero", &format!("of={device}"), "bs=1M", "count=2", "conv=notrunc"])?;
        daemon.detach(&device)?;
    }
    daemon.stop()
}

/// `list --all`, `find` and a refused detach name the programs that have a device open, and its
/// mounts.
fn users_are_named(ctx: &Ctx) -> Res {
    let store = Store::ext4(ctx)?;
    let image = store.sparse("image", 16 * MIB)?;
    let daemon = Daemon::start(ctx)?;
    let device = daemon.attach(&[&image])?;
    let refused = |says: &str| -> Res {
        let done = daemon.cli(&["detach", &image])?;
        ensure!(done.code == 4 && done.err.contains(says), "{says}: {done:?}");
        Ok(())
    };
    let mut program = Command::new("sleep").arg("1000").stdin(File::open(&device)?).spawn()?;
    let pid = program.id();
    let all = daemon.json(&["list", "--all"]);
    let refusal = refused(&format!("{device} is in use: open in pid {pid} (sleep)"));
    program.kill()?;
    program.wait()?;
    let (all, open) = (all?, serde_json::json!([{ "pid": pid, "command": "sleep" }]));
    ensure!(all["devices"][0]["openIn"] == open, "{all}");
    refusal?;

    mkfs("ext4", &device)?;
    let dir = ctx.path("a dir");
    let mount = Mount::new(&device, &dir, &["-o", "loop"])?;
    let found = daemon.json(&["find", &image])?;
    let refusal = refused(&format!("{device} is in use: mounted on {dir}"));
    mount.umount()?;
    ensure!(found["devices"][0]["mountedOn"] == serde_json::json!([dir]), "{found}");
    refusal?;

    let since = found["devices"][0]["device"]["sinceUnixSeconds"].as_u64();
    let now = std::time::SystemTime::UNIX_EPOCH.elapsed()?.as_secs();
    ensure!(since.is_some_and(|since| since <= now && now - since < 90), "{since:?} of {now}");
    let gone = tools::until(Duration::from_secs(10), || {
        daemon.cli(&["detach", &image]).ok().filter(|done| done.code == 0)
    });
    ensure!(gone.is_some_and(|done| done.out == format!("{device}\n")), "not detached by its image");
    let done = daemon.cli(&["find", &image])?;
    ensure!(done.code == 3 && done.err.contains("has no device"), "{done:?}");
    daemon.stop()
}

/// A forced detach while all tags are in use: the queue ends nevertheless.
fn forced_while_busy(ctx: &Ctx) -> Res {
    let store = Store::ext4(ctx)?;
    let image = store.allocated("image", 8 * MIB)?;
    let mut daemon = Daemon::start(ctx)?;
    for round in 0..3 {
        let device = daemon.attach(&[&image, "--depth", "1", "--queues", "1"])?;
        let mut load = std::process::Command::new("fio")
            .args([
                "--name=load",
                "--rw=randread",
                "--bs=4k",
                "--direct=1",
                "--ioengine=libaio",
                "--iodepth=16",
            ])
            .args(["--time_based", "--runtime=20", "--size=8M", &format!("--filename={device}")])
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .spawn()?;
        std::thread::sleep(std::time::Duration::from_millis(700));
        let detached = daemon.cli(&["detach", &device, "--force"]);
        let _ = load.kill();
        load.wait()?;
        let detached = detached?;
        ensure!(detached.code == 0, "round {round}: {detached:?}");
    }
    ensure!(daemon.ok(&["list", "--json"])?.contains("[]"), "a device is left");
    daemon.check_alive()?;
    daemon.stop()
}

/// A forced detach first writes back the file system on the file.
fn forced_below(ctx: &Ctx) -> Res {
    let store = Store::ext4(ctx)?;
    let image = store.sparse("image", 64 * MIB)?;
    let daemon = Daemon::start(ctx)?;
    let device = daemon.attach(&[&image])?;
    tools::ok(&["mkfs.ext4", "-q", "-F", &device])?;
    let dir = ctx.dir.join("mounted");
    std::fs::create_dir_all(&dir)?;
    let dir = dir.to_string_lossy().into_owned();
    tools::ok(&["mount", "-o", "loop", &device, &dir])?;
    let data = pattern(9, 1 << 20);
    let written = std::fs::write(format!("{dir}/file"), &data);
    let detached = daemon.cli(&["detach", &device, "--force"]);
    tools::ok(&["umount", "-l", &dir])?;
    written?;
    ensure!(detached?.code == 0, "the file was not detached");
    tools::ok(&["mount", "-o", "loop", &image, &dir])?;
    let found = std::fs::read(format!("{dir}/file"));
    tools::ok(&["umount", &dir])?;
    same("the file", &found?, &data)?;
    daemon.stop()
}

fn stale_file_fails(ctx: &Ctx) -> Res {
    let store = Store::ext4(ctx)?;
    let (first, second) = (store.sparse("first", MIB)?, store.sparse("second", MIB)?);
    let data = pattern(2, 1 << 20);
    disk::write_all(&second, &data)?;
    let daemon = Daemon::start(ctx)?;
    let device = daemon.attach(&[&first])?;
    let old = open(&device)?;
    old.write_all_at(&[1; 4096], 0)?;
    daemon.ok(&["detach", &device, "--force"])?;
    let again = daemon.attach(&[&second])?;
    ensure!(again == device, "{again} is not {device}");
    let mut block = vec![0; 4096];
    ensure!(old.read_at(&mut block, 0).is_err(), "the old file can be read");
    ensure!(old.write_at(&[3; 4096], 0).and_then(|_| old.sync_all()).is_err(), "the old file can be written");
    same("the new file", &std::fs::read(&device)?, &data)?;
    drop(old);
    // The close of the old file does not release the new one.
    let new = open(&device)?;
    let busy = daemon.cli(&["detach", &device])?;
    ensure!(busy.code == 4, "detached while open: {busy:?}");
    drop(new);
    daemon.detach(&device)?;
    same("the second image", &std::fs::read(&second)?, &data)?;
    daemon.stop()
}

/// Files end with their daemon; the next one cleans up and restores its instances.
fn killed_daemon(ctx: &Ctx) -> Res {
    let store = Store::ext4(ctx)?;
    let image = store.sparse("image", 8 * MIB)?;
    let mut daemon = Daemon::start(ctx)?;
    daemon.ok(&["instance", "create", "other", "--max", "3"])?;
    let device = daemon.attach(&[&image])?;
    let file = open(&device)?;
    file.write_all_at(&pattern(3, 1 << 20), 0)?;
    file.sync_all()?;
    daemon.kill()?;
    let mut byte = [0];
    let code = error_of(file.read_at(&mut byte, 4 * MIB))?;
    ensure!(matches!(code, libc::ENOTCONN | libc::ECONNABORTED | libc::EIO), "errno {code}");
    ensure!(error_of(File::open(&device))? == libc::ENOTCONN, "the name can still be opened");
    daemon.restart()?;
    ensure!(
        daemon.log().contains("was not recovered: FUSE files do not outlive the daemon"),
        "{}",
        daemon.log()
    );
    ensure!(daemon.json(&["list"])?.as_array().is_some_and(Vec::is_empty), "devices came back");
    let instances = daemon.json(&["instance", "list"])?;
    ensure!(instances.to_string().contains("\"other\""), "the instance is gone: {instances}");
    let again = daemon.attach(&[&image])?;
    same("durable data", &std::fs::read(&again)?[..1 << 20], &pattern(3, 1 << 20))?;
    // Only data in the page cache may still be read.
    ensure!(file.read_at(&mut byte, 4 * MIB).is_err(), "a file of the dead daemon can be read");
    daemon.detach(&again)?;
    drop(file);
    daemon.stop()
}

/// Same names in two instances; removing one, even in use, does not affect the other.
fn instances(ctx: &Ctx) -> Res {
    let store = Store::ext4(ctx)?;
    let mut daemon = Daemon::start(ctx)?;
    let mut devices = Vec::new();
    for (number, name) in ["red", "blue"].into_iter().enumerate() {
        daemon.ok(&["instance", "create", name, "--max", "2", "--workers", "1"])?;
        let image = store.sparse(name, MIB)?;
        disk::write_all(&image, &pattern(number as u64, 1 << 20))?;
        devices.push(daemon.attach(&["-i", name, &image])?);
    }
    for (number, device) in devices.iter().enumerate() {
        ensure!(device.ends_with("loop0"), "{device}");
        same(device, &std::fs::read(device)?, &pattern(number as u64, 1 << 20))?;
    }
    let before = daemon.footprint()?;
    let file = open(&devices[0])?;
    let refused = daemon.cli(&["instance", "remove", "red"])?;
    ensure!(refused.code == 4, "{refused:?}");
    daemon.ok(&["instance", "remove", "red", "--force"])?;
    ensure!(file.read_at(&mut [0], 0).is_err(), "a file of a removed instance can be read");
    let dir = std::path::Path::new(&devices[0]).parent().ok_or("no parent")?;
    ensure!(!dir.exists(), "the directory stayed");
    drop(file);
    same("blue", &disk::read_all(&devices[1], 0, MIB)?, &pattern(1, 1 << 20))?;
    ensure!(daemon.footprint()?.threads < before.threads, "threads of a removed instance are left");
    daemon.check_alive()?;
    daemon.ok(&["detach", "--all"])?;
    daemon.stop()
}

/// Dozens of files are attached and detached: threads and descriptors do not grow.
fn many_devices(ctx: &Ctx) -> Res {
    const COUNT: u64 = 64;
    let store = Store::ext4(ctx)?;
    let mut daemon = Daemon::start(ctx)?;
    let images: Vec<String> =
        (0..COUNT).map(|number| store.sparse(&format!("image{number}"), MIB)).collect::<Res<_>>()?;
    let idle = daemon.attach(&[&images[0]])?;
    daemon.detach(&idle)?;
    let before = daemon.footprint()?;
    for round in 0..3_u64 {
        let mut devices = Vec::new();
        for (number, image) in images.iter().enumerate() {
            let device = daemon.attach(&[image])?;
            open(&device)?.write_all_at(&pattern(round * COUNT + number as u64, 4096), 8192)?;
            devices.push(device);
        }
        ensure!(daemon.footprint()?.threads == before.threads, "threads grow with files");
        ensure!(daemon.ublk_ids().len() as u64 == COUNT, "not {COUNT} files: {:?}", daemon.ublk_ids());
        for (number, device) in devices.iter().enumerate() {
            let found = disk::Disk::open_read(device)?.read(8192, 4096)?;
            same(device, &found, &pattern(round * COUNT + number as u64, 4096))?;
        }
        match round {
            0 => drop(daemon.ok(&["detach", "--all"])?),
            _ => devices.iter().rev().try_for_each(|device| daemon.detach(device))?,
        }
        let after = daemon.footprint()?;
        ensure!(after == before, "round {round}: was {before:?}, is {after:?}");
    }
    daemon.check_alive()?;
    daemon.stop()
}
