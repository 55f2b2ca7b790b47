// SPDX-License-Identifier: Apache-2.0 OR MIT
//! 59-loopengine.rules hides the disks of this program from the host, and no others.
//!
//! udevd is the lab's, with the rules that probe disks and ours. From its point of view a daemon
//! with a /run/loopengine of its own, as in a container, is another ublk server: it knows the
//! disk only.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use super::MIB;
use crate::daemon::{Daemon, disk_name};
use crate::harness::{At, Case, Ctx, Needs, Res, case, ensure, fail, skip};
use crate::store::Store;
use crate::tools::{self, Running};

pub(super) fn cases() -> Vec<Case> {
    vec![case("udev::hides_the_disks_of_this_program_only", Needs::Recovery("copy"), 400, hides_ours_only)]
}

const RULES: &str = include_str!("../../../share/udev/59-loopengine.rules");
const DISKS: &str = "/run/loopengine/.disks";
const OURS: &str = "11111111-1111-4111-8111-111111111111";
const OURS_PARTITION: &str = "22222222-2222-4222-8222-222222222222";
const THEIRS: &str = "33333333-3333-4333-8333-333333333333";
const THEIRS_PARTITION: &str = "44444444-4444-4444-8444-444444444444";
/// Until udevd has handled an event.
const SOON: Duration = Duration::from_secs(60);

fn hides_ours_only(ctx: &Ctx) -> Res {
    let udev = Udev::start()?;
    let store = Store::xfs(ctx)?;
    let ours = file_system(&store, "ours", OURS)?;
    let theirs = file_system(&store, "theirs", THEIRS)?;
    let mut daemon = Daemon::leaving(ctx)?;
    let mut other = OtherServer::start(ctx)?;

    let hidden = daemon.attach(&[&ours])?;
    let shown = other.attach(&[&theirs])?;
    let hidden_disk = disk_name(&hidden)?;
    let shown_disk = disk_name(&shown)?;
    udev.expect_shown(&shown_disk, &by_uuid(THEIRS))?;
    udev.expect_hidden(&hidden_disk, &by_uuid(OURS))?;

    // So with partitions, whose events name them and not the disk.
    let partitioned = daemon.attach(&["--partscan", &table(&store, "table", OURS_PARTITION)?])?;
    let partitioned_disk = disk_name(&partitioned)?;
    let other_table = other.attach(&["--partscan", &table(&store, "other-table", THEIRS_PARTITION)?])?;
    udev.expect_shown(&format!("{}p1", disk_name(&other_table)?), &by_partuuid(THEIRS_PARTITION))?;
    udev.expect_hidden(&format!("{partitioned_disk}p1"), &by_partuuid(OURS_PARTITION))?;

    // A disk that waits for the next daemon stays hidden: a probe would hang.
    daemon.kill()?;
    udev.again(&hidden_disk)?;
    udev.expect_hidden(&hidden_disk, &by_uuid(OURS))?;
    // One that is gone does not stay listed.
    let stale = format!("{DISKS}/ublkb4242");
    std::fs::write(&stale, "0000000000000001\n")?;
    daemon.restart()?;
    ensure!(!Path::new(&stale).exists(), "{stale} is still there");
    ensure!(is_listed(&hidden_disk) && is_listed(&partitioned_disk), "a recovered disk is not listed");
    udev.again(&hidden_disk)?;
    udev.expect_hidden(&hidden_disk, &by_uuid(OURS))?;

    daemon.detach(&hidden)?;
    ensure!(!is_listed(&hidden_disk), "{hidden_disk} is still listed");
    // Another server may show the same file system, under the same number.
    let again = other.attach(&[&ours])?;
    ensure!(disk_name(&again)? == hidden_disk, "{again} has another number than {hidden_disk}");
    udev.expect_shown(&hidden_disk, &by_uuid(OURS))?;

    other.stop()?;
    daemon.detach(&partitioned)?;
    let left: Vec<_> = std::fs::read_dir(DISKS)?.flatten().map(|entry| entry.file_name()).collect();
    ensure!(left.is_empty(), "{DISKS} still has {left:?}");
    daemon.stop()
}

fn by_uuid(uuid: &str) -> String {
    format!("/dev/disk/by-uuid/{uuid}")
}

fn by_partuuid(uuid: &str) -> String {
    format!("/dev/disk/by-partuuid/{uuid}")
}

fn is_listed(disk: &str) -> bool {
    Path::new(DISKS).join(disk).exists()
}

fn file_system(store: &Store, name: &str, uuid: &str) -> Res<String> {
    let image = store.sparse(name, 32 * MIB)?;
    tools::ok(&["mkfs.ext4", "-q", "-F", "-U", uuid, &image])?;
    Ok(image)
}

/// An image with one partition of this UUID.
fn table(store: &Store, name: &str, uuid: &str) -> Res<String> {
    let image = store.sparse(name, 32 * MIB)?;
    tools::sh(format!("printf 'label: gpt\\nstart=2048, size=4096, uuid={uuid}\\n' | sfdisk -q {image}"))?;
    Ok(image)
}

