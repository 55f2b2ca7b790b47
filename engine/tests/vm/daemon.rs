// SPDX-License-Identifier: Apache-2.0 OR MIT
//! One daemon under test, and its commands.
//!
//! Knows `loopengine serve` and how to run the other subcommands. Knows nothing of images and file
//! systems. Dropping it leaves nothing behind: a killed daemon is started once more, to remove its
//! devices.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::harness::{At, Ctx, Res, ending, ensure, fail};
use crate::host;
use crate::tools::{self, Done, Running};

/// From start to READY=1, recovery included.
const READY: Duration = Duration::from_secs(60);
/// From SIGTERM to the exit.
pub(crate) const DRAIN: Duration = Duration::from_secs(60);
/// Deadline for one command.
const COMMAND: Duration = Duration::from_secs(90);

/// A daemon with a run directory of its own.
pub(crate) struct Daemon {
    program: String,
    run_dir: String,
    notify: String,
    log: String,
    backend: &'static str,
    options: Vec<String>,
    /// Whether SIGTERM detaches its devices. Otherwise the case must.
    detach_all: bool,
    child: Option<Child>,
    /// Receives READY=1, and later STOPPING=1: the daemon warns if nobody listens.
    listener: Option<UnixDatagram>,
    had_before: Vec<u32>,
}

/// Resources that a daemon uses.
#[derive(Debug, PartialEq, Eq, Clone)]
pub(crate) struct Footprint {
    /// Threads.
    pub(crate) threads: usize,
    /// Open files by target, up to its first digit.
    pub(crate) fds: BTreeMap<String, usize>,
}

impl Daemon {
    /// Starts a daemon and waits until it is ready.
    pub(crate) fn start(ctx: &Ctx) -> Res<Daemon> {
        Daemon::with(ctx, &[])
    }

    /// Starts a daemon with options of `serve`.
    pub(crate) fn with(ctx: &Ctx, options: &[&str]) -> Res<Daemon> {
        Daemon::begin(ctx, options, true)
    }

    /// Starts a daemon that leaves its devices to the next one on SIGTERM.
    pub(crate) fn leaving(ctx: &Ctx) -> Res<Daemon> {
        Daemon::begin(ctx, &[], false)
    }

    fn begin(ctx: &Ctx, options: &[&str], detach_all: bool) -> Res<Daemon> {
        let mut daemon = Daemon {
            program: ctx.host.program.clone(),
            run_dir: ctx.path("run"),
            notify: ctx.path("notify"),
            log: ctx.path("daemon.log"),
            backend: crate::BACKEND,
            options: options.iter().map(|o| o.to_string()).collect(),
            detach_all,
            child: None,
            listener: None,
            had_before: disk_ids(),
        };
        daemon.restart()?;
        Ok(daemon)
    }

    /// Starts the program on the same run directory; the previous process must have ended.
    pub(crate) fn restart(&mut self) -> Res {
        ensure!(self.child.is_none(), "the daemon runs already");
        // Absent the first time.
        let _ = std::fs::remove_file(&self.notify);
        let socket = UnixDatagram::bind(&self.notify).at("notify socket")?;
        let log = File::options().create(true).append(true).open(&self.log).at(&self.log)?;
        let mut command = Command::new(&self.program);
        let child = tools::localise(&mut command)
            .args(["serve", "--run-dir", &self.run_dir, "--backend", self.backend])
            .args(&self.options)
            .args(self.detach_all.then_some("--detach-all"))
            .env("NOTIFY_SOCKET", &self.notify)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .process_group(0)
            .spawn()
            .at("start the daemon")?;
        tools::remember(child.id());
        self.child = Some(child);
        let ready = self.wait_ready(&socket);
        self.listener = Some(socket);
        ready
    }

    fn wait_ready(&mut self, socket: &UnixDatagram) -> Res {
        socket.set_read_timeout(Some(Duration::from_millis(50)))?;
        let end = Instant::now() + READY;
        let mut message = [0; 512];
        while Instant::now() < end {
            if let Ok(len) = socket.recv(&mut message)
                && String::from_utf8_lossy(&message[..len]).contains("READY=1")
            {
                return Ok(());
            }
            if let Some(child) = &mut self.child
                && let Some(status) = child.try_wait()?
            {
                tools::forget(child.id());
                self.child = None;
                let last = tools::tail(&self.log(), 1);
                fail!("the daemon ended before it was ready: {status}: {last}");
            }
        }
        fail!("the daemon was not ready after {READY:?}");
    }

    /// The next start is with this backend.
    pub(crate) fn set_backend(&mut self, backend: &'static str) {
        self.backend = backend;
    }

    /// A command for this daemon, not yet started.
    pub(crate) fn command(&self, words: &[&str]) -> Command {
        let mut command = self.command_of(&self.program);
        command.args(words);
        command
    }

    /// A command, not yet started, whose children use this daemon.
    pub(crate) fn command_of(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.env("LOOPENGINE_RUN_DIR", &self.run_dir);
        command
    }

