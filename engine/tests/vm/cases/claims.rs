// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Images in use elsewhere: attach refuses them or warns. I/O errors are logged.

use std::fs::{File, OpenOptions};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::Duration;

use loopengine::sys::range_lock;

use super::MIB;
use crate::daemon::Daemon;
use crate::disk::Disk;
use crate::harness::{Case, Ctx, Needs, Res, case, ensure, fail, skip};
use crate::store::{self, Mount, Shape, Store, mkfs};
use crate::tools;

pub(super) fn cases() -> Vec<Case> {
    vec![
        case("claims::mounted_block_device", Needs::Ublk, 120, mounted),
        case("claims::partitions_and_their_disk", Needs::Ublk, 120, partitions),
        case("claims::swap_and_other_programs", Needs::Ublk, 90, swap),
        case("claims::device_mapper", Needs::Ublk, 90, mapped),
        case("claims::image_of_a_kernel_loop_device", Needs::Ublk, 120, kernel_loop),
        case("claims::locked", Needs::Ublk, 60, locked),
        case("claims::force_shares_between_devices", Needs::Ublk, 90, force_shares_an_image),
        case("claims::failing_io_is_logged", Needs::Ublk, 120, failing_io_is_logged),
    ]
}

/// Expects that attach refuses, in one line with the user of the image and the next step.
pub(super) fn refused(daemon: &Daemon, words: &[&str], says: &str) -> Res {
    let done = daemon.cli(&[&["attach"], words].concat())?;
    ensure!(done.code == 4, "attach {words:?}: exit status {}: {}{}", done.code, done.out, done.err);
    let lines = done.err.trim_end().lines().count();
    ensure!(
        lines == 1 && done.err.contains(says) && done.err.contains("--force"),
        "'{says}' is not in: {}",
        done.err
    );
    Ok(())
}

/// Number of warnings in the log that contain `part`.
pub(super) fn warnings(daemon: &Daemon, part: &str) -> usize {
    daemon.log().lines().filter(|line| line.contains("WARN") && line.contains(part)).count()
}

/// Waits for exactly `count` warnings that contain `part`.
pub(super) fn warned(daemon: &Daemon, part: &str, count: usize) -> Res {
    let found =
        tools::until(Duration::from_secs(10), || (warnings(daemon, part) >= count).then_some(())).is_some();
    ensure!(
        found && warnings(daemon, part) == count,
        "{} warnings with '{part}', expected {count}: {}",
        warnings(daemon, part),
        daemon.log()
    );
    Ok(())
}

/// A program that locks an image, as QEMU does, is named.
fn locked(ctx: &Ctx) -> Res {
    let store = Store::ext4(ctx)?;
    let image = store.sparse("image", 8 * MIB)?;
    let daemon = Daemon::start(ctx)?;
    let lock = |start, write| -> Res<File> {
        let file = OpenOptions::new().read(true).write(true).open(&image)?;
        ensure!(range_lock::try_lock(file.as_fd(), start, 1, write)?, "cannot lock {image}");
        Ok(file)
    };
    let who = format!("pid {} (", std::process::id());
    for (start, write, shares) in [(0, true, true), (101, false, true), (201, false, false)] {
        let before = warnings(&daemon, &who);
        let file = lock(start, write)?;
        refused(&daemon, &[&image], &format!("{image} is in use by {who}"))?;
        let device = daemon.attach(&["--read-only", &image])?;
        warned(&daemon, &who, before + usize::from(shares))?;
        daemon.detach(&device)?;
        drop(file);
    }
    // Scripts hold a lock of flock(2) around an attach.
    let file = File::open(&image)?;
    rustix::fs::flock(&file, rustix::fs::FlockOperation::LockExclusive)?;
    let device = daemon.attach(&[&image])?;
    daemon.detach(&device)?;
    daemon.stop()
}

fn claim(node: &str) -> std::io::Result<File> {
    OpenOptions::new().read(true).custom_flags(libc::O_EXCL).open(node)
}

