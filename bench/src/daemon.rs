// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The program under test: a daemon and its devices, through the public command line.
//!
//! Needs `loopengine` on PATH, root and ublk. Dropping the daemon stops it.

use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};

use crate::sh;

/// An emulated CPU starts programs slowly.
const LIMIT: Duration = Duration::from_secs(120);

/// A daemon with its own run directory.
pub struct Daemon {
    child: Child,
    run_dir: PathBuf,
    log: PathBuf,
}

impl Daemon {
    /// Starts a daemon and waits until it answers.
    pub fn start(run_dir: &Path) -> Result<Daemon> {
        Daemon::start_with(run_dir, &[])
    }

    /// Starts a daemon with options of `serve`, and waits until it answers.
    pub fn start_with(run_dir: &Path, options: &[&str]) -> Result<Daemon> {
        // The log is outside the run directory: it must not be on one of the daemon's own devices.
        let log = run_dir.with_extension("log");
        let file = File::create(&log).with_context(|| format!("cannot write {}", log.display()))?;
        let child = command(run_dir, &["serve", "--detach-all"])
            .args(options)
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            // Ctrl-C on a terminal must not reach the daemon while its devices are in use.
            .process_group(0)
            .spawn()
            .context("cannot run loopengine")?;
        let mut daemon = Daemon { child, run_dir: run_dir.to_owned(), log };
        let socket = run_dir.join("control");
        sh::wait_for("loopengine serve", LIMIT, || {
            if let Some(status) = daemon.child.try_wait()? {
                bail!("loopengine serve: {status}: {}", daemon.last_words());
            }
            Ok(socket.exists().then_some(()))
        })?;
        daemon.run(&["list"])?;
        Ok(daemon)
    }

    /// A command line of the subcommand `words`.
    pub fn command(&self, words: &[&str]) -> Command {
        command(&self.run_dir, words)
    }

    /// Runs a subcommand and returns what it printed.
    pub fn run(&self, words: &[&str]) -> Result<String> {
        sh::capture(&mut command(&self.run_dir, words), LIMIT)
    }

    /// Attaches `image` with the options `words` and returns the device.
    pub fn attach(&self, image: &Path, words: &[&str]) -> Result<PathBuf> {
        let mut attach = command(&self.run_dir, &["attach"]);
        let said = sh::capture(attach.args(words).arg(image), LIMIT)?;
        Ok(PathBuf::from(said.trim_end()))
    }

    /// Detaches `device`.
    pub fn detach(&self, device: &Path) -> Result<()> {
        sh::capture(command(&self.run_dir, &["detach"]).arg(device), LIMIT).map(drop)
    }

    /// Path of the control socket.
    pub fn socket(&self) -> PathBuf {
        self.run_dir.join("control")
    }

    /// Process id of the daemon.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Stops the daemon with SIGTERM and waits for it.
    pub fn stop(mut self) -> Result<()> {
        let status = self.end()?;
        if !status.success() {
            bail!("loopengine serve ended with {status}: {}", self.last_words());
        }
        Ok(())
    }

    fn end(&mut self) -> Result<std::process::ExitStatus> {
        if let Some(pid) = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw)
            && self.child.try_wait()?.is_none()
        {
            kill_process(pid, Signal::TERM)?;
        }
        sh::wait_for("loopengine serve to end", LIMIT, || Ok(self.child.try_wait()?))
    }

    fn last_words(&self) -> String {
        sh::last_line(&self.log)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if sh::uninterrupted(|| self.end()).is_err() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

fn command(run_dir: &Path, words: &[&str]) -> Command {
    let mut command = Command::new("loopengine");
    command.args(words).env("LOOPENGINE_RUN_DIR", run_dir);
    command
}

/// Output of `loopengine --version`.
pub fn version() -> Result<String> {
    let said = sh::capture(Command::new(sh::which("loopengine")?).arg("--version"), LIMIT)?;
    Ok(said.trim().to_owned())
}

/// I/O modes that this kernel supports, best first.
pub fn io_modes() -> Result<Vec<String>> {
    #[derive(serde::Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Features {
        io_modes: Vec<String>,
    }
    let said = sh::capture(Command::new("loopengine").args(["features", "--json"]), LIMIT)?;
    let features: Features = serde_json::from_str(&said).context("loopengine features --json")?;
    Ok(features.io_modes)
}

/// Whether this machine can serve block devices: root, and a kernel with ublk.
pub fn can_run_here() -> bool {
    if !rustix::process::geteuid().is_root() {
        return false;
    }
    let control = Path::new("/dev/ublk-control");
    if !control.exists()
        && let Ok(modprobe) = sh::which("modprobe")
    {
        // A missing module is no error here.
        let _ = sh::capture(Command::new(modprobe).args(["-q", "ublk_drv"]), LIMIT);
    }
    control.exists()
}
