// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the daemon gets at its start: devices from its configuration, sockets from a service
//! manager.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::io::{FdFlags, fcntl_dupfd_cloexec, fcntl_setfd};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use super::MIB;
use crate::daemon::Daemon;
use crate::harness::{At, Case, Ctx, Needs, Res, case, ensure, skip};
use crate::tools::{self, Running, SHORT};

pub(super) fn cases() -> Vec<Case> {
    vec![
        case("configured::devices", Needs::Ublk, 120, devices),
        case("configured::passed_sockets", Needs::Ublk, 90, passed_sockets),
    ]
}

/// A mounted FUSE file system whose server does not answer.
struct Hung(String, Option<File>);

impl Hung {
    fn mount(ctx: &Ctx) -> Res<Hung> {
        let at = ctx.path("hung");
        std::fs::create_dir(&at)?;
        let device = File::options().read(true).write(true).open("/dev/fuse")?;
        let options = format!("fd={},rootmode=40000,user_id=0,group_id=0", device.as_raw_fd());
        let options = std::ffi::CString::new(options)?;
        mount("hung", &at, "fuse", MountFlags::empty(), Some(&*options)).at("mount")?;
        Ok(Hung(at, Some(device)))
    }
}

impl Drop for Hung {
    fn drop(&mut self) {
        // Without a server, waiting requests fail.
        self.1 = None;
        let _ = unmount(&self.0, UnmountFlags::DETACH);
    }
}

/// Configured devices are attached at the start or at a reload, each once, also if others fail.
fn devices(ctx: &Ctx) -> Res {
    let image = |name: &str| -> Res<String> {
        File::create(ctx.path(name))?.set_len(MIB)?;
        Ok(ctx.path(name))
    };
    let (a, b, c) = (image("a.img")?, image("b.img")?, image("c.img")?);
    let (missing, fifo, config) = (ctx.path("missing.img"), ctx.path("fifo"), ctx.path("config.toml"));
    tools::ok(&["mkfifo", &fifo])?;
    let hung = Hung::mount(ctx)?;
    let slow = format!("{}/image", hung.0);
    let entry = |image: &str, more: &str| format!("[[device]]\nimage = '{image}'\nbuffered = true\n{more}");
    let broken = format!("{}{}{}", entry(&slow, ""), entry(&missing, ""), entry(&fifo, ""));
    let keeps = entry(&b, "instance = 'ci'\noffset = '512k'\n[[instance]]\nname = 'ci'\n");
    std::fs::write(&config, format!("{broken}{}{keeps}", entry(&a, "number = 5\nread_only = true\n")))?;

    let started = Instant::now();
    let mut daemon = Daemon::with(ctx, &["--config", &config])?;
    let took = started.elapsed();
    ensure!((4..20).contains(&took.as_secs()), "ready after {took:?}");
    let shown = |daemon: &Daemon| -> Res<Vec<String>> {
        let list = daemon.json(&["list"])?;
        let row = |device: &serde_json::Value| {
            let field = |name: &str| device[name].to_string().replace('"', "");
            let image = field("image").replace(&ctx.path(""), "");
            format!("{}/loop{} {image} {}", field("instance"), field("number"), field("sizeBytes"))
        };
        Ok(list.as_array().ok_or("no list")?.iter().map(row).collect())
    };
    let both = ["ci/loop0 b.img 524288", "default/loop5 a.img 1048576"];
    ensure!(shown(&daemon)? == both, "{:?}", shown(&daemon)?);
    ensure!(
        daemon.info(&format!("{}/default/loop5", ctx.path("run")))?["readOnly"] == true,
        "loop5 is writable"
    );
    let says = |daemon: &Daemon, words: &[&str]| {
        let log = daemon.log();
        tools::until(Duration::from_secs(10), || {
            daemon.log().lines().any(|line| words.iter().all(|word| line.contains(word))).then_some(())
        })
        .ok_or(format!("the log does not say {words:?}: {log}"))
    };
    let line = |number: u32, image: &str| format!("{config}, line {number}: {image} ");
    says(&daemon, &["ERROR", &line(1, &slow), "does not answer"])?;
    says(&daemon, &["ERROR", &line(4, &missing), "no such file"])?;
    says(&daemon, &["ERROR", &line(7, &fifo), "neither a file nor a block device"])?;

    // One entry is removed, one is new, and one that failed can be attached now.
    image("missing.img")?;
    std::fs::write(&config, format!("{broken}{keeps}{}", entry(&c, "")))?;
    tools::ok(&["kill", "-HUP", &daemon.pid()?.to_string()])?;
    let all = tools::until(Duration::from_secs(20), || shown(&daemon).ok().filter(|all| all.len() == 4));
    let want = [both[0], "default/loop0 missing.img 1048576", "default/loop1 c.img 1048576", both[1]];
    ensure!(all.as_deref().is_some_and(|all| all == want), "{:?}", shown(&daemon)?);
    says(&daemon, &["WARN", &line(1, &slow), "still being attached"])?;
    says(&daemon, &[&a, "is no longer configured"])?;
    says(&daemon, &[&line(10, &b), "is already attached as"])?;

    // A hung attach does not delay the exit.
    let took = daemon.terminate()?;
    ensure!(took < Duration::from_secs(20), "ended after {took:?}");
    drop(hung);
    daemon.restart()?;
    ensure!(shown(&daemon)? == want[..3], "{:?}", shown(&daemon)?);
    daemon.kill()?;
    daemon.restart()?;
    ensure!(shown(&daemon)? == want[..3], "{:?}", shown(&daemon)?);
    daemon.stop()
}

