// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Runs a job file of `fio-jobs/` on several places, one after another, in one start of fio.
//! Starting fio takes seconds on an emulated CPU, so it starts once per job.
//!
//! Knows places by name and path only. `report` reads fio's output, `latency` keeps latencies.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::job::{Job, MANY, Needs};
use crate::sh;

pub mod latency;
#[cfg(test)]
mod recorded;
mod report;
mod version;

pub use report::{Measured, Values, complete, parse};
pub use version::{Version, version};

/// A place to run a job on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JobTarget {
    /// Name in tables.
    pub name: String,
    /// A file, a block device or the directory of a mounted file system, depending on the job.
    pub path: PathBuf,
    /// Files or devices, for a job that needs many.
    pub many: Vec<PathBuf>,
}

impl JobTarget {
    /// A place with a single path.
    pub fn new(name: impl Into<String>, path: impl Into<PathBuf>) -> JobTarget {
        JobTarget { name: name.into(), path: path.into(), many: Vec::new() }
    }
}

/// Length of a job, unless it is a fixed amount of work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Length {
    /// Time before fio starts to measure.
    pub ramp_ms: u32,
    /// Time that fio measures.
    pub run_ms: u32,
}

/// Separates job and place in the names of fio's sections.
const SEPARATOR: &str = " @ ";

/// Runs `job` on each place in order and returns fio's JSON, for `parse` and `complete`. If the job
/// fails on one place, it still runs on the others.
pub fn run(job: &Job, places: &[JobTarget], length: Length, directory: &Path) -> Result<String> {
    let file = directory.join(format!("{}.fio", job.name));
    std::fs::write(&file, sections(job, places, length)?)
        .with_context(|| format!("cannot write {}", file.display()))?;
    let mut fio = Command::new("fio");
    fio.arg("--output-format=json+").arg(&file);
    let name = sh::describe(&fio);
    said(&name, &sh::output(&mut fio, limit(job, places.len(), length))?)
}

/// Output of fio, if it contains a report, whatever the exit status.
fn said(name: &str, output: &Output) -> Result<String> {
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    if report::start(&said).is_none() {
        let errors = String::from_utf8_lossy(&output.stderr);
        let last = errors.lines().chain(said.lines()).rev().map(str::trim).find(|line| !line.is_empty());
        bail!("{name}: {}: {}", output.status, last.unwrap_or("no output"));
    }
    Ok(said)
}

/// An emulated second may take ten seconds, more on a busy machine.
fn limit(job: &Job, places: usize, length: Length) -> Duration {
    let timed_s = (u64::from(length.ramp_ms) + u64::from(length.run_ms)).div_ceil(1000) * 30;
    // A fixed amount of work takes seconds; some jobs write their files first.
    let fixed_s = if job.needs == Needs::Mount { 120 } else { 10 };
    Duration::from_secs(120 + places as u64 * (timed_s + fixed_s))
}

/// A job file with one section per place; each section waits for the previous one.
fn sections(job: &Job, places: &[JobTarget], length: Length) -> Result<String> {
    let mut text = String::new();
    for place in places {
        // Variables of a job file come from the environment. Here they differ between sections.
        let section = job
            .text
            .replace(&format!("[{}]", job.name), &format!("[{}{SEPARATOR}{}]", job.name, place.name))
            .replace("${FILENAMES}", &many(job, place)?)
            .replace("${FILENAME}", &escaped(&place.path))
            .replace("${DIRECTORY}", &escaped(&place.path))
            .replace("${RAMP}", &format!("{}ms", length.ramp_ms))
            .replace("${RUNTIME}", &format!("{}ms", length.run_ms));
        text.push_str(&section);
        text.push_str("stonewall=1\nnew_group=1\n\n");
    }
    Ok(text)
}

/// Paths of a job that uses many devices at once.
fn many(job: &Job, place: &JobTarget) -> Result<String> {
    if job.needs != Needs::Many {
        return Ok(String::new());
    }
    let Some(paths) = place.many.get(..MANY) else {
        bail!("{} needs {MANY} files or devices, {} has {}", job.name, place.name, place.many.len());
    };
    let paths: Vec<String> = paths.iter().map(|path| escaped(path)).collect();
    Ok(paths.join(":"))
}

/// A path in fio's syntax: a colon separates paths, so it is escaped.
fn escaped(path: &Path) -> String {
    path.to_string_lossy().replace(':', "\\:")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::{QD1, by_name};

    const LENGTH: Length = Length { ramp_ms: 100, run_ms: 900 };

    #[test]
    fn every_target_path_gets_its_own_section() {
        let places = [JobTarget::new("raw file", "/s/a:b"), JobTarget::new("loop", "/dev/loop0")];
        let text = sections(&QD1, &places, LENGTH).unwrap();
        let names: Vec<&str> = text.lines().filter(|line| line.starts_with('[')).collect();
        assert_eq!(names, ["[randread-4k-qd1 @ raw file]", "[randread-4k-qd1 @ loop]"]);
        assert!(text.contains("filename=/s/a\\:b\n") && text.contains("runtime=900ms\n"));
        assert!(!text.contains('$'), "a variable was left: {text}");
        assert_eq!(text.matches("stonewall=1\nnew_group=1\n").count(), 2);
    }

    #[test]
    fn a_mount_is_a_directory() {
        let text =
            sections(by_name("database-8k").unwrap(), &[JobTarget::new("ext4", "/mnt")], LENGTH).unwrap();
        assert!(text.contains("directory=/mnt\n") && !text.contains("${"), "{text}");
    }

    #[test]
    fn requires_sixteen_devices_and_names_the_target() {
        let job = by_name("many-16-4k").unwrap();
        let mut place = JobTarget::new("loop", "/dev/loop0");
        place.many = (0..15).map(|n| format!("/dev/loop{n}").into()).collect();
        let error = sections(job, &[place.clone()], LENGTH).unwrap_err().to_string();
        assert_eq!(error, "many-16-4k needs 16 files or devices, loop has 15");
        place.many.extend(["/a:b".into(), "/never".into()]);
        let text = sections(job, &[place], LENGTH).unwrap();
        assert!(text.contains("filename=/dev/loop0:/dev/loop1:") && text.contains(":/a\\:b\n"), "{text}");
    }

    #[test]
    fn a_failed_start_reports_the_last_line_of_output() {
        let output = |stdout: &str, stderr: &str| Output {
            status: std::os::unix::process::ExitStatusExt::from_raw(1 << 8),
            stdout: stdout.into(),
            stderr: stderr.into(),
        };
        let error = said("fio x", &output("", "first\nBad option <numjob=1>\n\n")).unwrap_err().to_string();
        assert!(error.ends_with("Bad option <numjob=1>") && error.starts_with("fio x"), "{error}");
        assert!(said("fio x", &output("fio: pid=1, err=5\n{\n  \"jobs\" : []\n}\n", "")).is_ok());
    }
}
