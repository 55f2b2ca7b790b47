// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The image changes while no daemon runs: it is shared, shorter, moved, or on a file system that
//! is read-only or full.
//!
//! Changes to the daemon's own files are in `recovery_state`.

use std::time::Duration;

use super::MIB;
use crate::daemon::Daemon;
use crate::disk::{self, Disk, same};
use crate::harness::{Case, Ctx, Needs, Res, case, ensure, skip};
use crate::model::pattern;
use crate::store::{Mount, Store, fsck, mkfs};
use crate::tools::{self, Running};

pub(super) fn cases() -> Vec<Case> {
    let needs = Needs::Recovery("copy");
    vec![
        case("recovery_image::a_reflinked_image_keeps_its_blocks", needs, 150, reflinked),
        case("recovery_image::a_shorter_image_keeps_the_size", needs, 120, shorter_image),
        case("recovery_image::a_moved_image_is_recovered_on_request", needs, 150, moved_image),
        case("recovery_image::a_read_only_store_is_named", needs, 120, read_only_store),
        case("recovery_image::a_full_store_fails_writes", needs, 120, full_store),
        case("recovery_image::a_reached_quota_fails_writes", needs, 120, reached_quota),
    ]
}

/// Checks that a recovered device is unchanged, except for the field `except`.
fn unchanged(daemon: &Daemon, device: &str, before: &serde_json::Value, except: &str) -> Res {
    let mut after = daemon.info(device)?;
    if let Some(value) = before.get(except) {
        after[except] = value.clone();
    }
    ensure!(after == *before, "not the same device: {after}, was {before}");
    Ok(())
}

/// Writes and reads single sectors at unaligned offsets.
fn single_sectors(device: &str, image: &str, seed: u64) -> Res {
    let disk = Disk::open(device)?;
    for sector in [1, 7, 8, 4095] {
        let data = pattern(seed + sector, 512);
        disk.write(sector * 512, &data)?;
        same(device, &disk.read(sector * 512, 512)?, &data)?;
        disk.sync()?;
        let block = Disk::open_read(image)?.read(sector * 512 / 4096 * 4096, 4096)?;
        let at = (sector * 512 % 4096) as usize;
        same(image, &block[at..at + 512], &data)?;
    }
    Ok(())
}

/// `cp --reflink` raises the alignment that direct I/O needs to a block of the file system.
fn reflinked(ctx: &Ctx) -> Res {
    let store = Store::xfs(ctx)?;
    let image = store.allocated("image", 8 * MIB)?;
    let mut daemon = Daemon::start(ctx)?;
    let device = daemon.attach(&[&image])?;
    let before = daemon.info(&device)?;
    if before["blockSizeBytes"] != 512 {
        skip!("the store's direct I/O needs more than 512 bytes: {before}");
    }
    let all = pattern(3, 8 << 20);
    disk::write_all(&device, &all)?;
    tools::ok(&["cp", "--reflink=always", &image, &store.path("copy")])?;
    single_sectors(&device, &image, 10)?;
    let whole = disk::read_all(&device, 0, 8 * MIB)?;

    daemon.kill()?;
    daemon.restart()?;
    unchanged(&daemon, &device, &before, "buffered")?;
    // Linux 6.12 does not raise the alignment after a reflink; then nothing changes.
    let raised = direct_alignment(&image)? > 512;
    let info = daemon.info(&device)?;
    ensure!(info["buffered"] == raised, "alignment raised: {raised}; list says {info}");
    let log = daemon.log();
    let warned =
        |line: &str| line.contains("WARN") && line.contains("default/loop0") && line.contains(&image);
    ensure!(log.lines().any(warned) == raised, "alignment raised: {raised}; log: {log}");
    same(&device, &disk::read_all(&device, 0, 8 * MIB)?, &whole)?;
    single_sectors(&device, &image, 20)?;
    same("copy", &disk::read_all(&store.path("copy"), 0, 8 * MIB)?, &all)?;

    // A copy without shared blocks replaces the image. It is another file, which needs `recover`;
    // direct I/O works again.
    daemon.kill()?;
    tools::sh(format!("cp --reflink=never {image} {0} && mv {0} {image}", store.path("unshared")))?;
    daemon.restart()?;
    let info = daemon.info(&device)?;
    let reason = info["reason"].as_str().unwrap_or_default();
    ensure!(info["state"] == "stuck" && reason.contains("not the file"), "list says {info}");
    daemon.ok(&["recover", &device, "--image", &image])?;
    unchanged(&daemon, &device, &before, "imageInode")?;
    single_sectors(&device, &image, 30)?;
    daemon.detach(&device)?;
    daemon.stop()
}

