// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The disks of private pools at the end of their daemon, on the kernel's loop driver: the daemon
//! removes them, and the next one removes what a daemon has left.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use super::pools::backing_file;
use super::private_script::Inside;
use crate::daemon::Daemon;
use crate::harness::{Case, Ctx, Needs, Res, case, ensure};
use crate::host;
use crate::tools;

pub(super) fn cases() -> Vec<Case> {
    vec![
        case("pools::a_stop_removes_all_disks", Needs::Private, 300, a_stop_removes_all_disks),
        case("pools::the_next_daemon_removes_many_disks", Needs::Private, 300, many_disks_are_removed),
        case("pools::a_name_is_free_after_its_command", Needs::Private, 60, a_name_is_free),
        case("pools::a_stop_leaves_open_disks", Needs::Private, 120, a_stop_leaves_open_disks),
    ]
}

/// A mounted FUSE file system, whose server may have ended.
pub(super) struct FuseMount(pub(super) String);

impl Drop for FuseMount {
    fn drop(&mut self) {
        let _ = tools::run(&["umount", "-l", &self.0]);
    }
}

/// The daemon's disks, bound or not, and how many of them are listed for udev.
fn disks_present() -> (Vec<u32>, usize) {
    let disks = fs::read_dir("/sys/block").into_iter().flatten().flatten();
    let disks = disks.filter_map(|disk| disk.file_name().to_str()?.strip_prefix("loop")?.parse().ok());
    let disks: Vec<u32> = disks.filter(|number| *number >= 1 << 15).collect();
    let listed = |number: &&u32| Path::new(&format!("/run/loopengine/.disks/loop{number}")).exists();
    let count = disks.iter().filter(listed).count();
    (disks, count)
}

/// Many pools in directories, each with four bound devices, and one with many devices. Returns the
/// directories.
fn many_pools(ctx: &Ctx, daemon: &Daemon) -> Res<Vec<FuseMount>> {
    let (small, large) = if host::is_virtual() { (6, 12) } else { (25, 150) };
    let image = ctx.path("image");
    fs::write(&image, [b'a'; 1 << 16])?;
    let mut mounted = vec![];
    for (pool, devices) in std::iter::repeat_n(4, small).chain([large]).enumerate() {
        let (name, dir) = (format!("p{pool}"), ctx.path(&format!("dir{pool}")));
        fs::create_dir(&dir)?;
        daemon.ok(&["instance", "mount", "--name", &name, "--max", &devices.to_string(), &dir])?;
        mounted.push(FuseMount(dir));
        for _ in 0..devices {
            daemon.ok(&["losetup", "--pool", &name, "-f", &image])?;
        }
    }
    let (disks, listed) = disks_present();
    ctx.note(format!("{} pools have {} disks", small + 1, disks.len()));
    ensure!(
        disks.len() >= 4 * small + large && listed == disks.len(),
        "{} disks, {listed} listed",
        disks.len()
    );
    Ok(mounted)
}

/// The driver takes 40 ms to remove a disk, and can remove many at a time. One after the other, the
/// disks of the large pool would take 7 s.
const REMOVE_MAX: Duration = Duration::from_secs(6);

fn a_stop_removes_all_disks(ctx: &Ctx) -> Res {
    let mut daemon = Daemon::start(ctx)?;
    let mounted = many_pools(ctx, &daemon)?;
    let took = daemon.terminate()?;
    ctx.note(format!("the stop took {took:?}"));
    let (disks, _) = disks_present();
    ensure!(disks.is_empty(), "left: {disks:?}");
    let listed = fs::read_dir("/run/loopengine/.disks").into_iter().flatten().count();
    ensure!(listed == 0, "{listed} disks are still listed for udev");
    ensure!(took < REMOVE_MAX || host::is_virtual(), "the stop took {took:?}");
    drop(mounted);
    Ok(())
}

fn many_disks_are_removed(ctx: &Ctx) -> Res {
    let mut daemon = Daemon::start(ctx)?;
    let mounted = many_pools(ctx, &daemon)?;
    daemon.kill()?;
    let from = Instant::now();
    daemon.restart()?;
    let took = from.elapsed();
    ctx.note(format!("the next start took {took:?}"));
    let (disks, _) = disks_present();
    ensure!(disks.is_empty(), "left: {disks:?}");
    ensure!(took < REMOVE_MAX || host::is_virtual(), "the start took {took:?}");
    drop(mounted);
    daemon.stop()
}

/// The driver unbinds such a disk at its last close, and keeps its number. The next daemon removes it.
fn a_stop_leaves_open_disks(ctx: &Ctx) -> Res {
    let mut daemon = Daemon::start(ctx)?;
    let script = Inside::new(ctx, &daemon).start("image a 1M alpha; losetup -f a; pause bound")?;
    let script = script.wait("bound")?;
    let number = host::loop_numbers().into_iter().find(|number| backing_file(*number).ends_with("/a"));
    let Some(number) = number else { return Err("no loop device has the image".into()) };
    let holder = fs::File::open(format!("/dev/loop{number}"))?;
    daemon.terminate()?;

    script.kill();
    ensure!(disks_present().0 == [number], "{:?} are left, loop{number} is open", disks_present());
    let mut first = [0; 5];
    std::os::unix::fs::FileExt::read_exact_at(&holder, &mut first, 0)?;
    ensure!(&first == b"alpha", "the open disk has lost its file");
    drop(holder);
    let unbound = tools::until(Duration::from_secs(5), || backing_file(number).is_empty().then_some(()));
    ensure!(unbound.is_some(), "the last close does not unbind it");
    daemon.restart()?;
    ensure!(disks_present().0.is_empty(), "left: {:?}", disks_present());
    daemon.stop()
}

/// A second command can use the name of a pool at once; beside a command that runs, it cannot.
fn a_name_is_free(ctx: &Ctx) -> Res {
    let daemon = Daemon::start(ctx)?;
    for _ in 0..20 {
        daemon.ok(&["run", "--name", "again", "--", "true"])?;
    }
    let mut running = daemon.command(&["run", "--name", "again", "--", "sleep", "60"]).spawn()?;
    let runs = || {
        let pools = daemon.json(&["list", "--all"]).ok()?["pools"].clone();
        (pools[0]["process"]["command"] == "sleep").then_some(())
    };
    let opened = tools::until(Duration::from_secs(10), runs);
    let refused = daemon.cli(&["run", "--name", "again", "--", "true"])?;
    running.kill()?;
    running.wait()?;
    ensure!(opened.is_some(), "the first command did not start");
    let who = format!("private pool again exists (user root, pid {} (sleep))", running.id());
    ensure!(refused.code == 125 && refused.err.contains(&who), "'{who}': {refused:?}");
    daemon.stop()
}
