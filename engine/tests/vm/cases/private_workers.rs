// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Pools of one user share workers, as the devices of an instance do; what hangs in one pool does not
//! stall another.

use std::process::Command;
use std::time::Duration;

use super::private_hung::Server;
use super::private_script::{Inside, Script};
use crate::daemon::Daemon;
use crate::harness::{Case, Ctx, Needs, Res, case, ensure};
use crate::tools::Running;

/// Threads that come with the load, and not with pools: those of `event_threads` and of the runtime.
const OTHER_THREADS: usize = 4;

pub(super) fn cases() -> Vec<Case> {
    vec![
        case("private_workers::do_not_grow_with_pools", Needs::Private, 400, do_not_grow_with_pools),
        case("private_workers::hang_for_one_pool_only", Needs::Private, 200, hang_for_one_pool_only),
        case("private_workers::differ_between_users", Needs::Private, 200, differ_between_users),
    ]
}

/// A pool with one device, until the script is killed.
fn pool(ctx: &Ctx, daemon: &Daemon, name: &str, uid: u32) -> Res<Script> {
    let inside = Inside::new(ctx, daemon).with(&["--name", name]);
    let inside = if uid == 0 { inside } else { inside.user(uid) };
    let script = inside
        .start(&format!("works bind losetup /dev/loop0 image-{name}; pause {name}; exec sleep 1000"))?;
    let script = script.wait(name)?;
    script.resume(name)?;
    Ok(script)
}

fn image(ctx: &Ctx, name: &str) -> Res {
    let path = ctx.path(&format!("image-{name}"));
    std::fs::File::create(&path)?.set_len(1 << 20)?;
    Ok(std::fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o666))?)
}

fn do_not_grow_with_pools(ctx: &Ctx) -> Res {
    let daemon = Daemon::start(ctx)?;
    let names: Vec<String> = (0..20).map(|number| format!("p{number}")).collect();
    names.iter().try_for_each(|name| image(ctx, name))?;
    let mut pools: Vec<Script> =
        names[..2].iter().map(|name| pool(ctx, &daemon, name, 0)).collect::<Res<_>>()?;
    let (two, two_kib) = (daemon.settled_footprint()?.threads, daemon.resident_kib()?);
    for name in &names[2..] {
        pools.push(pool(ctx, &daemon, name, 0)?);
    }
    let (twenty, twenty_kib) = (daemon.settled_footprint()?.threads, daemon.resident_kib()?);
    ctx.note(format!("2 pools: {two} threads, {two_kib} KiB; 20 pools: {twenty} threads, {twenty_kib} KiB"));
    ensure!(twenty <= two + OTHER_THREADS, "threads grow with pools: {two} for 2, {twenty} for 20");
    pools.into_iter().for_each(Script::kill);
    daemon.stop()
}

/// More requests hang than io_uring has threads for a worker. The other pool is root's too.
fn hang_for_one_pool_only(ctx: &Ctx) -> Res {
    let server = Server::start(ctx)?;
    let daemon = Daemon::start(ctx)?;
    let hung = Inside::new(ctx, &daemon)
        .with(&["--name", "hung"])
        .start(r#"works "one" losetup /dev/loop0 hung/one; echo $$ > hung.pid; pause bound; sleep 1000"#)?;
    let hung = hung.wait("bound")?;
    let other = Inside::new(ctx, &daemon).with(&["--name", "other"]).start(
        r#"
        image a 1M; works "a" losetup /dev/loop0 a; pause other
        for cpu in 0 1 0 1; do
            works "written on CPU $cpu" timeout -k 1 20 taskset -c $cpu \
                dd if=/dev/urandom of=/dev/loop0 bs=64k count=4 conv=fsync
        done"#,
    )?;
    let other = other.wait("other")?;
    server.stop_answering()?;
    let pid = std::fs::read_to_string(ctx.path("hung.pid"))?;
    let device = format!("/proc/{}/root/dev/loopfs/loop0", pid.trim());
    let mut readers = Vec::new();
    for cpu in ["0", "1"] {
        let mut command = Command::new("taskset");
        command.args(["-c", cpu, "fio", "--name=hung", "--ioengine=libaio", "--iodepth=64", "--direct=1"]);
        command.args(["--rw=randread", "--bs=4k", "--size=4M", &format!("--filename={device}")]);
        readers.push(Running::start(command)?);
    }
    std::thread::sleep(Duration::from_secs(3));
    ensure!(readers.iter_mut().all(Running::alive), "the server still answers: the test proves nothing");
    other.resume("other")?;
    other.finish()?;
    Inside::new(ctx, &daemon).run(
        r#"
        image b 1M; works "b" losetup /dev/loop0 b
        works "fsync" timeout -k 1 20 dd if=/dev/urandom of=/dev/loop0 bs=64k count=4 conv=fsync"#,
    )?;
    ensure!(readers.iter_mut().all(Running::alive), "the server answered: the test proves nothing");
    server.kill();
    for reader in readers {
        reader.finish(Duration::from_secs(20))?;
    }
    hung.kill();
    daemon.stop()
}

/// Users have workers of their own: two each.
fn differ_between_users(ctx: &Ctx) -> Res {
    let daemon = Daemon::start(ctx)?;
    let pools = [("a", 0), ("b", 1001), ("c", 1002), ("d", 1002)];
    pools.iter().try_for_each(|(name, _)| image(ctx, name))?;
    let _pools: Vec<Script> =
        pools.iter().map(|(name, uid)| pool(ctx, &daemon, name, *uid)).collect::<Res<_>>()?;
    for (uid, wanted) in [(0, 2), (1001, 2), (1002, 2)] {
        let workers = daemon.threads_named(&format!("pools {uid}/"))?;
        ensure!(workers == wanted, "{workers} workers for the pools of user {uid}");
    }
    daemon.stop()
}
