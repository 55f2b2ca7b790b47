// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The table of hostile kinds, and the parts that they share: users, process groups, and output.
//! What a kind does is in the file of its family.

use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};

use loopbench::sh;

use super::wire::Peer;
use super::{descriptors, guest, host, messages, tenants};

/// A kind of hostile clients.
pub(super) struct Kind {
    pub(super) name: &'static str,
    /// Number of clients at a time, each with its own user.
    pub(super) users: u32,
    pub(super) place: Place,
    act: fn(&mut Scene) -> Result<()>,
}

/// Where a client of a kind runs.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    /// As a plain user.
    Plain,
    /// As a plain user that is root of a user and mount namespace.
    Namespace,
    /// As a plain user under `loopengine run`.
    Run,
    /// As root in a mount namespace: it stands for hardware, or for a careless administrator.
    Root,
}

const fn kind(name: &'static str, users: u32, place: Place, act: fn(&mut Scene) -> Result<()>) -> Kind {
    Kind { name, users, place, act }
}

/// All kinds.
pub(super) const KINDS: &[Kind] = &[
    kind("silent", 3, Place::Plain, messages::silent),
    kind("slow", 3, Place::Plain, messages::slow),
    kind("huge", 3, Place::Plain, messages::huge),
    kind("garbage", 3, Place::Plain, messages::garbage),
    kind("pipelined", 3, Place::Plain, messages::pipelined),
    kind("storm", 16, Place::Plain, messages::storm),
    kind("crowd", 16, Place::Plain, messages::crowd),
    kind("descriptor-flood", 3, Place::Plain, descriptors::flood),
    kind("refused-descriptors", 3, Place::Plain, descriptors::refused),
    kind("strange-descriptors", 3, Place::Plain, descriptors::strange),
    kind("hung-close", 1, Place::Namespace, descriptors::hung_close),
    kind("linger", 2, Place::Plain, descriptors::linger),
    kind("cycle", 2, Place::Plain, descriptors::cycle),
    kind("supervise", 2, Place::Plain, descriptors::supervise),
    kind("pools", 3, Place::Plain, tenants::pools),
    kind("killed-runs", 2, Place::Plain, tenants::killed),
    kind("stopped", 2, Place::Plain, tenants::stopped),
    kind("losetup-storm", 2, Place::Run, tenants::losetup_storm),
    kind("bad-pointers", 2, Place::Run, tenants::bad_pointers),
    kind("image-changes", 2, Place::Run, tenants::image_changes),
    kind("mount-storm", 2, Place::Run, tenants::mount_storm),
    kind("hung-image", 1, Place::Root, host::hung_image),
    kind("full-disk", 1, Place::Root, host::full_disk),
    kind("fifo-config", 1, Place::Root, host::fifo_config),
];

/// Names for the command line.
pub(super) fn names() -> Vec<&'static str> {
    KINDS.iter().map(|kind| kind.name).collect()
}

/// The child of a client of kinds that need two processes.
const INNER: &str = "LAB_HOSTILE_INNER";

/// The environment of a hostile client.
pub(super) struct Scene {
    pub(super) random: fastrand::Rng,
    pub(super) uid: u32,
    pub(super) home: PathBuf,
    /// The daemon's sockets.
    pub(super) private: PathBuf,
    pub(super) control: PathBuf,
    /// Whether this is the child of such a client.
    pub(super) inner: bool,
    words: [String; 6],
}

/// Timeout of reads and writes of hostile clients.
const PATIENCE: Duration = Duration::from_secs(1);
/// Time limit of programs that hostile clients start.
const PROGRAM: Duration = Duration::from_secs(20);

impl Scene {
    /// Prints what the client is about to do: shown if a call of a well-behaved client is late.
    pub(super) fn say(&self, what: impl AsRef<str>) {
        let mut out = std::io::stdout().lock();
        // The reader may have ended.
        let _ = writeln!(out, "{}", what.as_ref()).and_then(|()| out.flush());
    }

    /// Sleeps for at most `most` milliseconds.
    pub(super) fn rest(&mut self, most: u64) {
        std::thread::sleep(Duration::from_millis(self.random.u64(..=most)));
    }

    /// Connects to the private socket; retries while the daemon refuses.
    pub(super) fn connect(&mut self) -> Peer {
        loop {
            if let Ok(peer) = Peer::new(&self.private, PATIENCE) {
                return peer;
            }
            self.rest(100);
        }
    }

    /// Runs the program `words` in the client's home; returns whether it succeeded.
    pub(super) fn works(&self, words: &[&str]) -> bool {
        let mut command = Command::new(words[0]);
        let output = sh::output(command.args(&words[1..]).current_dir(&self.home), PROGRAM);
        output.is_ok_and(|output| output.status.success())
    }

    /// The same, with the program's output.
    pub(super) fn output(&self, words: &[&str]) -> String {
        let mut command = Command::new(words[0]);
        let output = sh::output(command.args(&words[1..]).current_dir(&self.home), PROGRAM);
        output.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned()).unwrap_or_default()
    }

    /// Starts `loopengine run` with `words` as the client's user, in its own process group if
    /// `apart`.
    pub(super) fn start_run(&self, words: &[&str], apart: bool) -> Result<Child> {
        let mut command = Command::new("loopengine");
        command.arg("run").args(words).current_dir(&self.home).stdin(Stdio::null());
        command.stdout(Stdio::null()).stderr(Stdio::null());
        if rustix::process::geteuid().is_root() {
            command.uid(self.uid).gid(self.uid);
        }
        if apart {
            command.process_group(0);
        }
        command.spawn().context("cannot start loopengine run")
    }

    /// Starts the child of this client, which does the second part of its kind.
    pub(super) fn start_inner(&self) -> Result<Child> {
        let mut command = Command::new("lab");
        command.args(&self.words).env(INNER, "1").stdin(Stdio::null());
        command.spawn().context("cannot start the child of a client")
    }
}

/// Runs a hostile client until it is killed.
pub(super) fn run(name: &str, seed: u64, uid: u32) -> Result<()> {
    let kind = KINDS.iter().find(|kind| kind.name == name).context("no such kind")?;
    let words = ["hostile-guest", "client", name, "--seed", &seed.to_string(), &format!("--uid={uid}")];
    let mut scene = Scene {
        random: fastrand::Rng::with_seed(seed),
        uid,
        home: guest::home(uid),
        private: guest::run_dir().join("private"),
        control: guest::run_dir().join("control"),
        inner: std::env::var_os(INNER).is_some(),
        words: words.map(str::to_owned),
    };
    std::env::set_current_dir(&scene.home)?;
    (kind.act)(&mut scene)
}