/// Sockets of a service manager outlive the daemon: the next daemon serves clients that connect
/// early.
fn passed_sockets(ctx: &Ctx) -> Res {
    if tools::run(&["bash", "-c", "true"]).is_err() {
        skip!("needs bash");
    }
    let run_dir = ctx.path("run");
    std::fs::create_dir(&run_dir)?;
    let names = ["control", "private", "oci"].map(|name| Path::new(&run_dir).join(name));
    let mut passed = Vec::new();
    for path in &names {
        let listener = UnixListener::bind(path)?;
        std::fs::set_permissions(path, PermissionsExt::from_mode(0o644))?;
        // A copy for the shell below to inherit, under a number that it does not use.
        let copy: OwnedFd = fcntl_dupfd_cloexec(&listener, 20)?;
        fcntl_setfd(&copy, FdFlags::empty())?;
        passed.push(copy);
    }
    let numbers: Vec<String> =
        passed.iter().zip(3..).map(|(fd, number)| format!("{number}<&{}", fd.as_raw_fd())).collect();
    let script = format!("exec {}; LISTEN_FDS=3 LISTEN_PID=$$ exec \"$@\"", numbers.join(" "));
    let start = || -> Res<Child> {
        let log = File::options().create(true).append(true).open(ctx.path("daemon.log"))?;
        let mut command = Command::new("bash");
        command.args([
            "-c",
            &script,
            "bash",
            &ctx.host.program,
            "serve",
            "--backend",
            "fuse",
            "--run-dir",
            &run_dir,
        ]);
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn()?;
        tools::remember(child.id());
        Ok(child)
    };
    let list = || {
        let mut command = Command::new(&ctx.host.program);
        command.args(["instance", "list", "--json", "--run-dir", &run_dir]);
        Running::start(command)
    };
    let doctor = || {
        let mut command = Command::new(&ctx.host.program);
        command.args(["doctor", "--run-dir", &run_dir]);
        Running::start(command)
    };
    for _ in 0..2 {
        // These clients connect before the daemon starts.
        let (mut early, mut early_doctor) = (list()?, doctor()?);
        std::thread::sleep(Duration::from_millis(300));
        ensure!(early.alive() && early_doctor.alive(), "the early clients did not wait");
        let mut daemon = start()?;
        let listed = early.finish(SHORT)?.ok()?.out;
        ensure!(listed.contains("\"default\""), "{listed}");
        let serves = format!("process {} serves", daemon.id());
        for found in [early_doctor.finish(SHORT)?.out, doctor()?.finish(SHORT)?.out] {
            ensure!(found.contains(&serves), "{serves}: {found}");
        }
        let modes = names
            .each_ref()
            .map(|path| std::fs::metadata(path).map(|meta| meta.permissions().mode() & 0o777));
        ensure!(matches!(modes, [Ok(0o600), Ok(0o666), Ok(0o600)]), "{modes:?}");
        tools::ok(&["kill", &daemon.id().to_string()])?;
        let status = tools::wait(&mut daemon, SHORT);
        ensure!(status.is_some_and(|status| status.success()), "it ended with {status:?}");
        tools::forget(daemon.id());
        ensure!(names.iter().all(|path| path.exists()), "a socket is gone");
    }
    Ok(())
}