fn mounted(ctx: &Ctx) -> Res {
    let disk = store::Disk::new(&Shape::default())?;
    let node = disk.node();
    mkfs("ext4", &node)?;
    let daemon = Daemon::start(ctx)?;
    let mount = Mount::new(&node, &ctx.path("in use"), &[])?;
    // Under another name, too.
    let other = ctx.path("node");
    std::os::unix::fs::symlink(&node, &other)?;
    for name in [&node, &other] {
        refused(&daemon, &[name], r"in use by the mount on ")?;
        refused(&daemon, &[name], r"/in\040use")?;
    }
    ensure!(warnings(&daemon, "shares") == 0, "{}", daemon.log());
    let device = daemon.attach(&["--read-only", &node])?;
    warned(&daemon, &format!("shares {node} with the mount on"), 1)?;
    daemon.detach(&device)?;
    let device = daemon.attach(&["--force", &node])?;
    warned(&daemon, &format!("shares {node} with the mount on"), 2)?;
    daemon.detach(&device)?;
    mount.umount()?;

    // An attached block device is claimed: nobody else can mount or claim it.
    let device = daemon.attach(&[&node])?;
    let busy = tools::run(&["mount", &node, &ctx.path("in use")])?;
    ensure!(busy.code != 0, "mounted although it is attached");
    ensure!(claim(&node).is_err_and(|error| error.raw_os_error() == Some(libc::EBUSY)), "not claimed");
    Disk::open(&device)?.write(0, &[1; 4096])?;
    daemon.detach(&device)?;
    ensure!(claim(&node).is_ok(), "still claimed");
    // A read-only device excludes nobody, and a read-only mount does not conflict with a reader.
    mkfs("ext4", &node)?;
    let device = daemon.attach(&["--read-only", &node])?;
    let mount = Mount::new(&node, &ctx.path("in use"), &["-o", "ro"])?;
    daemon.detach(&device)?;
    let device = daemon.attach(&["--read-only", &node])?;
    ensure!(warnings(&daemon, "shares") == 2, "{}", daemon.log());
    daemon.detach(&device)?;
    refused(&daemon, &[&node], "in use by the mount on ")?;
    mount.umount()?;
    drop(disk);
    daemon.stop()
}

fn partitions(ctx: &Ctx) -> Res {
    let disk = store::Disk::new(&Shape::default())?;
    let node = disk.node();
    let part = format!("{node}p1");
    let name = part.trim_start_matches("/dev/").to_owned();
    // BLKPG adds a partition without a partition table.
    tools::ok(&["addpart", &node, "1", "2048", "262144"])?;
    let there = tools::until(Duration::from_secs(5), || Path::new(&part).exists().then_some(()));
    if there.is_none() {
        skip!("no node for the partition {part}");
    }
    mkfs("ext4", &part)?;
    let daemon = Daemon::start(ctx)?;
    let mount = Mount::new(&part, &ctx.path("mnt"), &[])?;
    refused(&daemon, &[&part], "in use by the mount on ")?;
    refused(&daemon, &[&node], &format!("/mnt of its partition {name}"))?;
    mount.umount()?;
    let device = daemon.attach(&[&part])?;
    refused(&daemon, &[&node], "attached already, as default/loop0 (read-write)")?;
    let whole = daemon.attach(&["--force", &node])?;
    warned(&daemon, "with default/loop0 (read-write)", 1)?;
    daemon.detach(&whole)?;
    daemon.detach(&device)?;
    let device = daemon.attach(&[&node])?;
    refused(&daemon, &[&part], "attached already, as default/loop0 (read-write)")?;
    daemon.detach(&device)?;
    tools::ok(&["delpart", &node, "1"])?;
    daemon.stop()
}

fn swap(ctx: &Ctx) -> Res {
    let disk = store::Disk::new(&Shape::default())?;
    let node = disk.node();
    let daemon = Daemon::start(ctx)?;
    let held = claim(&node)?;
    refused(&daemon, &[&node], &format!("in use by pid {} (", std::process::id()))?;
    drop(held);
    tools::ok(&["mkswap", &node])?;
    if tools::run(&["swapon", &node])?.code != 0 {
        skip!("no swap here");
    }
    let found = refused(&daemon, &[&node], "in use by swap");
    tools::ok(&["swapoff", &node])?;
    found?;
    let store = Store::ext4(ctx)?;
    let image = store.allocated("swap", 8 * MIB)?;
    std::fs::set_permissions(&image, std::os::unix::fs::PermissionsExt::from_mode(0o600))?;
    tools::ok(&["mkswap", &image])?;
    tools::ok(&["swapon", &image])?;
    let found = refused(&daemon, &[&image], "in use by swap");
    tools::ok(&["swapoff", &image])?;
    found?;
    let device = daemon.attach(&[&image])?;
    daemon.detach(&device)?;
    daemon.stop()
}

fn mapped(ctx: &Ctx) -> Res {
    let disk = store::Disk::new(&Shape::default())?;
    let node = disk.node();
    let table = format!("0 2048 linear {node} 0");
    let name = format!("lecase{}", std::process::id());
    if !tools::run(&["dmsetup", "create", &name, "--table", &table]).is_ok_and(|done| done.code == 0) {
        skip!("no device mapper here");
    }
    let found = Daemon::start(ctx).and_then(|daemon| {
        refused(&daemon, &[&node], &format!("(/dev/mapper/{name})"))?;
        daemon.stop()
    });
    tools::ok(&["dmsetup", "remove", "--retry", &name])?;
    found
}

fn kernel_loop(ctx: &Ctx) -> Res {
    let loaded = Path::new("/sys/module/loop").exists();
    if !loaded && tools::run(&["modprobe", "loop", "max_loop=0"])?.code != 0 {
        skip!("this kernel has no loop module");
    }
    let outcome = over_kernel_loop(ctx);
    if !loaded {
        tools::sh("for i in {1..50}; do modprobe -r loop 2>/dev/null && exit; sleep 0.1; done; exit 1")?;
    }
    outcome
}

