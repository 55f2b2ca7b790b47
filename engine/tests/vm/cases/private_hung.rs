// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A backing file on a FUSE file system whose server does not answer: only its device is stuck, and
//! nothing else in its pool or elsewhere.

use std::process::Command;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use super::private_script::Inside;
use crate::daemon::Daemon;
use crate::harness::{At, Case, Ctx, Needs, Res, case, ensure, fail};
use crate::tools::{self, Running};

/// Five times the documented limit.
const SOON: Duration = Duration::from_secs(5);
/// Deadline for the daemon's exit: 5 s for tenants, 10 s for writeback, 5 s per worker.
const DRAINED: Duration = Duration::from_secs(45);

pub(super) fn cases() -> Vec<Case> {
    vec![
        case("private_hung::others_keep_working", Needs::Private, 150, others_keep_working),
        case("private_hung::sigterm", Needs::Private, 180, daemon_exits_on_sigterm),
    ]
}

/// A file system of fuse2fs, whose server can be stopped.
pub(super) struct Server {
    process: Running,
    pid: Pid,
    dir: String,
}

impl Server {
    pub(super) fn start(ctx: &Ctx) -> Res<Server> {
        let (below, dir, pid_file) = (ctx.path("below"), ctx.path("hung"), ctx.path("server"));
        tools::sh(format!("truncate -s 32M {below}; mkfs.ext4 -q {below}; mkdir {dir}"))?;
        let mut command = Command::new("bash");
        command.args(["-c", &format!("echo $$ > {pid_file}; exec fuse2fs -f {below} {dir}")]);
        let process = Running::start(command)?;
        let mounted = || tools::run(&["mountpoint", "-q", &dir]).ok().filter(|done| done.code == 0);
        ensure!(tools::until(Duration::from_secs(30), mounted).is_some(), "fuse2fs has not mounted");
        let pid =
            std::fs::read_to_string(&pid_file)?.trim().parse().ok().and_then(Pid::from_raw).ok_or("pid")?;
        tools::sh(format!("truncate -s 4M {dir}/one {dir}/two; sync -f {dir}"))?;
        Ok(Server { process, pid, dir })
    }

    pub(super) fn stop_answering(&self) -> Res {
        kill_process(self.pid, Signal::STOP).at("SIGSTOP")
    }

    /// Aborts it: all pending requests fail.
    pub(super) fn kill(&self) {
        let _ = kill_process(self.pid, Signal::KILL);
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
        let _ = tools::run(&["umount", "-l", &self.dir]);
        let _ = self.process.alive();
    }
}

/// Reads a tenant's device from outside of the tenant: it cannot be killed while it waits.
fn reader(ctx: &Ctx, name: &str) -> Res<Running> {
    let pid = std::fs::read_to_string(ctx.path(&format!("{name}.pid")))?;
    let mut command = Command::new("dd");
    let device = format!("if=/proc/{}/root/dev/loopfs/loop0", pid.trim());
    command.args([&device, "of=/dev/null", "bs=4k", "count=1", "iflag=direct"]);
    Running::start(command)
}

/// The disks of ublk once they have been the same for two seconds. Another pool may get the number of
/// one that is being replaced.
fn settled_ids(daemon: &Daemon) -> Res<Vec<u32>> {
    let mut last = Vec::new();
    for _ in 0..10 {
        let now = daemon.ublk_ids();
        if now == last {
            return Ok(now);
        }
        last = now;
        std::thread::sleep(Duration::from_secs(2));
    }
    fail!("the disks change all the time: {last:?}")
}

