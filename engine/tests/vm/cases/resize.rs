// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Images and devices are resized while they are in use.

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
        case("resize::refusals_name_the_reason", Needs::Ublk, 60, refused),
        case("resize::shrinking_needs_options", Needs::Resize, 120, shrinking_needs_options),
        case("resize::size_changes_image_and_device", Needs::Resize, 120, in_one_step),
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
    resized_with(daemon, device, bytes, &[])
}

fn resized_with(daemon: &Daemon, device: &str, bytes: u64, options: &[&str]) -> Res {
    daemon.ok(&[&["resize", device], options].concat())?;
    let (node, list) = (disk::size(device)?, daemon.info(device)?);
    ensure!(
        node == bytes && list["sizeBytes"] == bytes,
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
        resized_with(&daemon, &device, size, &["--shrink", "--force"])?;
    }
    ensure!(work.alive(), "fio ended before the device had shrunk");
    let disk = Disk::open(&device)?;
    let beyond = disk.try_write(32 * MIB, &[1; 4096]);
    ensure!(beyond.is_err(), "wrote past the new end");
    disk.write(20 * MIB, &[7; 512])?;
    drop(disk);
    work.finish(Duration::from_secs(60))?.clean()?;
    ensure!(disk::size(&image)? == 20 * MIB + 512, "the image has {} bytes", disk::size(&image)?);
    daemon.check_alive()?;
    daemon.detach(&device)?;
    daemon.stop()
}

/// A mounted file system grows with its device.
fn grow_mounted(ctx: &Ctx) -> Res {
    tools::needs_sys_resource()?;
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

/// On a kernel that cannot resize, the command fails, and the device works as before.
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

/// Expects that resize fails with this exit status and one line that has these words.
fn not_resized(daemon: &Daemon, words: &[&str], code: i32, says: &[&str]) -> Res {
    let done = daemon.cli(&[&["resize"], words].concat())?;
    let named = says.iter().all(|word| done.err.contains(word));
    ensure!(done.code == code && named && done.err.lines().count() == 1, "{says:?}: {done:?}");
    Ok(())
}

/// Shrinking a device needs --shrink, and --force if the device is in use.
fn shrinking_needs_options(ctx: &Ctx) -> Res {
    let store = Store::xfs(ctx)?;
    let image = store.sparse("image", 128 * MIB)?;
    let daemon = Daemon::start(ctx)?;
    let device = daemon.attach(&[&image])?;
    mkfs("ext4", &device)?;
    let mount = Mount::new(&device, &ctx.path("mnt"), &[])?;
    let sizes = ["134217728", "33554432", "--shrink"];
    not_resized(&daemon, &[&device, "--size", "32M"], 2, &sizes)?;
    not_resized(&daemon, &[&device, "--size", "32M", "--shrink"], 4, &[&mount.dir, "--force"])?;
    ensure!(
        disk::size(&device)? == 128 * MIB && disk::size(&image)? == 128 * MIB,
        "the device or the image was shrunk"
    );
    tools::sh(format!("head -c 60M /dev/urandom > {0}/file && sync -f {0}/file", mount.dir))?;
    mount.umount()?;
    fsck("ext4", &device)?;

    // Another program has truncated the file.
    set_size(&image, 32 * MIB)?;
    not_resized(&daemon, &[&device], 2, &sizes)?;
    ensure!(disk::size(&device)? == 128 * MIB, "the device was shrunk");
    resized_with(&daemon, &device, 32 * MIB, &["--shrink"])?;
    let holder = Disk::open(&device)?;
    not_resized(&daemon, &[&device, "--size", "16M", "--shrink"], 4, &["open", "--force"])?;
    resized_with(&daemon, &device, 16 * MIB, &["--size", "16M", "--shrink", "--force"])?;
    drop(holder);
    daemon.detach(&device)?;
    daemon.stop()
}

fn in_one_step(ctx: &Ctx) -> Res {
    let store = Store::xfs(ctx)?;
    let image = store.sparse("image", 32 * MIB)?;
    let daemon = Daemon::start(ctx)?;
    let device = daemon.attach(&[&image, "--offset", "1M"])?;
    let allocated = disk::allocated(&image)?;
    resized_with(&daemon, &device, 2 << 30, &["--size", "2G"])?;
    ensure!(disk::size(&image)? == (2 << 30) + MIB, "the image has {} bytes", disk::size(&image)?);
    ensure!(disk::allocated(&image)? < allocated + MIB, "the image is not sparse");
    let data = pattern(5, 4096);
    Disk::open(&device)?.write((2 << 30) - 4096, &data)?;
    same(&device, &Disk::open(&device)?.read((2 << 30) - 4096, 4096)?, &data)?;
    resized_with(&daemon, &device, 8 * MIB, &["--size", "8M", "--shrink"])?;
    ensure!(disk::size(&image)? == 9 * MIB, "the image has {} bytes", disk::size(&image)?);
    not_resized(&daemon, &[&device, "--size", "10000"], 2, &["10000", "512"])?;
    daemon.detach(&device)?;

    // With --size-limit, the rest of the image does not belong to the device.
    let device = daemon.attach(&[&image, "--offset", "1M", "--size-limit", "4M"])?;
    not_resized(&daemon, &[&device, "--size", "5M"], 2, &["--size-limit", "4194304"])?;
    not_resized(&daemon, &[&device, "--size", "2M", "--shrink"], 2, &["follow the device"])?;
    ensure!(disk::size(&image)? == 9 * MIB, "the image has {} bytes", disk::size(&image)?);
    daemon.detach(&device)?;
    let disk = crate::store::Disk::new(&crate::store::Shape::default())?;
    let device = daemon.attach(&[&disk.node()])?;
    not_resized(&daemon, &[&device, "--size", "64M", "--shrink"], 2, &["block device"])?;
    daemon.detach(&device)?;
    daemon.stop()
}
