// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Small Debian systems in directories, in which packages are built and tried out.
//!
//! A command in such a system has its own mount and PID namespaces: its mounts and processes end
//! with it, and of this machine it sees /proc and what the caller names. Knows debootstrap and
//! chroot, not packages of loopengine. Needs root.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use loopbench::sh;

use crate::{cache, kernel, setup};

/// The oldest supported Debian: a program that is built there runs on all later ones.
pub(crate) const OLDEST: &str = "bookworm";
/// Debian's releases on which packages are tried out.
pub(crate) const SUITES: [&str; 2] = [OLDEST, "trixie"];

/// Directory of the systems. The number changes with the way they are made.
const HOME: &str = "debian-1";
const LIMIT: Duration = Duration::from_secs(1800);

/// A Debian system in a directory.
pub(crate) struct DebianRoot {
    path: PathBuf,
    /// Removes a copy.
    _copy: Option<tempfile::TempDir>,
}

impl DebianRoot {
    /// The system `name` of `suite` with `packages` beside the essential ones; made once, and kept
    /// in the lab's cache. Change the name with the packages.
    pub(crate) fn ensure(name: &str, suite: &str, packages: &[&str]) -> Result<DebianRoot> {
        if !rustix::process::geteuid().is_root() {
            bail!("cannot make a Debian system as a plain user: run the command as root");
        }
        let cache = cache::directory()?;
        let home = cache.join(HOME);
        let path = home.join(name);
        if path.exists() {
            return Ok(DebianRoot { path, _copy: None });
        }
        // debootstrap itself cannot configure packages that depend on each other.
        let base = if packages.is_empty() { None } else { Some(DebianRoot::ensure(suite, suite, &[])?) };
        setup::require(&[("debootstrap", "Debian systems in which packages are built and tried out")])?;
        let _turn = cache::lock(&cache)?;
        if !path.exists() {
            eprintln!("setup: making a system of Debian {suite} in {}", path.display());
            std::fs::create_dir_all(&home)?;
            let fresh = match base {
                Some(base) => base.copy()?,
                None => debootstrap(suite, &home)?,
            };
            if !packages.is_empty() {
                let list = sh::quote(packages);
                fresh.run(&format!(
                    "apt-get -qq update && apt-get -qq install --yes --no-install-recommends {list}"
                ))?;
            }
            fresh.run("apt-get clean")?;
            // Last and atomically: this directory marks a complete system.
            std::fs::rename(&fresh.path, &path)?;
        }
        Ok(DebianRoot { path, _copy: None })
    }

    /// A copy that is removed when it is dropped.
    pub(crate) fn copy(&self) -> Result<DebianRoot> {
        let home = self.path.parent().context("the system has no parent directory")?;
        let copy = tempfile::Builder::new().prefix("copy-").tempdir_in(home)?;
        let path = copy.path().join("root");
        sh::capture(
            Command::new("cp").args(["--archive", "--reflink=auto"]).arg(&self.path).arg(&path),
            LIMIT,
        )?;
        Ok(DebianRoot { path, _copy: Some(copy) })
    }

    /// Where `inside` is on this machine.
    pub(crate) fn at(&self, inside: &str) -> PathBuf {
        self.path.join(inside.trim_start_matches('/'))
    }

    /// Runs `line` with the shell of the system. `binds`: directories of this machine, and where the
    /// command sees them.
    pub(crate) fn shell(&self, binds: &[(&Path, &str)], line: &str) -> Command {
        let mut script = String::from("set -e\n");
        let proc = (Path::new("/proc"), "/proc");
        for (from, to) in std::iter::once(&proc).chain(binds) {
            let at = self.at(to);
            let (from, at) = (from.to_string_lossy(), at.to_string_lossy());
            script.push_str(&sh::quote(&["mkdir", "-p", &at]));
            script.push('\n');
            // A new /proc, for the new PID namespace.
            script.push_str(&match *to {
                "/proc" => sh::quote(&["mount", "-t", "proc", "proc", &at]),
                _ => sh::quote(&["mount", "--bind", &from, &at]),
            });
            script.push('\n');
        }
        let root = self.path.to_string_lossy();
        script.push_str("exec ");
        script.push_str(&sh::quote(&[
            "chroot",
            &root,
            "/usr/bin/env",
            "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME=/root",
            "LC_ALL=C.UTF-8",
            "DEBIAN_FRONTEND=noninteractive",
            "sh",
            "-ec",
            line,
        ]));
        let mut command = Command::new("unshare");
        command.args(["--mount", "--pid", "--fork", "--kill-child", "sh", "-c", &script]);
        // Only what a proxy needs: variables of cargo and of this machine's user mean nothing there.
        command.env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
        for variable in ["http_proxy", "https_proxy", "no_proxy"] {
            if let Some(value) = std::env::var_os(variable) {
                command.env(variable, value);
            }
        }
        command
    }

    /// Runs `line` in the system and returns its output.
    pub(crate) fn run(&self, line: &str) -> Result<String> {
        sh::capture(&mut self.shell(&[], line), LIMIT)
    }
}

/// Makes a system of `suite` in a new directory below `home`.
fn debootstrap(suite: &str, home: &Path) -> Result<DebianRoot> {
    let work = tempfile::Builder::new().prefix("new-").tempdir_in(home)?;
    let path = work.path().join("root");
    let mut command = Command::new(sh::which("debootstrap")?);
    command.args(["--variant=minbase", "--keyring", kernel::KEYRING, suite]);
    sh::capture(command.arg(&path).arg(kernel::debian_mirror()?), LIMIT)?;
    Ok(DebianRoot { path, _copy: Some(work) })
}
