// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Runs other programs, each with a deadline.
//!
//! Knows processes; knows nothing of loopengine, devices or cases. Records every process until it
//! has been reaped, so that the watchdog can kill it.

use std::fmt::Display;
use std::io::Read;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process_group};

use crate::harness::{At, Res, fail, skip};

/// The default deadline of a program.
pub(crate) const SHORT: Duration = Duration::from_secs(60);

/// The directories of copied programs and libraries, if there are copies.
static LOCAL: OnceLock<(String, String)> = OnceLock::new();

static RUNNING: Mutex<Vec<u32>> = Mutex::new(Vec::new());

/// Results of a process.
#[derive(Clone, Debug)]
pub(crate) struct Done {
    /// Its command line, for messages.
    pub(crate) what: String,
    /// Exit status; a signal counts as 128 + its number.
    pub(crate) code: i32,
    /// Standard output.
    pub(crate) out: String,
    /// Standard error.
    pub(crate) err: String,
}

impl Done {
    /// This result, unless the process failed.
    pub(crate) fn ok(self) -> Res<Done> {
        if self.code != 0 {
            let (out, err) = (tail(&self.out, 12), tail(&self.err, 12));
            fail!("{}: exit status {}: {err}{out}", self.what, self.code);
        }
        Ok(self)
    }
}

/// A process, and threads that read its output.
pub(crate) struct Running {
    what: String,
    child: Child,
    out: Option<JoinHandle<String>>,
    err: Option<JoinHandle<String>>,
    reaped: bool,
}

impl Running {
    /// Starts `command` in a process group of its own.
    pub(crate) fn start(mut command: Command) -> Res<Running> {
        let what = format!("{command:?}").replace('"', "");
        let mut child = localise(&mut command)
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .at(&what)?;
        remember(child.id());
        let out = child.stdout.take().map(reader);
        let err = child.stderr.take().map(reader);
        Ok(Running { what, child, out, err, reaped: false })
    }

