//! fio: the job files of `fio-jobs/`, run one after another on several targets in a single start of
//! fio, and what it reports.
//!
//! Knows jobs and targets by name only.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use crate::sh;

/// A job file.
#[derive(Debug)]
pub struct Job {
    /// Its name, that of the file.
    pub name: &'static str,
    /// What it is called in a table.
    pub title: &'static str,
    text: &'static str,
}

macro_rules! job {
    ($name:literal, $title:literal) => {
        Job {
            name: $name,
            title: $title,
            text: include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../fio-jobs/", $name, ".fio")),
        }
    };
}

/// 4K random read, one at a time.
pub const QD1: Job = job!("randread-4k-qd1", "4K random read, depth 1");
/// 4K random read, 32 at a time.
pub const QD32: Job = job!("randread-4k-qd32", "4K random read, depth 32");
/// The same from two processes.
pub const QD32X2: Job = job!("randread-4k-qd32x2", "4K random read, depth 32, 2 jobs");
/// 128K sequential read.
pub const SEQ: Job = job!("read-128k-qd8", "128K sequential read, depth 8");

/// All of them, in the order of a report.
pub const JOBS: [Job; 4] = [QD32, QD1, SEQ, QD32X2];

/// Something to be measured.
#[derive(Clone, Debug)]
pub struct Target {
    /// As the table calls it.
    pub name: String,
    /// File or block device.
    pub path: PathBuf,
}

/// How long a job runs.
#[derive(Clone, Copy, Debug)]
pub struct Length {
    /// Before it counts.
    pub ramp_ms: u32,
    /// While it counts.
    pub run_ms: u32,
}

/// What fio says of one job on one target.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    pub job: String,
    pub target: String,
    /// I/O operations a second.
    pub iops: f64,
    /// Bytes a second.
    pub bandwidth: f64,
    /// Median latency of completion.
    pub p50_ns: u64,
    /// 99th percentile of it.
    pub p99_ns: u64,
}

/// Separates job and target in fio's names.
const SEPARATOR: &str = " @ ";

/// Runs every job on every target, in that order, and returns fio's own JSON.
pub fn run(jobs: &[Job], targets: &[Target], length: Length, directory: &Path) -> Result<String> {
    let file = directory.join("round.fio");
    std::fs::write(&file, sections(jobs, targets, length))?;
    let pairs = (jobs.len() * targets.len()) as u64;
    let seconds = pairs * u64::from(length.ramp_ms + length.run_ms) / 1000;
    // An emulated second may take ten, and a busy machine some more.
    let limit = Duration::from_secs(120 + seconds * 30);
    let said = sh::capture(Command::new("fio").arg("--output-format=json").arg(&file), limit)?;
    // A warning may stand before it.
    let start = said.find('{').context("fio printed no JSON")?;
    Ok(said[start..].to_owned())
}

/// One job file with a section a pair; each waits for the one before it.
fn sections(jobs: &[Job], targets: &[Target], length: Length) -> String {
    let mut text = String::new();
    for job in jobs {
        for target in targets {
            let section = job
                .text
                .replace(&format!("[{}]", job.name), &format!("[{}{SEPARATOR}{}]", job.name, target.name))
                .replace("${FILENAME}", &target.path.to_string_lossy().replace(':', "\\:"))
                .replace("${RAMP}", &format!("{}ms", length.ramp_ms))
                .replace("${RUNTIME}", &format!("{}ms", length.run_ms));
            text.push_str(&section);
            text.push_str("stonewall=1\nnew_group=1\n\n");
        }
    }
    text
}

/// Reads fio's JSON.
pub fn parse(json: &str) -> Result<Vec<Sample>> {
    #[derive(Deserialize)]
    struct Report {
        jobs: Vec<Entry>,
    }
    #[derive(Deserialize)]
    struct Entry {
        jobname: String,
        error: i64,
        read: Side,
    }
    #[derive(Deserialize)]
    struct Side {
        iops: f64,
        bw_bytes: f64,
        clat_ns: Latency,
    }
    #[derive(Deserialize)]
    struct Latency {
        #[serde(default)]
        percentile: std::collections::BTreeMap<String, u64>,
    }
    let report: Report = serde_json::from_str(json).context("fio printed something unknown")?;
    let sample = |entry: Entry| {
        let (job, target) = entry.jobname.split_once(SEPARATOR).context("fio reported an unknown job")?;
        if entry.error != 0 || entry.read.iops <= 0.0 {
            bail!("fio failed on {target}: {job}: error {}", entry.error);
        }
        let percentile = |name: &str| entry.read.clat_ns.percentile.get(name).copied().unwrap_or(0);
        Ok(Sample {
            job: job.to_owned(),
            target: target.to_owned(),
            iops: entry.read.iops,
            bandwidth: entry.read.bw_bytes,
            p50_ns: percentile("50.000000"),
            p99_ns: percentile("99.000000"),
        })
    };
    report.jobs.into_iter().map(sample).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_pair_gets_a_section_of_its_own() {
        let targets = [
            Target { name: "raw file".into(), path: "/s/a:b".into() },
            Target { name: "loop".into(), path: "/dev/loop0".into() },
        ];
        let text = sections(&[QD1, SEQ], &targets, Length { ramp_ms: 100, run_ms: 900 });
        let names: Vec<&str> = text.lines().filter(|line| line.starts_with('[')).collect();
        assert_eq!(
            names,
            [
                "[randread-4k-qd1 @ raw file]",
                "[randread-4k-qd1 @ loop]",
                "[read-128k-qd8 @ raw file]",
                "[read-128k-qd8 @ loop]"
            ]
        );
        assert!(text.contains("filename=/s/a\\:b\n") && text.contains("runtime=900ms\n"));
        assert!(!text.contains('$'), "a variable was left: {text}");
    }

    #[test]
    fn a_report_is_read_and_an_error_in_it_is_one() {
        let entry = |error: i64| {
            format!(
                r#"{{"fio version":"fio-3.33","jobs":[{{"jobname":"randread-4k-qd1 @ raw file","error":{error},
                "read":{{"iops":1234.5,"bw_bytes":5056512,"clat_ns":{{"percentile":{{"50.000000":800,"99.000000":2000}}}}}}}}]}}"#
            )
        };
        let samples = parse(&entry(0)).unwrap();
        assert_eq!(
            (samples[0].target.as_str(), samples[0].p50_ns, samples[0].p99_ns),
            ("raw file", 800, 2000)
        );
        assert!(parse(&entry(5)).is_err());
        assert!(parse("fio: no").is_err());
    }
}
