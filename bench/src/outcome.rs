// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The result of a run of `loopbench`: `result.json`.
//!
//! Pure data, described field by field in `bench/RESULT.md`. Adding a field with a default is
//! compatible; any other change needs a new `SCHEMA`. `summary` draws the conclusions.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Version of the format.
pub const SCHEMA: u32 = 1;
/// Name of the file.
pub const FILE: &str = "result.json";

/// One run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    pub schema: u32,
    pub manifest: Manifest,
    /// What makes the measurements less certain, with advice.
    #[serde(default)]
    pub warnings: Vec<Warning>,
    /// Targets in the order of a table, including those that could not be set up.
    pub targets: Vec<TargetInfo>,
    /// Jobs in the order of a report.
    pub jobs: Vec<JobInfo>,
    pub samples: Vec<Sample>,
    /// Completion latencies, all rounds merged.
    #[serde(default)]
    pub latencies: Vec<Latency>,
    #[serde(default)]
    pub attach: Vec<Attach>,
    #[serde(default)]
    pub idle: Vec<Idle>,
}

/// Everything needed to repeat the run.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// Day of the run, UTC: 2026-11-22.
    pub date: String,
    /// Release of the kernel.
    pub kernel: String,
    pub mode: Mode,
    pub cpus: usize,
    pub host_cpu: String,
    pub fio: String,
    pub rounds: u32,
    /// Length of a job, and of its ramp, which is not measured.
    pub run_ms: u32,
    pub ramp_ms: u32,
    /// The run was neither interrupted nor failed.
    pub complete: bool,
    /// More facts: revision, command, versions of QEMU and others.
    #[serde(default)]
    pub notes: BTreeMap<String, String>,
}

/// The kind of machine, and what its time means.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// One emulated CPU on which an instruction takes 1 ns: IOPS = 10⁹ / instructions per I/O.
    Icount,
    /// Emulated CPUs on a shared machine: only ratios within a round are meaningful.
    Smp,
    /// The machine itself, without emulation.
    #[default]
    Host,
}

/// Something that makes measurements less certain.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Warning {
    /// What is wrong: "the governor of cpu0 is powersave".
    pub what: String,
    /// What to do about it: "cpupower frequency-set --governor performance".
    pub advice: String,
}

/// A target of the run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TargetInfo {
    /// Name in samples and tables.
    pub name: String,
    /// Description in one line.
    pub about: String,
    /// Version of the program or driver behind it.
    pub version: String,
    /// Why it was not measured, or not to the end.
    #[serde(default)]
    pub unavailable: Option<String>,
}

/// A job.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobInfo {
    /// Name of the file in `fio-jobs/`, without its ending.
    pub name: String,
    /// Title: "4K random read, depth 32".
    pub title: String,
    /// What the job isolates, and what bounds it.
    pub question: String,
    /// Unit of an operation, if it is not an I/O: "file".
    #[serde(default)]
    pub unit: Option<String>,
    /// Reference target of the ratios.
    pub reference: String,
    /// Total I/Os in flight, if the job belongs to the plot of throughput against depth.
    #[serde(default)]
    pub depth: Option<u32>,
}

/// One job on one target in one round.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    pub round: u32,
    pub job: String,
    pub target: String,
    /// Operations per second.
    pub iops: f64,
    /// Bytes per second.
    pub bytes_per_s: f64,
    /// Completion latency: median and 99th percentile.
    pub p50_ns: u64,
    pub p99_ns: u64,
    #[serde(default)]
    pub cost: Cost,
}

/// Cost of one operation; `None` where it is unknown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Cost {
    /// CPU time of fio, including kernel time.
    pub submitter_ns: Option<f64>,
    /// CPU time of the process that serves the target, including io_uring's worker threads.
    pub engine_ns: Option<f64>,
    /// Time of the whole system, idle time included; only in `icount`.
    pub system_ns: Option<f64>,
    /// Context switches of the process that serves the target.
    pub switches: Option<f64>,
    /// Requests that went to a kernel worker thread, from the engine's statistics.
    pub punts: Option<f64>,
}

/// Completion latencies of one job on one target, all rounds merged.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Latency {
    pub job: String,
    pub target: String,
    /// Nanoseconds and counts, ascending: buckets with two significant digits.
    pub counts: Vec<(u64, u64)>,
}

/// Times of attaching and detaching one device.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Attach {
    pub target: String,
    /// "call" (of a connected client) or "command" (a program per call).
    pub how: String,
    /// Devices that existed meanwhile.
    pub present: u32,
    /// From the call until the first block is read from the new device.
    pub attach_ns: Vec<u64>,
    /// From the call until it returns.
    pub detach_ns: Vec<u64>,
}

/// A process that serves idle devices.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Idle {
    pub target: String,
    pub devices: u32,
    /// Proportional set size, with and without the devices.
    pub pss_kib: u64,
    pub pss_kib_before: u64,
    /// CPU time, and the time over which it was measured.
    pub cpu_ns: u64,
    pub over_ns: u64,
}

impl Mode {
    /// Name on the command line and in names of result directories.
    pub fn name(self) -> &'static str {
        match self {
            Mode::Icount => "icount",
            Mode::Smp => "smp",
            Mode::Host => "host",
        }
    }
}