/// The alignment of offsets that direct I/O on a file needs, as the kernel reports it.
fn direct_alignment(path: &str) -> Res<u32> {
    let (flags, mask) = (rustix::fs::AtFlags::empty(), rustix::fs::StatxFlags::DIOALIGN);
    Ok(rustix::fs::statx(rustix::fs::CWD, path, flags, mask)?.stx_dio_offset_align)
}

fn shorter_image(ctx: &Ctx) -> Res {
    let store = Store::xfs(ctx)?;
    let image = store.allocated("image", 8 * MIB)?;
    let mut daemon = Daemon::start(ctx)?;
    let device = daemon.attach(&[&image])?;
    let before = daemon.info(&device)?;
    let data = pattern(4, 4096);
    Disk::open(&device)?.write(MIB, &data)?;
    for size in [4 * MIB, 0] {
        daemon.kill()?;
        std::fs::File::options().write(true).open(&image)?.set_len(size)?;
        daemon.restart()?;
        unchanged(&daemon, &device, &before, "none")?;
        let disk = Disk::open(&device)?;
        ensure!(disk::size(&device)? == 8 * MIB, "the device has {} bytes", disk::size(&device)?);
        ensure!(disk.try_read(6 * MIB, 4096).is_err(), "a read past the end of the image succeeded");
        if size > 0 {
            same(&device, &disk.read(MIB, 4096)?, &data)?;
        }
    }
    let info = daemon.info(&device)?;
    let says = info["reason"].as_str().unwrap_or_default();
    ensure!(info["state"] == "degraded" && says.contains("shorter"), "list says {info}");
    daemon.detach(&device)?;
    daemon.stop()
}

/// The image is renamed and replaced: users wait until the administrator recovers the device.
fn moved_image(ctx: &Ctx) -> Res {
    let store = Store::xfs(ctx)?;
    let image = store.sparse("image", 64 * MIB)?;
    let mut daemon = Daemon::start(ctx)?;
    let device = daemon.attach(&[&image])?;
    let before = daemon.info(&device)?;
    mkfs("ext4", &device)?;
    let mount = Mount::new(&device, &ctx.path("mnt"), &[])?;
    tools::sh(format!("head -c 100000 /dev/urandom > {0}/file && sync -f {0}/file", mount.dir))?;
    daemon.kill()?;
    let (elsewhere, small) = (store.path("elsewhere"), store.sparse("small", MIB)?);
    std::fs::rename(&image, &elsewhere)?;
    store.sparse("image", 64 * MIB)?;
    daemon.restart()?;

    let info = daemon.info(&device)?;
    let reason = info["reason"].as_str().unwrap_or_default();
    ensure!(info["state"] == "stuck" && reason.contains(&image), "list says {info}");
    ensure!(reason.contains("recover"), "no next step: {reason}");
    let log = daemon.log();
    ensure!(log.lines().any(|l| l.contains("ERROR") && l.contains("default/loop0")), "no error: {log}");
    let mut command = std::process::Command::new("sh");
    command.args(["-c", &format!("head -c 100000 /dev/zero > {0}/more && sync -f {0}/more", mount.dir)]);
    let mut waiting = Running::start(command)?;
    std::thread::sleep(Duration::from_millis(500));
    ensure!(waiting.alive(), "a user of the device did not wait");

    let refused = daemon.cli(&["recover", &device, "--image", &small])?;
    let both = refused.err.contains("1048576") && refused.err.contains("67108864");
    ensure!(refused.code == 2 && both, "too small an image: {refused:?}");
    ensure!(daemon.info(&device)?["state"] == "stuck", "list says {}", daemon.info(&device)?);
    let out = daemon.ok(&["recover", &device, "--image", &elsewhere])?;
    ensure!(out == format!("{device}\n"), "recover printed {out:?}");
    waiting.finish(Duration::from_secs(60))?.ok()?;
    unchanged(&daemon, &device, &before, "image")?;
    ensure!(daemon.info(&device)?["image"] == elsewhere, "list says {}", daemon.info(&device)?);
    let twice = daemon.cli(&["recover", &device, "--image", &elsewhere])?;
    ensure!(twice.code == 4, "recovered twice: {twice:?}");

    // The daemon has recorded the new path.
    daemon.kill()?;
    daemon.restart()?;
    ensure!(daemon.info(&device)?["state"] == "live", "list says {}", daemon.info(&device)?);
    mount.umount()?;
    fsck("ext4", &device)?;
    daemon.detach(&device)?;
    daemon.stop()
}

