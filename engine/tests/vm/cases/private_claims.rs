// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Images that pools share with others: a reader excludes nobody, and a writer is named.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;

use super::MIB;
use super::claims::{refused, warned, warnings};
use super::private_script::Inside;
use crate::daemon::Daemon;
use crate::disk::Disk;
use crate::harness::{Case, Ctx, Needs, Res, case, ensure};
use crate::store::{self, Mount, Shape, Store, mkfs};

pub(super) fn cases() -> Vec<Case> {
    vec![
        case("private_claims::readers_exclude_nobody", Needs::Private, 120, readers_exclude_nobody),
        case("private_claims::writers_are_named", Needs::Private, 150, writers_are_named),
        case("private_claims::pools_share_with_a_warning", Needs::Private, 150, pools_share_with_a_warning),
        case("private_claims::recovery_ignores_pools", Needs::Private, 150, recovers_shared_images),
    ]
}

fn open_to_all(ctx: &Ctx) -> Res {
    Ok(std::fs::set_permissions(&ctx.dir, Permissions::from_mode(0o1777))?)
}

fn readers_exclude_nobody(ctx: &Ctx) -> Res {
    open_to_all(ctx)?;
    let store = Store::xfs(ctx)?;
    let daemon = Daemon::start(ctx)?;
    let image = store.sparse("image", MIB)?;
    let script = Inside::new(ctx, &daemon)
        .user(1000)
        .start(&format!("works bind losetup -r /dev/loop2 {image}; pause bound; head_of /dev/loop2"))?
        .wait("bound")?;
    let device = daemon.attach(&[&image])?;
    Disk::open(&device)?.write(0, &b"written by root ".repeat(32))?;
    let shared = daemon.info(&device)?["sharedWith"].to_string();
    ensure!(shared.contains("loop2 of pool ") && shared.contains(" of user 1000 (read-only)"), "{shared}");
    ensure!(warnings(&daemon, "shares") == 0, "{}", daemon.log());
    script.resume("bound")?;
    let read = script.finish()?;
    ensure!(read.starts_with("written by root"), "the reader read {read:?}");
    daemon.detach(&device)?;
    daemon.stop()
}

fn writers_are_named(ctx: &Ctx) -> Res {
    open_to_all(ctx)?;
    let store = Store::xfs(ctx)?;
    let daemon = Daemon::start(ctx)?;
    let image = store.sparse("image", MIB)?;
    std::fs::set_permissions(&image, Permissions::from_mode(0o666))?;
    let script = Inside::new(ctx, &daemon)
        .user(1000)
        .start(&format!("works bind losetup /dev/loop2 {image}; pause bound"))?
        .wait("bound")?;
    refused(&daemon, &[&image], "is loop2 of private pool 1000.1 (user ")?;
    refused(&daemon, &[&image], "'loopengine losetup --pool 1000.1 --detach loop2'")?;
    let device = daemon.attach(&["--read-only", &image])?;
    warned(&daemon, "default/loop0 (read-only) shares ", 1)?;
    daemon.detach(&device)?;
    let device = daemon.attach(&["--force", &image])?;
    warned(&daemon, "default/loop0 (read-write) shares ", 1)?;
    script.resume("bound")?;
    script.finish()?;
    // A pool that binds after the attach is admitted, with a warning.
    let other = Inside::new(ctx, &daemon).user(1000);
    other.run(&format!("works bind losetup /dev/loop1 {image}"))?;
    warned(&daemon, " with default/loop0 (read-write)", 1)?;
    daemon.detach(&device)?;
    daemon.stop()
}

fn pools_share_with_a_warning(ctx: &Ctx) -> Res {
    let store = Store::xfs(ctx)?;
    let daemon = Daemon::start(ctx)?;
    let image = store.sparse("image", 32 * MIB)?;
    mkfs("ext4", &image)?;
    let held = format!("works bind losetup /dev/loop2 {image}; pause bound");
    let script = Inside::new(ctx, &daemon).start(&held)?.wait("bound")?;
    // No warning for two bindings in one pool; for another pool, one warning per minute and image.
    Inside::new(ctx, &daemon)
        .run(&format!("works bind losetup /dev/loop3 {image}; works again losetup -r /dev/loop4 {image}"))?;
    warned(&daemon, &format!("shares {image} with loop2 of pool "), 1)?;
    warned(&daemon, "shares", 1)?;
    script.resume("bound")?;
    script.finish()?;
    // A block device that is mounted.
    let disk = store::Disk::new(&Shape::default())?;
    mkfs("ext4", &disk.node())?;
    let mount = Mount::new(&disk.node(), &ctx.path("mnt"), &[])?;
    Inside::new(ctx, &daemon).run(&format!("works bind losetup -f {}; sleep 1", disk.node()))?;
    warned(&daemon, &format!("shares {} with the mount on ", disk.node()), 1)?;
    mount.umount()?;
    daemon.stop()
}

/// The next daemon recovers a device whose image is also bound in a pool.
fn recovers_shared_images(ctx: &Ctx) -> Res {
    let store = Store::xfs(ctx)?;
    let mut daemon = Daemon::start(ctx)?;
    let image = store.sparse("image", MIB)?;
    let script = Inside::new(ctx, &daemon)
        .start(&format!("works bind losetup /dev/loop2 {image}; pause bound"))?
        .wait("bound")?;
    let device = daemon.attach(&["--force", &image])?;
    let second = daemon.attach(&["--force", &image])?;
    daemon.kill()?;
    daemon.restart()?;
    for device in [&device, &second] {
        Disk::open(device)?.write(0, &[1; 4096])?;
        daemon.detach(device)?;
    }
    script.kill();
    // A claimed block device is recovered after a restart.
    let disk = store::Disk::new(&Shape::default())?;
    let device = daemon.attach(&[&disk.node()])?;
    daemon.kill()?;
    daemon.restart()?;
    Disk::open(&device)?.write(0, &[1; 4096])?;
    let busy = crate::tools::run(&["mount", &disk.node(), &ctx.path("mnt")])?;
    ensure!(busy.code != 0, "mounted although it is attached");
    ensure!(warnings(&daemon, "with O_EXCL") == 0, "{}", daemon.log());
    daemon.detach(&device)?;
    daemon.stop()
}
