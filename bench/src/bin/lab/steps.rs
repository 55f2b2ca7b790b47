// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Steps of a long command: each is announced with the time spent so far.
//!
//! Writes to standard output. Knows nothing of what a step does.

use std::io::Write;
use std::process::Command;
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
}
