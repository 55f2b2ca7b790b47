// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The cases of private loop devices are shell scripts under `loopengine run`, since they test
//! unmodified programs.
//!
//! Knows the shell functions of the scripts, and how a script pauses for a check from outside. A
//! script continues after a failed check, so that one run reports all failures.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use crate::daemon::Daemon;
use crate::harness::{At, Ctx, Res, ensure, fail};
use crate::tools::{self, Running};

/// Default timeout of a script.
const SCRIPT: Duration = Duration::from_secs(120);
/// Until a script pauses.
const PAUSE: Duration = Duration::from_secs(90);

/// Shell functions for scripts.
pub(super) const WORDS: &str = r#"
set -u
bad=0
wrong() { echo "wrong: $*" >&2; bad=1; }
# same WHAT GOT WANTED
same() { [ "$2" = "$3" ] || wrong "$1: got '$2', wanted '$3'"; }
# holds WHAT TEXT PART
holds() { [[ $2 == *"$3"* ]] || wrong "$1: no '$3' in '$2'"; }
# works WHAT CMD...: succeeds; prints the output on failure only
works() { local what=$1 said; shift; said=$("$@" 2>&1) || wrong "$what: exit status $?: $said"; }
# refused WHAT TEXT CMD...: fails and says TEXT
refused() {
    local what=$1 text=$2 said; shift 2
    if said=$("$@" 2>&1); then wrong "$what: not refused: '$said'"; else holds "$what" "$said" "$text"; fi
}
# soon WHAT WANTED CMD...: prints WANTED within seconds
soon() {
    local what=$1 wanted=$2 got= i; shift 2
    for i in {1..100}; do got=$("$@" 2>&1); [ "$got" = "$wanted" ] && return; sleep 0.05; done
    wrong "$what: timeout: got '$got', wanted '$wanted'"
}
# The size of a device, and its first bytes.
size() { blockdev --getsize64 "$1"; }
head_of() { dd if="$1" bs="${2:-16}" count=1 2>/dev/null | tr -d '\0'; }
# A file of SIZE bytes that begins with TEXT.
image() { truncate -s "$2" "$1"; printf %s "${3:-}" | dd of="$1" conv=notrunc 2>/dev/null; }
# losetup lists in directory order, as with the kernel's driver.
bound() { losetup -n -O NAME,BACK-FILE --raw | sort; }
# pause NAME: waits until the case calls `resume`.
pause() { : > "$1.there"; local i; for i in {1..1200}; do [ -e "$1.on" ] && return; sleep 0.05; done; }
"#;

/// The environment of a script.
pub(super) struct Inside<'a> {
    ctx: &'a Ctx,
    daemon: &'a Daemon,
    options: Vec<String>,
    uid: Option<u32>,
    cgroup: Option<String>,
    under: Under,
}

#[derive(Clone, Copy)]
enum Under {
    Run,
    Namespace,
    Nothing,
}