    /// Runs a command, which may fail, and waits for its end.
    pub(crate) fn cli(&self, words: &[&str]) -> Res<Done> {
        Running::start(self.command(words))?.finish(COMMAND)
    }

    /// Runs a command that must succeed; returns its output.
    pub(crate) fn ok(&self, words: &[&str]) -> Res<String> {
        Ok(self.cli(words)?.ok()?.out)
    }

    /// Runs a command with --json and parses its output. Unwraps an object with a single field.
    pub(crate) fn json(&self, words: &[&str]) -> Res<Value> {
        let text = self.ok(&[words, &["--json"]].concat())?;
        let value: Value = serde_json::from_str(&text).at(format!("{words:?} --json"))?;
        match &value {
            Value::Object(map) if map.len() == 1 => Ok(map.values().next().cloned().unwrap_or_default()),
            _ => Ok(value),
        }
    }

    /// Attaches an image; returns the path of the device, which can be opened.
    pub(crate) fn attach(&self, words: &[&str]) -> Res<String> {
        let out = self.ok(&[&["attach"], words].concat())?;
        let path = out.trim_end();
        ensure!(
            path.starts_with('/') && out == format!("{path}\n"),
            "attach printed {out:?}, expected only a path"
        );
        ensure!(File::open(path).is_ok(), "attach returned {path} before it could be opened");
        Ok(path.to_string())
    }

    /// Detaches a device; the device and its name must be gone.
    pub(crate) fn detach(&self, device: &str) -> Res {
        let node = disk_name(device)?;
        self.ok(&["detach", device])?;
        ensure!(
            crate::BACKEND == "fuse" || !std::path::Path::new(&format!("/sys/block/{node}")).exists(),
            "{node} still there after detach"
        );
        ensure!(std::fs::symlink_metadata(device).is_err(), "{device} still there after detach");
        Ok(())
    }

    /// The entry of a device in `list --json`.
    pub(crate) fn info(&self, device: &str) -> Res<Value> {
        self.entry("list", device)
    }

    /// The entry of a device in `stats --json`.
    pub(crate) fn stats(&self, device: &str) -> Res<Value> {
        self.entry("stats", device)
    }

    fn entry(&self, command: &str, device: &str) -> Res<Value> {
        let all = self.json(&[command])?;
        let found = all.as_array().and_then(|list| list.iter().find(|entry| entry["path"] == device));
        match found {
            Some(entry) => Ok(entry.clone()),
            None => fail!("{command} does not list {device}: {all}"),
        }
    }

    /// Ids of devices (numbers of files) added since this daemon was created.
    pub(crate) fn ublk_ids(&self) -> Vec<u32> {
        if crate::BACKEND == "fuse" {
            return self.files();
        }
        let mut ids = disk_ids();
        ids.retain(|id| !self.had_before.contains(id));
        ids
    }

