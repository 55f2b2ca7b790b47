// SPDX-License-Identifier: Apache-2.0 OR MIT
//! fio: runs a job file given as text, and returns statistics and errors.
//!
//! Knows fio's job files and its JSON. Knows nothing of loopengine.

use std::process::Command;
use std::time::Duration;

use serde_json::Value;

use crate::harness::{At, Ctx, Res, ensure};
use crate::tools::{Done, Running};

/// A running fio.
pub(crate) struct Fio {
    running: Running,
}

/// Results of fio.
#[derive(Debug, Default)]
pub(crate) struct Report {
    /// Bytes written.
    pub(crate) written: u64,
    /// Bytes read, verification included.
    pub(crate) read: u64,
    /// Sum of the jobs' error numbers.
    pub(crate) errors: u64,
    /// Exit status.
    pub(crate) code: i32,
    /// Its remarks, for messages.
    pub(crate) said: String,
}

/// Starts fio with this job file. Its scratch files stay in the case's directory.
pub(crate) fn start(ctx: &Ctx, jobs: &str) -> Res<Fio> {
    let file = ctx.path("jobs.fio");
    std::fs::write(&file, jobs).at(&file)?;
    let mut command = Command::new("fio");
    command.current_dir(&ctx.dir).args(["--output-format=json", &file]);
    Ok(Fio { running: Running::start(command)? })
}

/// Runs fio, which must succeed.
pub(crate) fn run(ctx: &Ctx, jobs: &str, deadline: Duration) -> Res<Report> {
    start(ctx, jobs)?.finish(deadline)?.clean()
}

impl Fio {
    /// Whether it still runs.
    pub(crate) fn alive(&mut self) -> bool {
        self.running.alive()
    }

    /// Waits for its end; fio may have failed.
    pub(crate) fn finish(self, deadline: Duration) -> Res<Report> {
        parse(self.running.finish(deadline)?)
    }
}

impl Report {
    /// This report, unless fio has failed.
    pub(crate) fn clean(self) -> Res<Report> {
        ensure!(
            self.code == 0 && self.errors == 0,
            "fio: exit status {}, errors {}: {}",
            self.code,
            self.errors,
            self.said
        );
        Ok(self)
    }
}

fn parse(done: Done) -> Res<Report> {
    // fio writes remarks before its JSON.
    let start = done.out.find("\n{").map_or(0, |at| at + 1);
    let (remarks, json) = done.out.split_at(start);
    let value: Value =
        serde_json::from_str(json).at(format!("fio's JSON (status {}, {})", done.code, done.err))?;
    let said: Vec<&str> = remarks.lines().chain(done.err.lines()).take(8).collect();
    let mut report = Report { code: done.code, said: said.join(" | "), ..Report::default() };
    for job in value["jobs"].as_array().into_iter().flatten() {
        report.written += job["write"]["io_bytes"].as_u64().unwrap_or(0);
        report.read += job["read"]["io_bytes"].as_u64().unwrap_or(0);
        report.errors += job["error"].as_u64().unwrap_or(0);
    }
    Ok(report)
}
