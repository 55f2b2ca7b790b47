// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `loopengine losetup`: losetup(8) on a private pool, over the daemon's socket.

use std::fs::File;
use std::path::Path;
use std::time::Duration;

use super::MIB;
use crate::daemon::Daemon;
use crate::disk::{self, same};
use crate::harness::{At, Case, Ctx, Needs, Res, case, ensure};
use crate::model::pattern;
use crate::store::{Mount, Store};
use crate::tools;

pub(super) fn cases() -> Vec<Case> {
    vec![
        case("private_socket::bind_and_unbind", Needs::Private, 90, life),
        case("private_socket::block_sizes", Needs::Private, 90, block_sizes),
        case("private_socket::partitions", Needs::Private, 90, partitions),
        case("private_socket::pools", Needs::Private, 90, pools),
    ]
}

/// Mounts a pool; returns its directory.
fn pool(ctx: &Ctx, daemon: &Daemon, name: &str) -> Res<String> {
    let dir = ctx.path(name);
    std::fs::create_dir(&dir).at(&dir)?;
    daemon.ok(&["instance", "mount", "--name", name, &dir])?;
    Ok(dir)
}

/// The output of a losetup that must succeed.
fn losetup(daemon: &Daemon, words: &[&str]) -> Res<String> {
    let out = daemon.ok(&[&["losetup"], words].concat())?;
    Ok(out.trim_end().to_owned())
}

/// The message of a losetup that must fail.
fn refused(daemon: &Daemon, words: &[&str]) -> Res<String> {
    let done = daemon.cli(&[&["losetup"], words].concat())?;
    ensure!(done.code == 1, "{words:?}: {done:?}");
    Ok(done.err.trim_end().to_owned())
}

fn unmount(dir: &str) -> Res {
    tools::ok(&["umount", dir]).map(drop)
}

fn life(ctx: &Ctx) -> Res {
    let store = Store::xfs(ctx)?;
    let image = store.sparse("image", 8 * MIB)?;
    let daemon = Daemon::start(ctx)?;
    let dir = pool(ctx, &daemon, "life")?;
    let device = format!("{dir}/loop0");
    ensure!(losetup(&daemon, &["-f"])? == device, "-f");
    ensure!(losetup(&daemon, &["-f", "--show", &image])? == device, "-f --show");
    let data = pattern(1, 1 << 20);
    disk::write_all(&device, &data)?;
    same(&image, &disk::read_all(&image, 0, MIB)?, &data)?;
    let line = losetup(&daemon, &["-a"])?;
    ensure!(line.starts_with(&format!("{device}: [")) && line.ends_with(&format!("({image})")), "-a: {line}");
    ensure!(losetup(&daemon, &["-j", &image])? == line, "-j");
    let text = losetup(&daemon, &["-l", "-J"])?;
    let list: serde_json::Value = serde_json::from_str(&text).at(&text)?;
    let shown = &list["loopdevices"][0];
    ensure!(shown["name"] == device.as_str() && shown["back-file"] == image.as_str(), "-J: {text}");
    // `-c` adopts the file's new size.
    File::options().write(true).open(&image)?.set_len(12 * MIB)?;
    losetup(&daemon, &["-c", &device])?;
    ensure!(tools::ok(&["blockdev", "--getsize64", &device])?.trim() == (12 * MIB).to_string(), "-c");
    // Mounted: it is unbound at the last close, and listed until then.
    tools::ok(&["mkfs.ext4", "-q", &device])?;
    let at = ctx.path("mnt");
    let mount = Mount::new(&device, &at, &[])?;
    losetup(&daemon, &["-d", &device])?;
    ensure!(losetup(&daemon, &["-a"])?.contains(&image), "unbound while mounted");
    mount.umount()?;
    let gone =
        tools::until(Duration::from_secs(5), || losetup(&daemon, &["-a"]).ok()?.is_empty().then_some(()));
    ensure!(gone.is_some(), "still bound after umount");
    let again = refused(&daemon, &["-d", &device])?;
    ensure!(again == format!("losetup: {device}: detach failed: No such device or address"), "{again}");
    // Bound again at once, by its number.
    losetup(&daemon, &["-r", &device, &image])?;
    losetup(&daemon, &["-d", "loop0"])?;
    losetup(&daemon, &["loop0", &image])?;
    ensure!(losetup(&daemon, &["-n", "-O", "RO"])?.trim() == "0", "still read-only");
    losetup(&daemon, &["-D"])?;
    unmount(&dir)?;
    daemon.stop()
}