fn over_kernel_loop(ctx: &Ctx) -> Res {
    let store = Store::xfs(ctx)?;
    let daemon = Daemon::start(ctx)?;
    let image = store.sparse("image", 32 * MIB)?;
    let hard = store.path("hard");
    std::fs::hard_link(&image, &hard)?;
    mkfs("ext4", &image)?;
    let node = tools::ok(&["losetup", "--find", "--show", &image])?.trim().to_owned();
    let tried = (|| {
        let mount = Mount::new(&node, &ctx.path("mnt"), &[])?;
        for name in [&image, &hard] {
            refused(&daemon, &[name], &format!("in use by {node}, the mount on "))?;
        }
        let device = daemon.attach(&["--read-only", &image])?;
        warned(&daemon, &format!("shares {image} with {node}, the mount on"), 1)?;
        daemon.detach(&device)?;
        let device = daemon.attach(&["--force", &image])?;
        warned(&daemon, &format!("shares {image} with {node}, the mount on"), 2)?;
        daemon.detach(&device)?;
        mount.umount()
    })();
    tools::ok(&["losetup", "--detach", &node])?;
    tried?;
    let node = tools::ok(&["losetup", "--find", "--show", "--read-only", &image])?.trim().to_owned();
    let tried = (|| {
        let device = daemon.attach(&["--read-only", &image])?;
        ensure!(warnings(&daemon, "shares") == 2, "a warning about two readers: {}", daemon.log());
        daemon.detach(&device)?;
        refused(&daemon, &[&image], &format!("in use by {node}"))
    })();
    tools::ok(&["losetup", "--detach", &node])?;
    tried?;
    below_kernel_loop(&daemon, &image)?;
    let device = daemon.attach(&[&image])?;
    daemon.detach(&device)?;
    daemon.stop()
}

/// A loop device of the host is bound to an image that is attached.
fn below_kernel_loop(daemon: &Daemon, image: &str) -> Res {
    let device = daemon.attach(&[image])?;
    let node = tools::ok(&["losetup", "--find", "--show", image])?.trim().to_owned();
    let tried = (|| {
        let why = format!("the file under {node} is attached already, as default/loop");
        refused(daemon, &[&node], &why)?;
        refused(daemon, &["--read-only", &node], &why)?;
        let forced = daemon.attach(&["--force", &node])?;
        warned(daemon, &format!("shares {node} with default/loop"), 1)?;
        daemon.detach(&forced)
    })();
    tools::ok(&["losetup", "--detach", &node])?;
    tried?;
    daemon.detach(&device)
}

fn force_shares_an_image(ctx: &Ctx) -> Res {
    let store = Store::xfs(ctx)?;
    let daemon = Daemon::start(ctx)?;
    let image = store.sparse("image", MIB)?;
    let first = daemon.attach(&[&image])?;
    refused(&daemon, &[&image], "attached already, as default/loop0 (read-write)")?;
    refused(&daemon, &["--read-only", &image], "attached already, as default/loop0 (read-write)")?;
    let second = daemon.attach(&["--force", &image])?;
    warned(&daemon, "default/loop1 (read-write) shares", 1)?;
    let shared = daemon.info(&first)?["sharedWith"].clone();
    ensure!(shared == serde_json::json!(["default/loop1 (read-write)"]), "{shared}");
    ensure!(
        daemon.ok(&["list"])?.contains("default/loop1 (read-write)"),
        "list does not name the other device"
    );
    daemon.detach(&first)?;
    ensure!(!daemon.ok(&["list"])?.contains("SHARED"), "list still shows a shared image");
    daemon.detach(&second)?;
    let device = daemon.attach(&[&image])?;
    daemon.detach(&device)?;
    daemon.stop()
}

/// The first error of a kind is logged at once; repeats are rate-limited.
fn failing_io_is_logged(ctx: &Ctx) -> Res {
    let shape = Shape { size_mib: 32, ..Shape::default() };
    let store = Store::new(ctx, "ext4", &shape)?;
    let daemon = Daemon::start(ctx)?;
    let image = store.sparse("image", 128 * MIB)?;
    let device = daemon.attach(&[&image])?;
    // Write each chunk once: the kernel does not retry failed writes of its cache.
    let disk = Disk::open(&device)?;
    let data = vec![7; 1 << 20];
    let failed = (0..128).filter(|at| disk.try_write(at * MIB, &data).is_err()).count();
    let _ = disk.sync();
    let full = format!("failed on {image}: No space left on device");
    warned(&daemon, &full, 1)?;
    warned(&daemon, "default/loop0: ", 1)?;
    File::options().write(true).open(&image)?.set_len(4 * MIB)?;
    if disk.try_read(64 * MIB, 4096).is_ok() {
        fail!("a read past the end of the image succeeds ({failed} writes had failed)");
    }
    warned(&daemon, "the image is shorter than the device", 1)?;
    for at in 65..75 {
        let _ = disk.try_read(at * MIB, 4096);
    }
    std::thread::sleep(Duration::from_secs(3));
    warned(&daemon, "default/loop0: ", 2)?;
    drop(disk);
    daemon.ok(&["detach", &device])?;
    daemon.stop()
}
