//! The image grows or shrinks on purpose, and the device follows, while it is in use.

use std::time::Duration;

use super::MIB;
use crate::daemon::Daemon;
use crate::disk::{self, Disk, same};
use crate::fio::{self, Fio};
use crate::harness::{Case, Ctx, Needs, Res, case, ensure, skip};
use crate::model::pattern;
use crate::store::{Mount, Store, fsck, mkfs};
use crate::tools;

pub(super) fn cases() -> Vec<Case> {
    vec![
        case("resize::grow_under_io", Needs::Resize, 120, grow),
        case("resize::shrink_under_io", Needs::Resize, 120, shrink),
        case("resize::grow_mounted_file_system", Needs::Resize, 120, grow_mounted),
        case("resize::refused_in_words", Needs::Ublk, 60, refused),
    ]
}

/// Verified writes to the first 16 MiB for some seconds.
fn load(ctx: &Ctx, device: &str) -> Res<Fio> {
    let jobs = format!(
        "[load]
filename={device}
ioengine=io_uring
direct=1
verify=crc32c
verify_fatal=1
rw=randwrite
bssplit=512/20:4k/60:64k/20
iodepth=16
size=16m
rate=,1500k
"
    );
    fio::start(ctx, &jobs)
}

fn set_size(image: &str, bytes: u64) -> Res {
    std::fs::File::options().write(true).open(image)?.set_len(bytes)?;
    Ok(())
}

fn resized(daemon: &Daemon, device: &str, bytes: u64) -> Res {
    daemon.ok(&["resize", device])?;
    let (node, list) = (disk::size(device)?, daemon.info(device)?);
    ensure!(
        node == bytes && list["size"] == bytes,
        "wanted {bytes} bytes, the node has {node}, list says {list}"
    );
    Ok(())
}

fn grow(ctx: &Ctx) -> Res {
    let store = Store::xfs(ctx)?;
    let image = store.sparse("image", 32 * MIB)?;
    let daemon = Daemon::start(ctx)?;
    let device = daemon.attach(&[&image])?;
    let mut work = load(ctx, &device)?;
    std::thread::sleep(Duration::from_secs(1));
    for size in [33 * MIB + 512, 48 * MIB, 64 * MIB] {
        set_size(&image, size)?;
        resized(&daemon, &device, size)?;
    }
    ensure!(work.alive(), "fio ended before the device had grown");
    let data = pattern(9, 1 << 20);
    let disk = Disk::open(&device)?;
    disk.write(63 * MIB, &data)?;
    same("the new end", &disk.read(63 * MIB, 1 << 20)?, &data)?;
    drop(disk);
    work.finish(Duration::from_secs(60))?.clean()?;
    daemon.detach(&device)?;
    let found = Disk::open_read(&image)?.read(63 * MIB, 1 << 20)?;
    same("image", &found, &data)?;
    daemon.stop()
}

fn shrink(ctx: &Ctx) -> Res {
    let store = Store::xfs(ctx)?;
    let image = store.sparse("image", 64 * MIB)?;
    let mut daemon = Daemon::start(ctx)?;
    let device = daemon.attach(&[&image])?;
    let mut work = load(ctx, &device)?;
    std::thread::sleep(Duration::from_secs(1));
    for size in [48 * MIB, 20 * MIB + 512] {
        set_size(&image, size)?;
        resized(&daemon, &device, size)?;
    }
    ensure!(work.alive(), "fio ended before the device had shrunk");
    let disk = Disk::open(&device)?;
    let beyond = disk.try_write(32 * MIB, &[1; 4096]);
    ensure!(beyond.is_err(), "a write behind the new end was taken");
    disk.write(20 * MIB, &[7; 512])?;
    drop(disk);
    work.finish(Duration::from_secs(60))?.clean()?;
    ensure!(disk::size(&image)? == 20 * MIB + 512, "the image has {} bytes", disk::size(&image)?);
    daemon.check_alive()?;
    daemon.detach(&device)?;
    daemon.stop()
}

/// What it is for: a mounted file system gets more room.
fn grow_mounted(ctx: &Ctx) -> Res {
    let store = Store::xfs(ctx)?;
    let image = store.sparse("image", 32 * MIB)?;
    let daemon = Daemon::start(ctx)?;
    let device = daemon.attach(&[&image])?;
    mkfs("ext4", &device)?;
    let mount = Mount::new(&device, &ctx.path("mnt"), &[])?;
    set_size(&image, 96 * MIB)?;
    resized(&daemon, &device, 96 * MIB)?;
    tools::ok(&["resize2fs", &device])?;
    tools::sh(format!("head -c 60M /dev/urandom > {0}/file && sync -f {0}/file", mount.dir))?;
    mount.umount()?;
    fsck("ext4", &device)?;
    daemon.detach(&device)?;
    daemon.stop()
}

/// A kernel that cannot resize: said so, and the device goes on as it was.
fn refused(ctx: &Ctx) -> Res {
    if ctx.host.resize {
        skip!("this kernel resizes ublk devices");
    }
    let store = Store::xfs(ctx)?;
    let image = store.sparse("image", 8 * MIB)?;
    let mut daemon = Daemon::start(ctx)?;
    let device = daemon.attach(&[&image])?;
    set_size(&image, 16 * MIB)?;
    let done = daemon.cli(&["resize", &device])?;
    ensure!(done.code == 7 && done.err.lines().count() == 1, "resize: {done:?}");
    ensure!(disk::size(&device)? == 8 * MIB, "the device changed");
    Disk::open(&device)?.write(7 * MIB, &[1; 4096])?;
    daemon.check_alive()?;
    daemon.detach(&device)?;
    daemon.stop()
}