impl<'a> Inside<'a> {
    /// As root, with at most eight devices.
    pub(super) fn new(ctx: &'a Ctx, daemon: &'a Daemon) -> Inside<'a> {
        Inside { ctx, daemon, options: Vec::new(), uid: None, cgroup: None, under: Under::Run }
    }

    /// With options of `loopengine run`.
    pub(super) fn with(mut self, options: &[&str]) -> Inside<'a> {
        self.options.extend(options.iter().map(|word| word.to_string()));
        self
    }

    /// As a user who is not root.
    pub(super) fn user(mut self, uid: u32) -> Inside<'a> {
        self.uid = Some(uid);
        self
    }

    /// In this control group, with everything that belongs to the command.
    pub(super) fn cgroup(mut self, dir: &str) -> Inside<'a> {
        self.cgroup = Some(dir.to_owned());
        self
    }

    /// Not under `loopengine run`, but in a mount namespace of its own: without interception.
    pub(super) fn plain(mut self) -> Inside<'a> {
        self.under = Under::Namespace;
        self
    }

    /// An ordinary shell, not under `loopengine run`; `$loopengine` is the program.
    pub(super) fn shell(mut self) -> Inside<'a> {
        self.under = Under::Nothing;
        self
    }

    fn command(&self, script: &str) -> Command {
        let dir = self.ctx.dir.display();
        let backend = crate::BACKEND;
        let script = format!("{WORDS}\nbackend={backend}; cd {dir} || exit 1\n{script}\nexit $bad\n");
        let mut words: Vec<&str> = Vec::new();
        if let Some(dir) = &self.cgroup {
            words.extend(["bash", "-c", "echo $$ > $0/cgroup.procs && exec \"$@\"", dir]);
        }
        let uid = self.uid.map(|uid| uid.to_string()).unwrap_or_default();
        if self.uid.is_some() {
            words.extend(["setpriv", "--reuid", &uid, "--regid", &uid, "--clear-groups", "--"]);
        }
        match self.under {
            Under::Nothing => {}
            Under::Namespace => words.extend(["unshare", "-m", "--"]),
            Under::Run => {
                words.extend([&self.ctx.host.program, "run"]);
                words.extend(self.options.iter().map(String::as_str));
                words.push("--");
            }
        }
        words.extend(["bash", "-c", &script]);
        let mut command = self.daemon.command_of(words[0]);
        command.args(&words[1..]).env("loopengine", &self.ctx.host.program);
        command
    }

    /// Runs a script, all of whose checks must pass. Returns its output.
    pub(super) fn run(&self, script: &str) -> Res<String> {
        self.run_for(SCRIPT, script)
    }

    /// The same, with a timeout.
    pub(super) fn run_for(&self, limit: Duration, script: &str) -> Res<String> {
        self.start(script)?.end(limit)
    }

    /// Starts a script.
    pub(super) fn start(&self, script: &str) -> Res<Script> {
        let running = Running::start(self.command(script))?;
        Ok(Script { running, dir: self.ctx.dir.clone() })
    }
}

/// A running script.
pub(super) struct Script {
    running: Running,
    dir: PathBuf,
}

impl Script {
    /// Waits until it reaches `pause NAME`.
    pub(super) fn wait(self, name: &str) -> Res<Script> {
        self.wait_for(PAUSE, name)
    }

    /// The same, with a timeout.
    pub(super) fn wait_for(mut self, limit: Duration, name: &str) -> Res<Script> {
        let there = self.dir.join(format!("{name}.there"));
        let come = tools::until(limit, || {
            let come = there.exists();
            (come || !self.running.alive()).then_some(come)
        });
        match come {
            Some(true) => Ok(self),
            // Its error output explains more than "ended".
            Some(false) => match self.end(SCRIPT) {
                Ok(out) => fail!("the script ended before '{name}': {out}"),
                Err(error) => Err(error),
            },
            None => fail!("the script did not reach '{name}'"),
        }
    }

    /// Lets it continue after `pause NAME`.
    pub(super) fn resume(&self, name: &str) -> Res {
        std::fs::write(self.dir.join(format!("{name}.on")), "").at("a script's file")
    }

    /// Waits for its end.
    pub(super) fn end(self, limit: Duration) -> Res<String> {
        let done = self.running.finish(limit)?;
        ensure!(done.code == 0, "exit status {}:\n{}", done.code, tools::tail(&done.err, 30));
        Ok(done.out.trim_end().to_string())
    }

    /// Waits until it is killed, at most `limit`.
    pub(super) fn killed(self, limit: Duration) -> Res {
        let done = self.running.finish(limit)?;
        ensure!(
            done.code == 137,
            "not killed, but exit status {}: {}",
            done.code,
            tools::tail(&done.err, 30)
        );
        Ok(())
    }

    /// Kills it with all that it has started.
    pub(super) fn kill(self) {
        drop(self.running);
    }

    /// Waits for its end, with the default timeout.
    pub(super) fn finish(self) -> Res<String> {
        self.end(SCRIPT)
    }
}
