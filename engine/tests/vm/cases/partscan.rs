// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Partitions of devices of an instance: they are named after their device and lie next to it,
//! whichever program adds them. Compares with the kernel's driver.

use std::time::Duration;

use super::MIB;
use super::private_driver::Driver;
use super::private_partitions::{GROWN, PARTED, REPORT, SFDISK, SGDISK, TABLES, compare};
use super::private_script::Inside;
use crate::daemon::Daemon;
use crate::harness::{Case, Ctx, Needs, Res, case, ensure};
use crate::store::{Mount, Store, mkfs};
use crate::tools;

pub(super) fn cases() -> Vec<Case> {
    let tools = |name: &str, script: &'static str| {
        let needs = if name == "grown" { Needs::Resize } else { Needs::Ublk };
        case(format!("partscan::{name}"), needs, 580, move |ctx| same(ctx, script))
    };
    vec![
        tools("sfdisk", SFDISK),
        tools("grown", GROWN),
        tools("sgdisk", SGDISK).variant_if(true),
        tools("parted", PARTED).variant_if(true),
        tools("tables", TABLES).variant_if(true),
        case(
            "partscan::used_partition_keeps_its_device_in_use",
            Needs::Ublk,
            200,
            used_partition_keeps_its_device_in_use,
        ),
        case("partscan::names_outlive_the_daemon", Needs::Recovery("copy"), 200, names_outlive_the_daemon),
        case("partscan::names_below_dev", Needs::Ublk, 200, names_below_dev),
    ]
}

const SCRIPT: Duration = Duration::from_secs(250);
/// Until the daemon notices a partition.
const SOON: Duration = Duration::from_secs(5);