/// A new block size needs another disk: an unused one is replaced, otherwise the call is refused.
fn block_sizes(ctx: &Ctx) -> Res {
    let store = Store::xfs(ctx)?;
    let image = store.sparse("image", 8 * MIB)?;
    let daemon = Daemon::start(ctx)?;
    let dir = pool(ctx, &daemon, "blocks")?;
    let device = format!("{dir}/loop0");
    let size = || tools::ok(&["blockdev", "--getss", &device]).map(|text| text.trim().to_owned());
    losetup(&daemon, &["-f", "-b", "4096", &image])?;
    ensure!(size()? == "4096", "not the block size of the bind");
    let data = pattern(2, 1 << 20);
    disk::write_all(&device, &data)?;
    let held = File::open(&device).at(&device)?;
    let busy = refused(&daemon, &["-b", "512", &device])?;
    ensure!(busy.ends_with("Device or resource busy") && size()? == "4096", "{busy}");
    drop(held);
    losetup(&daemon, &["-b", "512", &device])?;
    ensure!(size()? == "512", "not the block size that was set");
    same(&device, &disk::read_all(&device, 0, MIB)?, &data)?;
    losetup(&daemon, &["-d", &device])?;
    unmount(&dir)?;
    daemon.stop()
}

fn partitions(ctx: &Ctx) -> Res {
    let store = Store::xfs(ctx)?;
    let image = store.sparse("image", 32 * MIB)?;
    tools::sh(format!("printf 'label: gpt\\n,8M\\n,\\n' | sfdisk -q {image}"))?;
    let daemon = Daemon::start(ctx)?;
    let dir = pool(ctx, &daemon, "parts")?;
    losetup(&daemon, &["-fP", &image])?;
    let first = format!("{dir}/loop0p1");
    let size = tools::ok(&["blockdev", "--getsize64", &first])?;
    ensure!(size.trim() == (8 * MIB).to_string(), "{first} has {size} bytes");
    let data = pattern(3, 65536);
    disk::write_all(&first, &data)?;
    same(&image, &disk::read_all(&image, MIB, 65536)?, &data)?;
    ensure!(Path::new(&format!("{dir}/loop0p2")).exists(), "no second partition");
    losetup(&daemon, &["-d", "loop0"])?;
    let gone = || (!Path::new(&first).exists()).then_some(());
    ensure!(tools::until(Duration::from_secs(5), gone).is_some(), "{first} is left");
    unmount(&dir)?;
    daemon.stop()
}

/// Selection of the pool.
fn pools(ctx: &Ctx) -> Res {
    let store = Store::xfs(ctx)?;
    let image = store.sparse("image", MIB)?;
    let daemon = Daemon::start(ctx)?;
    let none = daemon.cli(&["losetup", "-a"])?;
    ensure!(none.code == 3 && none.err.contains("instance mount"), "{none:?}");
    let (red, blue) = (pool(ctx, &daemon, "red")?, pool(ctx, &daemon, "blue")?);
    let several = daemon.cli(&["losetup", "-a"])?;
    ensure!(several.code == 2 && several.err.contains("--pool"), "{several:?}");
    ensure!(
        losetup(&daemon, &["--pool", "blue", "-f", "--show", &image])? == format!("{blue}/loop0"),
        "blue"
    );
    ensure!(losetup(&daemon, &["--pool", "red", "-a"])?.is_empty(), "red lists a device of blue");
    let other = refused(&daemon, &["--pool", "red", "-d", &format!("{blue}/loop0")])?;
    ensure!(other.ends_with("No such device"), "{other}");
    unmount(&red)?;
    let alone = || losetup(&daemon, &["-n", "-O", "NAME"]).ok();
    let meant = tools::until(Duration::from_secs(5), alone);
    ensure!(meant == Some(format!("{blue}/loop0")), "only blue is left, but losetup lists {meant:?}");
    losetup(&daemon, &["-D"])?;
    unmount(&blue)?;
    daemon.stop()
}
