// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Parses fio's report (`--output-format=json+`).
//!
//! Knows fio's fields and units; does not run fio. Unknown fields are ignored, missing ones are 0.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail};
use hdrhistogram::Histogram;
use serde::Deserialize;

use super::{JobTarget, SEPARATOR, latency};
use crate::job::Job;

/// One job on one place.
#[derive(Clone, Debug, PartialEq)]
pub struct Measured {
    pub job: String,
    /// Name of the place.
    pub target: String,
    /// The values, or one line that says why there are none.
    pub outcome: Result<Values, String>,
}

/// Values of a job, for reads, writes and discards together.
#[derive(Clone, Debug, PartialEq)]
pub struct Values {
    /// I/Os per second. A job on small files does one I/O per file: files per second.
    pub iops: f64,
    pub bytes_per_s: f64,
    pub bytes_per_io: f64,
    /// Completion latencies: of the fsync where one follows each I/O, else of all I/Os and fsyncs.
    /// Opening and closing a file are not included.
    pub latency: Histogram<u64>,
    pub p50_ns: u64,
    pub p99_ns: u64,
    /// CPU time of fio per I/O, including kernel time, without io_uring's worker threads.
    pub submitter_ns: f64,
    pub total_ios: u64,
    pub runtime_ms: u64,
}

#[derive(Deserialize)]
struct Entry {
    jobname: String,
    #[serde(default)]
    error: i32,
    /// Milliseconds without the ramp, summed over the processes of a group.
    #[serde(default)]
    job_runtime: f64,
    /// Percentage of that sum.
    #[serde(default)]
    usr_cpu: f64,
    #[serde(default)]
    sys_cpu: f64,
    #[serde(default)]
    read: Side,
    #[serde(default)]
    write: Side,
    #[serde(default)]
    trim: Side,
    #[serde(default)]
    sync: Side,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Side {
    total_ios: u64,
    io_bytes: u64,
    iops: f64,
    bw_bytes: f64,
    /// Milliseconds of the process that ran longest.
    runtime: u64,
    clat_ns: FioLatency,
    /// Time from submission; fio reports nothing else for a sync.
    lat_ns: FioLatency,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct FioLatency {
    bins: BTreeMap<String, u64>,
    percentile: BTreeMap<String, u64>,
}

/// Offset of the report in fio's output: warnings may precede it.
pub(super) fn start(said: &str) -> Option<usize> {
    let mut lines = said.split_inclusive('\n').scan(0, |at, line| {
        let start = *at;
        *at += line.len();
        Some((start, line))
    });
    lines.find(|(_, line)| line.starts_with('{')).map(|(start, _)| start)
}

/// Parses fio's output. Of a truncated report the complete sections count; `complete` adds the
/// missing places.
pub fn parse(said: &str) -> Result<Vec<Measured>> {
    let report = &said[start(said).context("fio printed no report")?..];
    let cut = "fio's report ends in the middle: was fio killed?";
    let (_, after) = report.split_once("\"jobs\"").context(cut)?;
    let (_, mut rest) = after.split_once('[').context(cut)?;
    let mut found = Vec::new();
    loop {
        rest = rest.trim_start_matches(|c: char| c == ',' || c.is_whitespace());
        if rest.starts_with(']') {
            return Ok(found);
        }
        let mut stream = serde_json::Deserializer::from_str(rest).into_iter::<Entry>();
        match stream.next() {
            Some(Ok(entry)) => found.push(measured(&entry)?),
            Some(Err(error)) if error.is_data() => {
                return Err(error).context("fio's report has an unknown format");
            }
            // A truncated number is a syntax error, not an unexpected end.
            _ if found.is_empty() => bail!(cut),
            _ => return Ok(found),
        }
        rest = &rest[stream.byte_offset()..];
    }
}

/// Results of `job` on each of `places`, in order. A place without a report has failed.
pub fn complete(found: &[Measured], job: &Job, places: &[JobTarget]) -> Vec<Measured> {
    let one = |place: &JobTarget| {
        let same = |one: &&Measured| one.job == job.name && one.target == place.name;
        found.iter().find(same).cloned().unwrap_or_else(|| Measured {
            job: job.name.into(),
            target: place.name.clone(),
            outcome: Err("fio's report ends before this job".into()),
        })
    };
    places.iter().map(one).collect()
}

fn measured(entry: &Entry) -> Result<Measured> {
    let (job, target) = entry
        .jobname
        .split_once(SEPARATOR)
        .with_context(|| format!("fio reported an unknown section: {:?}", entry.jobname))?;
    Ok(Measured { job: job.into(), target: target.into(), outcome: values(entry) })
}

fn values(entry: &Entry) -> Result<Values, String> {
    if entry.error != 0 {
        return Err(format!("fio: error {} ({})", entry.error, describe(entry.error)));
    }
    let sides = [&entry.read, &entry.write, &entry.trim];
    let total_ios: u64 = sides.iter().map(|side| side.total_ios).sum();
    let iops: f64 = sides.iter().map(|side| side.iops).sum();
    if total_ios == 0 || iops <= 0.0 {
        return Err("fio completed no I/O in the measured time".into());
    }
    let latency = latencies(entry, total_ios);
    // A report without bins still has percentiles: take those of the most frequent operation.
    let percentile = |percent: f64| match latency.is_empty() {
        false => latency::at(&latency, percent),
        true => sides
            .iter()
            .max_by_key(|side| side.total_ios)
            .and_then(|side| side.clat_ns.percentile.get(&format!("{percent:.6}")).copied())
            .unwrap_or(0),
    };
    let cpu_ns = (entry.usr_cpu + entry.sys_cpu) / 100.0 * entry.job_runtime * 1e6;
    Ok(Values {
        iops,
        bytes_per_s: sides.iter().map(|side| side.bw_bytes).sum(),
        bytes_per_io: sides.iter().map(|side| side.io_bytes).sum::<u64>() as f64 / total_ios as f64,
        p50_ns: percentile(50.0),
        p99_ns: percentile(99.0),
        latency,
        submitter_ns: cpu_ns / total_ios as f64,
        total_ios,
        runtime_ms: sides.iter().map(|side| side.runtime).max().unwrap_or(0),
    })
}

/// See `Values::latency`.
fn latencies(entry: &Entry, total_ios: u64) -> Histogram<u64> {
    let mut all = latency::empty();
    // A caller waits for the fsync. fio does not time write and fsync together, and does not count
    // fdatasync as a sync: only the bins tell.
    let syncs: u64 = entry.sync.lat_ns.bins.values().sum();
    if syncs * 10 < total_ios * 9 {
        for side in [&entry.read, &entry.write, &entry.trim] {
            add(&mut all, &side.clat_ns);
        }
    }
    add(&mut all, &entry.sync.lat_ns);
    all
}

fn add(histogram: &mut Histogram<u64>, latency: &FioLatency) {
    let bins = latency.bins.iter().filter_map(|(value_ns, count)| Some((value_ns.parse().ok()?, *count)));
    latency::record(histogram, bins);
}

/// Name of an error number.
fn describe(error: i32) -> String {
    let text = std::io::Error::from_raw_os_error(error).to_string();
    match text.split_once(" (os error") {
        Some((name, _)) => name.to_owned(),
        None => text,
    }
}