fn read_only_store(ctx: &Ctx) -> Res {
    let store = Store::xfs(ctx)?;
    let image = store.sparse("image", 8 * MIB)?;
    let mut daemon = Daemon::start(ctx)?;
    let device = daemon.attach(&[&image])?;
    let before = daemon.info(&device)?;
    daemon.kill()?;
    tools::ok(&["mount", "-o", "remount,ro", &ctx.path("store")])?;
    daemon.restart()?;
    let info = daemon.info(&device)?;
    let reason = info["reason"].as_str().unwrap_or_default();
    ensure!(info["state"] == "stuck" && reason.to_lowercase().contains("read-only file system"), "{info}");
    tools::ok(&["mount", "-o", "remount,rw", &ctx.path("store")])?;
    daemon.ok(&["recover", &device, "--image", &image])?;
    unchanged(&daemon, &device, &before, "none")?;
    Disk::open(&device)?.write(MIB, &[5; 4096])?;
    daemon.detach(&device)?;
    daemon.stop()
}

/// The file system is full: each write fails, and none hangs.
fn full_store(ctx: &Ctx) -> Res {
    let store = Store::xfs(ctx)?;
    let image = store.sparse("image", 64 * MIB)?;
    let mut daemon = Daemon::start(ctx)?;
    let device = daemon.attach(&[&image])?;
    Disk::open(&device)?.write(0, &[6; 4096])?;
    daemon.kill()?;
    // Fails once the file system is full, as intended.
    let _ = tools::run(&[
        "dd",
        "if=/dev/zero",
        &format!("of={}", store.path("filler")),
        "bs=1M",
        "oflag=direct",
    ])?;
    let _ =
        tools::run(&["dd", "if=/dev/zero", &format!("of={}", store.path("more")), "bs=4k", "conv=fsync"])?;
    daemon.restart()?;
    ensure!(daemon.info(&device)?["state"] == "live", "list says {}", daemon.info(&device)?);
    let disk = Disk::open(&device)?;
    same(&device, &disk.read(0, 4096)?, &[6; 4096])?;
    let failed = disk.try_write(32 * MIB, &vec![7; 1 << 20]);
    ensure!(failed.is_err(), "a write succeeded on a full file system");
    drop(disk);
    daemon.detach(&device)?;
    daemon.stop()
}

/// The owner of the image has reached the quota: the same, and the log names the reason. (XFS
/// charges the owner, and not the writer.)
fn reached_quota(ctx: &Ctx) -> Res {
    let store = Store::xfs(ctx)?;
    let image = store.sparse("image", 64 * MIB)?;
    let dir = ctx.path("store");
    tools::sh(format!(
        "chown 1000 {image}; node=$(findmnt -no SOURCE {dir}); umount {dir}; mount -o uquota $node {dir}
         xfs_quota -x -c 'limit bhard=4m 1000' {dir}"
    ))?;
    let mut daemon = Daemon::start(ctx)?;
    let device = daemon.attach(&[&image])?;
    Disk::open(&device)?.write(0, &[6; 4096])?;
    daemon.kill()?;
    daemon.restart()?;
    ensure!(daemon.info(&device)?["state"] == "live", "list says {}", daemon.info(&device)?);
    let disk = Disk::open(&device)?;
    same(&device, &disk.read(0, 4096)?, &[6; 4096])?;
    let failed = (8..16).map(|at| disk.try_write(at * MIB, &vec![7; 1 << 20])).find(Result::is_err);
    ensure!(failed.is_some(), "a write succeeded beyond the quota");
    let said = format!("failed on {image}: Disk quota exceeded");
    super::claims::warned(&daemon, &said, 1)?;
    same(&device, &disk.read(0, 4096)?, &[6; 4096])?;
    drop(disk);
    daemon.detach(&device)?;
    daemon.stop()
}