/// The functions of `REPORT`, with loopengine for losetup. The disk has another name than the
/// device.
const PUBLIC: &str = r#"
bind() {
    local options=()
    while [ $# -gt 0 ]; do case $1 in -P) options+=(-P);; -b) options+=(--block-size $2); shift;; esac; shift; done
    dev=$($loopengine attach ${options[@]} disk); disk=$(basename $(readlink $dev))
}
free() { $loopengine detach $dev > /dev/null; ls -d ${dev}* 2>/dev/null; }
losetup() { $loopengine resize $2 > /dev/null; }
parts() { (cd $1; ls -d $2p* 2>/dev/null) | sed "s/^$2//" | sort -V | tr '\n' ' '; }
shown() {
    local p i
    for i in {1..100}; do [ "$(parts /sys/block/$disk $disk)" = "$(parts $(dirname $dev) loop0)" ] && break; sleep 0.05; done
    for p in $(ls -d ${dev}p* 2>/dev/null | sort -V); do echo -n "${p#$dev} $(blockdev --getsize64 $p) "; done
    echo -n "[$(lsblk -nro NAME,SIZE,TYPE /dev/$disk 2>&1 | sed "s,^$disk,,; s/disk$/loop/" | sort -V | tr '\n' ';')]"
}
"#;

/// Runs a script of the private cases on the kernel's driver and on devices of an instance, always
/// with -P.
fn same(ctx: &Ctx, script: &str) -> Res {
    let script = script.replace(r#"in "" -P"#, "in -P");
    let dir = ctx.dir.display().to_string();
    let clean = || tools::sh(format!("cd {dir} && rm -rf disk said mnt"));
    let driver = Driver::load()?;
    let daemon = Daemon::start(ctx)?;
    let theirs = Inside::new(ctx, &daemon).plain().run_for(SCRIPT, &format!("{REPORT}\n{script}"))?;
    driver.unload()?;
    clean()?;
    let ours = Inside::new(ctx, &daemon).plain().run_for(SCRIPT, &format!("{REPORT}\n{PUBLIC}\n{script}"))?;
    clean()?;
    compare(ctx, &theirs, &ours)?;
    daemon.stop()
}

/// An image with two partitions.
fn image(ctx: &Ctx, store: &Store, bytes: u64) -> Res<String> {
    let image = store.sparse("image", bytes)?;
    tools::sh(format!("printf 'label: gpt\nsize=16M\nsize=8M\n' | sfdisk -q {image}"))?;
    ctx.note("an image with two partitions");
    Ok(image)
}

/// The names of devices and partitions in the directory of `device`.
fn names(device: &str) -> Res<String> {
    Ok(tools::sh(format!("cd $(dirname {device}); ls -d loop* | sort -V | tr '\n' ' '"))?
        .trim_end()
        .to_owned())
}

fn wait_for_names(device: &str, wanted: &str) -> Res {
    let come = tools::until(SOON, || names(device).is_ok_and(|names| names == wanted).then_some(()));
    ensure!(come.is_some(), "names are {:?}, expected {wanted:?}", names(device)?);
    Ok(())
}

/// A device is in use while one of its partitions is.
fn used_partition_keeps_its_device_in_use(ctx: &Ctx) -> Res {
    let store = Store::ext4(ctx)?;
    let image = image(ctx, &store, 64 * MIB)?;
    let daemon = Daemon::start(ctx)?;
    let device = daemon.attach(&["--partscan", &image])?;
    ensure!(names(&device)? == "loop0 loop0p1 loop0p2", "attached: {}", names(&device)?);
    let first = format!("{device}p1");
    mkfs("ext4", &first)?;
    let mount = Mount::new(&first, &ctx.path("mnt"), &[])?;
    let refused = daemon.cli(&["detach", &device])?;
    let reason = format!("mounted on {}", mount.dir);
    ensure!(refused.code == 4 && refused.err.contains(&reason), "{refused:?}");
    mount.umount()?;
    // Older drivers do not report who has a disk or partition open without a claim.
    if ctx.host.private {
        let held = std::fs::File::open(format!("{device}p2"))?;
        let refused = daemon.cli(&["detach", &device])?;
        ensure!(refused.code != 0 && refused.err.contains("in use"), "{refused:?}");
        drop(held);
    }
    daemon.detach(&device)?;
    let left = tools::sh(format!("ls {}", device.trim_end_matches("loop0")))?;
    ensure!(left.is_empty(), "names are left: {left}");
    // Without --partscan, a device has no partitions until a program adds them.
    let device = daemon.attach(&[&image])?;
    ensure!(names(&device)? == "loop0", "without --partscan: {}", names(&device)?);
    tools::sh(format!("partx -a {device} || partx -u {device}"))?;
    wait_for_names(&device, "loop0 loop0p1 loop0p2")?;
    tools::sh(format!("delpart {device} 1; delpart {device} 2"))?;
    wait_for_names(&device, "loop0")?;
    daemon.detach(&device)?;
    let run = ["attach", "--partscan", &image, "--run", "sh", "-c", "ls $0*", "{}"];
    let out = daemon.ok(&run)?;
    ensure!(out.lines().count() == 3 && out.contains("loop0p2"), "--run: {out}");
    daemon.stop()
}

/// The next daemon updates the names of partitions, also after changes without a daemon.
fn names_outlive_the_daemon(ctx: &Ctx) -> Res {
    let store = Store::ext4(ctx)?;
    let (image, config) = (image(ctx, &store, 64 * MIB)?, ctx.path("config.toml"));
    std::fs::write(&config, format!("[[device]]\nimage = '{image}'\npartscan = true\n"))?;
    let mut daemon = Daemon::with(ctx, &["--config", &config])?;
    let device = format!("{}/default/loop0", ctx.path("run"));
    wait_for_names(&device, "loop0 loop0p1 loop0p2")?;
    daemon.kill()?;
    // Without a daemon, the kernel cannot read a table, but it can remove partitions.
    tools::sh(format!("delpart {device} 1"))?;
    daemon.restart()?;
    wait_for_names(&device, "loop0 loop0p2")?;
    tools::sh(format!("partx -u {device}"))?;
    wait_for_names(&device, "loop0 loop0p1 loop0p2")?;
    daemon.stop()
}

/// Names below /dev belong to one daemon, match those in its run directory, and are removed with
/// the devices.
fn names_below_dev(ctx: &Ctx) -> Res {
    let store = Store::ext4(ctx)?;
    let image = image(ctx, &store, 64 * MIB)?;
    let mut daemon = Daemon::with(ctx, &["--dev-links"])?;
    let device = daemon.attach(&["-P", &image])?;
    let below = "/dev/loopengine/default/loop0";
    wait_for_names(below, "loop0 loop0p1 loop0p2")?;
    tools::sh(format!("cmp {device}p2 {below}p2"))?;
    let stats = daemon.json(&["stats", below])?;
    ensure!(stats[0]["path"] == device.as_str(), "{below} does not name {device}: {stats}");
    daemon.kill()?;
    daemon.restart()?;
    wait_for_names(below, "loop0 loop0p1 loop0p2")?;
    let other = tools::sh(format!(
        "{} serve --run-dir {} --dev-links 2>&1 || echo status $?",
        ctx.host.program,
        ctx.path("other")
    ))?;
    ensure!(other.contains("another daemon uses /dev/loopengine") && other.contains("status 4"), "{other}");
    daemon.ok(&["detach", below])?;
    let left = tools::sh("find /dev/loopengine -mindepth 1 -name 'loop*'")?;
    ensure!(left.is_empty(), "left: {left}");
    daemon.stop()?;
    // A daemon without --dev-links removes the names that the previous one left.
    let daemon = Daemon::start(ctx)?;
    ensure!(!std::path::Path::new("/dev/loopengine").exists(), "/dev/loopengine is left");
    daemon.stop()
}