/// Other devices of the pool, other pools and the daemon keep working. The end of the tenant does
/// not wait for the hung device, which is removed once the server is gone.
fn others_keep_working(ctx: &Ctx) -> Res {
    let server = Server::start(ctx)?;
    let daemon = Daemon::start(ctx)?;
    let idle = Inside::new(ctx, &daemon).with(&["--name", "idle"]).start(
        r#"
        image b 1M b; works "b" losetup /dev/loop1 b; works "two" losetup /dev/loop0 hung/two
        pause idle; sleep 1000"#,
    )?;
    let idle = idle.wait("idle")?;
    let of_idle = settled_ids(&daemon)?;
    let script = Inside::new(ctx, &daemon).with(&["--name", "hung"]).start(
        r#"
        t() { timeout -k 1 20 "$@"; }
        image a 1M a; works "a" losetup /dev/loop1 a; works "one" losetup /dev/loop0 hung/one
        image c 1M c; works "c" losetup /dev/loop2 c
        echo $$ > hung.pid; pause bound
        for i in {1..8}; do
            works "beside it $i" t dd if=/dev/loop1 of=/dev/null bs=64k iflag=direct
            works "written $i" t dd if=/dev/zero of=/dev/loop2 bs=64k count=4 oflag=direct
        done
        works "-d beside it" t losetup -d /dev/loop2
        holds "-a" "$(t losetup -a)" "hung/one"
        same "-f" "$(t losetup -f)" /dev/loop2
        works "another" t losetup /dev/loop2 c
        [ $bad = 0 ] || exit 1
        pause beside; sleep 1000"#,
    )?;
    let script = script.wait("bound")?;
    server.stop_answering()?;
    let mut waits = reader(ctx, "hung")?;
    std::thread::sleep(Duration::from_millis(500));
    script.resume("bound")?;
    let script = script.wait("beside")?;
    ensure!(waits.alive(), "the server still answers: the test proves nothing");
    Inside::new(ctx, &daemon).run(
        r#"
        image d 1M d; same "-f --show" "$(losetup -f --show d)" /dev/loop0; same "bytes" "$(head_of /dev/loop0)" d
        "#,
    )?;
    daemon.json(&["list"]).at("the daemon")?;

    // Nothing is in flight: all devices are removed at once, and only the file is closed later.
    let since = Instant::now();
    idle.kill();
    let left = |ids: &[u32]| daemon.ublk_ids().iter().filter(|id| ids.contains(id)).count();
    let gone = tools::until(SOON, || (left(&of_idle) == 0).then(|| since.elapsed()));
    let Some(gone) = gone else { return Err(format!("{} idle devices are left", left(&of_idle)).into()) };
    ctx.note(format!("idle devices gone after {gone:.0?}"));

    let since = Instant::now();
    script.kill();
    let gone = tools::until(SOON, || (daemon.ublk_ids().len() <= 1).then(|| since.elapsed()));
    let Some(gone) = gone else {
        return Err(format!("devices left besides the stuck one: {:?}", daemon.ublk_ids()).into());
    };
    ctx.note(format!("other devices gone after {gone:.0?}"));
    ensure!(
        waits.alive() && daemon.ublk_ids().len() == 1,
        "the stuck device is gone: the test proves nothing"
    );
    // Retries cost a constant amount of memory.
    let before = daemon.settled_footprint()?;
    std::thread::sleep(Duration::from_secs(12));
    let after = daemon.footprint()?;
    ensure!(before == after, "while it hangs: from {before:?} to {after:?}");

    let since = Instant::now();
    server.kill();
    let gone = tools::until(SOON, || daemon.ublk_ids().is_empty().then(|| since.elapsed()));
    let Some(gone) = gone else { return Err("the stuck device stays although the server is gone".into()) };
    ctx.note(format!("the stuck device gone {gone:.0?} after the server"));
    let read = waits.finish(SOON)?;
    ensure!(read.code != 0, "the hung device was read: {read:?}");
    daemon.stop()
}

/// The daemon ends although a device is stuck, and the next daemon removes the rest.
fn daemon_exits_on_sigterm(ctx: &Ctx) -> Res {
    let server = Server::start(ctx)?;
    let mut daemon = Daemon::start(ctx)?;
    let script = Inside::new(ctx, &daemon)
        .start(r#"works "one" losetup /dev/loop0 hung/one; echo $$ > hung.pid; pause bound; sleep 1000"#)?;
    let script = script.wait("bound")?;
    server.stop_answering()?;
    let mut waits = reader(ctx, "hung")?;
    std::thread::sleep(Duration::from_millis(500));
    ensure!(waits.alive(), "the server still answers: the test proves nothing");
    let since = Instant::now();
    daemon.sigterm()?;
    let ended = tools::until(DRAINED, || (!daemon.alive()).then(|| since.elapsed()));
    let Some(ended) = ended else { return Err(format!("the daemon runs {DRAINED:?} after SIGTERM").into()) };
    ctx.note(format!("the daemon ended after {ended:.1?}"));
    server.kill();
    waits.finish(SOON)?;
    script.kill();
    daemon.kill()?;
    daemon.restart()?;
    let gone = tools::until(SOON, || daemon.ublk_ids().is_empty().then_some(()));
    ensure!(gone.is_some(), "left by the previous daemon: {:?}", daemon.ublk_ids());
    daemon.stop()
}