    /// Numbers of the files of all instances, as the kernel lists them.
    fn files(&self) -> Vec<u32> {
        let entries = |dir: &std::path::Path| {
            std::fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path())
        };
        let number =
            |path: std::path::PathBuf| path.file_name()?.to_str()?.strip_prefix("loop")?.parse().ok();
        entries(self.run_dir.as_ref()).flat_map(|instance| entries(&instance)).filter_map(number).collect()
    }

    /// Whether the process runs.
    pub(crate) fn alive(&mut self) -> bool {
        matches!(self.child.as_mut().map(Child::try_wait), Some(Ok(None)))
    }

    /// Fails unless the process runs and answers.
    pub(crate) fn check_alive(&mut self) -> Res {
        ensure!(self.alive(), "the daemon is gone");
        self.json(&["list"]).at("the daemon does not answer")?;
        Ok(())
    }

    /// Kills the process with SIGKILL and waits for its end.
    pub(crate) fn kill(&mut self) -> Res {
        let Some(mut child) = self.child.take() else {
            fail!("no daemon to kill");
        };
        ensure!(tools::end(&mut child, Duration::from_secs(30)), "the daemon still runs after SIGKILL");
        Ok(())
    }

    /// Sends SIGTERM, without waiting.
    pub(crate) fn sigterm(&self) -> Res {
        let pid = self.pid()?;
        let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
        kill_process(pid.ok_or("pid")?, Signal::TERM)?;
        Ok(())
    }

    /// Ends the daemon as an init system would: it must exit in time, with status 0. Returns how
    /// long that took.
    pub(crate) fn terminate(&mut self) -> Res<Duration> {
        let since = Instant::now();
        self.sigterm()?;
        self.wait_ended()?;
        Ok(since.elapsed())
    }

    fn wait_ended(&mut self) -> Res {
        let Some(mut child) = self.child.take() else {
            fail!("no daemon to wait for");
        };
        let Some(status) = tools::wait(&mut child, DRAIN) else {
            host::print_stuck();
            tools::end(&mut child, Duration::from_secs(10));
            fail!("the daemon still ran {DRAIN:?} after SIGTERM");
        };
        tools::forget(child.id());
        ensure!(status.success(), "the daemon ended with {status} after SIGTERM");
        Ok(())
    }

    /// Waits for the end after SIGTERM: in time, exit status 0, no device left.
    pub(crate) fn wait_drained(&mut self) -> Res {
        self.wait_ended()?;
        let left = self.ublk_ids();
        ensure!(left.is_empty(), "devices left after SIGTERM: {left:?}");
        let mounts = std::fs::read_to_string("/proc/self/mountinfo")?;
        ensure!(!mounts.contains(&self.run_dir), "mounts left after SIGTERM: {mounts}");
        Ok(())
    }

    /// Ends the daemon; no devices or mounts may be left.
    pub(crate) fn stop(mut self) -> Res {
        self.sigterm()?;
        self.wait_drained()
    }

    /// The pid of the running daemon.
    pub(crate) fn pid(&self) -> Res<u32> {
        match &self.child {
            Some(child) => Ok(child.id()),
            None => fail!("the daemon is not running"),
        }
    }

    /// Threads and open files.
    pub(crate) fn footprint(&self) -> Res<Footprint> {
        let proc = format!("/proc/{}", self.pid()?);
        let mut fds = BTreeMap::new();
        for entry in std::fs::read_dir(format!("{proc}/fd"))?.flatten() {
            // A file that is closed meanwhile does not count.
            if let Ok(target) = std::fs::read_link(entry.path()) {
                let name = target.display().to_string();
                let kind = name.split(|c: char| c.is_ascii_digit()).next();
                *fds.entry(kind.unwrap_or("").to_string()).or_default() += 1;
            }
        }
        let threads = std::fs::read_dir(format!("{proc}/task"))?
            .flatten()
            .filter(|task| {
                let comm = std::fs::read_to_string(task.path().join("comm"));
                // These come and go with the load.
                !comm.is_ok_and(|c| ["iou-wrk", "tokio", "driver call"].iter().any(|of| c.starts_with(of)))
            })
            .count();
        Ok(Footprint { threads, fds })
    }

    /// The footprint once it has been the same for three seconds: the threads of what has ended are
    /// gone.
    pub(crate) fn settled_footprint(&self) -> Res<Footprint> {
        let mut last = self.footprint()?;
        for _ in 0..10 {
            std::thread::sleep(Duration::from_secs(3));
            let now = self.footprint()?;
            if now == last {
                return Ok(now);
            }
            last = now;
        }
        fail!("the footprint still changes: {last:?}")
    }

    /// Checks that it uses the resources that it used before. The connection of a client that has
    /// ended, and a thread that starts for it, are gone a moment later.
    pub(crate) fn footprint_is(&self, before: &Footprint) -> Res {
        let mut after = self.footprint()?;
        tools::until(Duration::from_secs(5), || {
            after = self.footprint().ok()?;
            (after == *before).then_some(())
        });
        ensure!(after == *before, "was {before:?}, is {after:?}");
        Ok(())
    }

    /// Resident memory in KiB.
    pub(crate) fn resident_kib(&self) -> Res<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid()?))?;
        let line = status.lines().find(|l| l.starts_with("VmRSS:"));
        let value = line.and_then(|l| l.split_whitespace().nth(1));
        Ok(value.ok_or("no VmRSS")?.parse()?)
    }

    /// The daemon's log.
    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if self.child.is_some() && !self.detach_all {
            let _ = self.cli(&["detach", "--all", "--force"]);
        }
        self.detach_all = true;
        if self.child.is_none() && !self.ublk_ids().is_empty() && !ending() {
            // Devices outlived a killed daemon, as they should; only a daemon can remove them.
            let _ = self.restart();
        }
        if self.child.is_none() {
            return;
        }
        let drained = self.sigterm().and_then(|()| {
            let child = self.child.as_mut().ok_or("gone")?;
            tools::wait(child, Duration::from_secs(20)).ok_or("still there")?;
            Ok(())
        });
        if let Some(mut child) = self.child.take() {
            if drained.is_ok() {
                tools::forget(child.id());
            } else {
                eprintln!("  the daemon did not stop; killed");
                tools::end(&mut child, Duration::from_secs(10));
            }
        }
    }
}

/// Disks of any owner.
fn disk_ids() -> Vec<u32> {
    if crate::BACKEND == "loop" { host::loop_numbers() } else { host::ublk_ids() }
}

/// The kernel's name of a device, e.g. `ublkb3`.
pub(crate) fn disk_name(device: &str) -> Res<String> {
    let node = std::fs::canonicalize(device).at(device)?;
    let name = node.file_name().map(|n| n.to_string_lossy().into_owned());
    Ok(name.ok_or("no name")?)
}

/// An attribute of a device's queue, e.g. `logical_block_size`.
pub(crate) fn queue_attribute(device: &str, name: &str) -> Res<String> {
    let path = format!("/sys/block/{}/queue/{name}", disk_name(device)?);
    Ok(std::fs::read_to_string(&path).at(&path)?.trim().to_string())
}
