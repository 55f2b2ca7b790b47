// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Steps of a long command: each is announced with the time spent so far.
//!
//! Writes to standard output. Knows nothing of what a step does.

use std::fs::File;
use std::io::{Seek, Write};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use loopbench::sh;

/// Steps of one command.
pub(crate) struct Steps {
    start: Instant,
}

impl Steps {
    pub(crate) fn start() -> Steps {
        Steps { start: Instant::now() }
    }

    /// Announces the next step.
    pub(crate) fn begin(&self, name: &str) {
        let mut out = std::io::stdout().lock();
        let _ = writeln!(out, "\n=== {name} ({} s so far)", self.seconds()).and_then(|()| out.flush());
    }

    /// Seconds since the first step began.
    pub(crate) fn seconds(&self) -> u64 {
        self.start.elapsed().as_secs()
    }
}

/// Runs `command` on this terminal, so that its progress is visible; fails unless it succeeds.
pub(crate) fn run(command: &mut Command, limit: Duration) -> Result<()> {
    let name = sh::describe(command);
    let mut child = command.spawn().with_context(|| format!("cannot run {name}"))?;
    let status = sh::wait_for(&name, limit, || Ok(child.try_wait()?)).inspect_err(|_| {
        let _ = child.kill();
        let _ = child.wait();
    })?;
    if !status.success() {
        bail!("{name}: {status}");
    }
    Ok(())
}

/// A command that runs beside other steps, with its output in a file.
pub(crate) struct Beside {
    name: String,
    child: Child,
    output: File,
}

impl Beside {
    pub(crate) fn start(command: &mut Command) -> Result<Beside> {
        let name = sh::describe(command);
        let output = tempfile::tempfile().context("cannot make a temporary file")?;
        let child = command.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output.try_clone()?);
        let child = child.spawn().with_context(|| format!("cannot run {name}"))?;
        Ok(Beside { name, child, output })
    }

    /// Waits for its end and prints its output; fails unless it succeeds.
    pub(crate) fn finish(mut self, limit: Duration) -> Result<()> {
        let child = &mut self.child;
        let status = sh::wait_for(&self.name, limit, || Ok(child.try_wait()?))?;
        self.output.rewind()?;
        std::io::copy(&mut self.output, &mut std::io::stdout().lock())?;
        if !status.success() {
            bail!("{}: {status}", self.name);
        }
        Ok(())
    }
}

impl Drop for Beside {
    fn drop(&mut self) {
        // Of one that has ended, neither does anything.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reports_the_command_that_failed() {
        let limit = Duration::from_secs(10);
        assert!(run(&mut Command::new("true"), limit).is_ok());
        let error = run(Command::new("sh").args(["-c", "exit 3"]), limit).unwrap_err().to_string();
        assert!(error.starts_with("sh -c exit 3: ") && error.contains('3'), "{error}");
    }

    #[test]
    fn a_command_beside_others_fails_at_its_end() {
        let limit = Duration::from_secs(10);
        let start = |script: &str| Beside::start(Command::new("sh").args(["-c", script])).unwrap();
        assert!(start("echo said").finish(limit).is_ok());
        let error = start("exit 3").finish(limit).unwrap_err().to_string();
        assert!(error.contains("exit status: 3"), "{error}");
        let left = start("exec sleep 1000");
        let pid = left.child.id();
        drop(left);
        assert!(!std::path::Path::new(&format!("/proc/{pid}")).exists(), "it still runs");
    }
}