    /// Whether it still runs.
    pub(crate) fn alive(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Waits for its end, at most `deadline`; then kills it.
    pub(crate) fn finish(mut self, deadline: Duration) -> Res<Done> {
        let Some(status) = wait(&mut self.child, deadline) else {
            let id = self.child.id();
            let wchan = std::fs::read_to_string(format!("/proc/{id}/wchan")).unwrap_or_default();
            fail!("{}: no end after {deadline:?} (in {wchan})", self.what);
        };
        self.reaped = true;
        forget(self.child.id());
        let text =
            |thread: Option<JoinHandle<String>>| thread.and_then(|t| t.join().ok()).unwrap_or_default();
        Ok(Done {
            what: std::mem::take(&mut self.what),
            code: code(status),
            out: text(self.out.take()),
            err: text(self.err.take()),
        })
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if !self.reaped {
            end(&mut self.child, Duration::from_secs(10));
        }
    }
}

/// Copies programs (of those given by a path, only the libraries) to `dir`, in memory, and uses the
/// copies from now on: on a slow, shared root file system, starting a program takes up to five
/// seconds.
pub(crate) fn copy_to_memory(names: &[&str], dir: &str) -> Res {
    let script = format!(
        "mkdir -p {dir}/bin {dir}/lib
        for name in {names}; do
            file=$(command -v $name) || continue
            case $name in /*) ;; *) cp -L $file {dir}/bin/ ;; esac
            echo $file
        done | xargs -n 1 -P 4 ldd | sed -n 's,^[^/]*\\(/[^ ]*\\.so[^ ]*\\) (.*,\\1,p' | sort -u |
            xargs cp -L -t {dir}/lib",
        names = names.join(" ")
    );
    let words = ["bash", "-euo", "pipefail", "-c", &script];
    run_for(Duration::from_secs(180), &words)?.ok()?;
    // Set once, by the one thread that runs before the first case.
    let _ = LOCAL.set((format!("{dir}/bin"), format!("{dir}/lib")));
    Ok(())
}

/// Makes a command use the copies of the tools.
pub(crate) fn localise(command: &mut Command) -> &mut Command {
    if let Some((programs, libraries)) = LOCAL.get() {
        let path = std::env::var("PATH").unwrap_or_default();
        command.env("PATH", format!("{programs}:{path}")).env("LD_LIBRARY_PATH", libraries);
    }
    command
}

/// Skips the case if root lacks CAP_SYS_RESOURCE, as in some containers: without it, ext4 refuses to
/// grow while it is mounted.
pub(crate) fn needs_sys_resource() -> Res {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:")).unwrap_or_default();
    if u64::from_str_radix(effective.trim(), 16)? >> 24 & 1 == 0 {
        skip!("root lacks CAP_SYS_RESOURCE here, and ext4 needs it to grow while mounted");
    }
    Ok(())
}

/// Runs a program with the default deadline, whatever its exit status.
pub(crate) fn run(words: &[&str]) -> Res<Done> {
    run_for(SHORT, words)
}

/// Runs a program, whatever its exit status.
pub(crate) fn run_for(deadline: Duration, words: &[&str]) -> Res<Done> {
    let mut command = Command::new(words[0]);
    command.args(&words[1..]);
    Running::start(command)?.finish(deadline)
}

/// Runs a program that must succeed; returns its output without the last line feed.
pub(crate) fn ok(words: &[&str]) -> Res<String> {
    Ok(run(words)?.ok()?.out.trim_end().to_string())
}

/// Runs a shell script that must succeed; returns its output without the last line feed.
pub(crate) fn sh(script: impl Display) -> Res<String> {
    ok(&["bash", "-euo", "pipefail", "-c", &script.to_string()])
}

/// Polls `probe` every 10 ms until it returns a value, at most `deadline`.
pub(crate) fn until<T>(deadline: Duration, mut probe: impl FnMut() -> Option<T>) -> Option<T> {
    let end = Instant::now() + deadline;
    loop {
        if let Some(answer) = probe() {
            return Some(answer);
        }
        if Instant::now() >= end {
            return None;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// The last `lines` lines of a text.
pub(crate) fn tail(text: &str, lines: usize) -> String {
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

/// Waits for a child, at most `deadline`.
pub(crate) fn wait(child: &mut Child, deadline: Duration) -> Option<ExitStatus> {
    until(deadline, || child.try_wait().ok().flatten())
}

/// Kills a child with its process group and waits for it, at most `deadline`.
pub(crate) fn end(child: &mut Child, deadline: Duration) -> bool {
    kill_group(child.id());
    let gone = wait(child, deadline).is_some();
    if gone {
        forget(child.id());
    }
    gone
}

/// Records a process for the watchdog.
pub(crate) fn remember(pid: u32) {
    let mut running = RUNNING.lock().unwrap_or_else(PoisonError::into_inner);
    running.push(pid);
}

/// Removes a reaped process from the record.
pub(crate) fn forget(pid: u32) {
    let mut running = RUNNING.lock().unwrap_or_else(PoisonError::into_inner);
    running.retain(|p| *p != pid);
}

/// Processes started here and not yet reaped.
pub(crate) fn running() -> Vec<u32> {
    RUNNING.lock().unwrap_or_else(PoisonError::into_inner).clone()
}

/// Kills every process started here.
pub(crate) fn kill_all() {
    running().into_iter().for_each(kill_group);
}

/// An exit status as a shell has it.
pub(crate) fn code(status: ExitStatus) -> i32 {
    use std::os::unix::process::ExitStatusExt;
    status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
}

fn kill_group(pid: u32) {
    if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
        // It may have ended already.
        let _ = kill_process_group(pid, Signal::KILL);
    }
}

fn reader(mut pipe: impl Read + Send + 'static) -> JoinHandle<String> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        // Keep the output before an error.
        let _ = pipe.read_to_end(&mut bytes);
        String::from_utf8_lossy(&bytes).into_owned()
    })
}