/// udevd, until this is dropped.
struct Udev(#[expect(dead_code, reason = "ends it when dropped")] Running);

impl Udev {
    fn start() -> Res<Udev> {
        if Path::new("/run/udev/control").exists() {
            skip!("this machine has a udevd of its own");
        }
        let Some(program) = std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default())
            .map(|dir| dir.join("systemd-udevd"))
            .find(|program| program.exists())
        else {
            skip!("systemd-udevd is not on PATH: run 'cargo lab setup'");
        };
        // The lab's script names the directory in which the package is unpacked.
        let script = std::fs::read_to_string(&program).unwrap_or_default();
        let unpacked =
            script.split_whitespace().find_map(|word| word.strip_suffix("/usr/sbin/systemd-udevd"));
        let Some(unpacked) = unpacked.map(Path::new) else {
            skip!("{} is not the lab's", program.display());
        };
        let Some(rules) = ["lib/udev/rules.d", "usr/lib/udev/rules.d"]
            .map(|dir| unpacked.join(dir))
            .into_iter()
            .find(|dir| dir.join("60-block.rules").exists())
        else {
            fail!("the rules of udev are not in {}", unpacked.display());
        };
        std::fs::create_dir_all("/run/udev/rules.d")?;
        std::fs::write("/run/udev/rules.d/59-loopengine.rules", RULES)?;
        // Debian 12 probes no disk of ublk at all, later ones do.
        tools::sh(format!(
            "cd /run/udev/rules.d; cp {0}/60-block.rules .
             sed 's/|zd\\*\"/|zd*|ublk*\"/' {0}/60-persistent-storage.rules > 60-persistent-storage.rules
             grep -q 'ublk' 60-persistent-storage.rules",
            rules.display()
        ))?;
        let mut command = Command::new(program);
        command.arg("--resolve-names=never");
        let mut udevd = Running::start(command)?;
        if tools::until(SOON, || Path::new("/run/udev/control").exists().then_some(())).is_none() {
            let alive = udevd.alive();
            fail!("udevd does not listen (alive: {alive}): {:?}", udevd.finish(Duration::from_secs(1)));
        }
        Ok(Udev(udevd))
    }

    /// What udevd knows of a disk or partition, once it has handled its event.
    fn known(&self, disk: &str) -> Res<String> {
        let file = database(disk)?;
        match tools::until(SOON, || std::fs::read_to_string(&file).ok()) {
            Some(known) => Ok(known),
            None => fail!("udevd has not handled {disk}: there is no {}", file.display()),
        }
    }

    /// Has udevd handle a disk once more.
    fn again(&self, disk: &str) -> Res {
        std::fs::remove_file(database(disk)?).at("udev's file of the disk")?;
        std::fs::write(format!("/sys/class/block/{disk}/uevent"), "change")?;
        self.known(disk).map(drop)
    }

    fn expect_hidden(&self, disk: &str, link: &str) -> Res {
        let known = self.known(disk)?;
        for property in ["E:SYSTEMD_READY=0", "E:UDISKS_IGNORE=1"] {
            ensure!(known.contains(property), "{disk} lacks {property}: {known}");
        }
        ensure!(!known.contains("ID_FS_") && !known.contains("ID_PART_"), "{disk} was probed: {known}");
        ensure!(!Path::new(link).exists(), "{link} shows {disk}");
        Ok(())
    }

    fn expect_shown(&self, disk: &str, link: &str) -> Res {
        let known = self.known(disk)?;
        let target = || std::fs::canonicalize(link).ok();
        let right = PathBuf::from(format!("/dev/{disk}"));
        if tools::until(SOON, || target().filter(|target| *target == right)).is_none() {
            fail!("{link} leads to {:?} and not to {disk}; udevd knows: {known}", target());
        }
        let hidden = known.contains("SYSTEMD_READY=0") || known.contains("UDISKS_IGNORE");
        ensure!(!hidden, "{disk} is hidden: {known}");
        Ok(())
    }
}

impl Drop for Udev {
    fn drop(&mut self) {
        // Other cases run without udev.
        let _ = tools::sh("rm -rf /run/udev /dev/disk");
    }
}

/// udevd's file of a disk or partition.
fn database(disk: &str) -> Res<PathBuf> {
    let path = format!("/sys/class/block/{disk}/dev");
    let number = tools::until(SOON, || std::fs::read_to_string(&path).ok());
    let number = number.ok_or(format!("there is no {path}"))?;
    Ok(PathBuf::from(format!("/run/udev/data/b{}", number.trim())))
}

/// A daemon whose list udevd does not see.
struct OtherServer {
    program: String,
    run_dir: String,
    daemon: Option<Running>,
}

impl OtherServer {
    fn start(ctx: &Ctx) -> Res<OtherServer> {
        let (program, run_dir) = (ctx.host.program.clone(), ctx.path("other"));
        let mut command = Command::new("unshare");
        command.args(["--mount", "bash", "-ec"]).arg(format!(
            "mkdir -p /run/loopengine; mount -t tmpfs -o mode=755 other /run/loopengine
             exec {program} serve --run-dir {run_dir} --backend ublk --detach-all"
        ));
        let mut daemon = Running::start(command)?;
        let socket = format!("{run_dir}/control");
        if tools::until(SOON, || Path::new(&socket).exists().then_some(())).is_none() {
            let alive = daemon.alive();
            fail!("the other server has no {socket} (alive: {alive})");
        }
        Ok(OtherServer { program, run_dir, daemon: Some(daemon) })
    }

    fn cli(&self, words: &[&str]) -> Res<String> {
        let mut command = Command::new(&self.program);
        command.args(words).env("LOOPENGINE_RUN_DIR", &self.run_dir);
        Ok(Running::start(command)?.finish(SOON)?.ok()?.out.trim_end().to_owned())
    }

    fn attach(&mut self, words: &[&str]) -> Res<String> {
        self.cli(&[&["attach"], words].concat())
    }

    fn stop(&mut self) -> Res {
        self.cli(&["detach", "--all"])?;
        self.daemon = None;
        Ok(())
    }
}

impl Drop for OtherServer {
    fn drop(&mut self) {
        // Its disks would wait for a daemon otherwise.
        if self.daemon.is_some() {
            let _ = self.cli(&["detach", "--all", "--force"]);
        }
    }
}
