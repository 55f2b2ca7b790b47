// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a run of `loopbench` found, as it is kept: `result.json`.
//!
//! Pure data, described field by field in `bench/RESULT.md`. Adding a field with a default is
//! compatible; anything else is a new `SCHEMA`. Draws no conclusions: those are `summary`'s.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Version of the format.
pub const SCHEMA: u32 = 1;
/// Its file.
pub const FILE: &str = "result.json";

/// One run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    pub schema: u32,
    pub manifest: Manifest,
    /// What makes the figures less certain, with advice.
    #[serde(default)]
    pub warnings: Vec<Warning>,
    /// In the order of a table; those that could not be set up too.
    pub targets: Vec<TargetInfo>,
    /// In the order of a report.
    pub jobs: Vec<JobInfo>,
    pub samples: Vec<Sample>,
    /// Completion latencies of all rounds together.
    #[serde(default)]
    pub latencies: Vec<Latency>,
    #[serde(default)]
    pub attach: Vec<Attach>,
    #[serde(default)]
    pub idle: Vec<Idle>,
}

/// Everything needed to take the same figures again.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// Day of the run, UTC: 2026-11-22.
    pub date: String,
    /// Release of the kernel that was measured on.
    pub kernel: String,
    pub mode: Mode,
    pub cpus: usize,
    pub host_cpu: String,
    pub fio: String,
    pub rounds: u32,
    /// Length of a job, and of what it runs before that without being counted.
    pub run_ms: u32,
    pub ramp_ms: u32,
    /// What was asked for was measured: no Ctrl-C, no failure.
    pub complete: bool,
    /// Whatever else says what was measured: revision, command, versions of QEMU and others.
    #[serde(default)]
    pub notes: BTreeMap<String, String>,
}

/// What time means.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// One emulated CPU on which an instruction takes 1 ns: IOPS = 10⁹ / instructions an I/O.
    Icount,
    /// Emulated CPUs on a shared machine: only ratios within a round mean something.
    Smp,
    /// The machine itself.
    #[default]
    Host,
}

/// Something that makes figures less certain.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Warning {
    /// What is wrong: "the governor of cpu0 is powersave".
    pub what: String,
    /// What to do about it: "cpupower frequency-set --governor performance".
    pub advice: String,
}

/// Something that was measured, or was to be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TargetInfo {
    /// Its name in samples and tables.
    pub name: String,
    /// What it is, in one line.
    pub about: String,
    /// Version of the program or driver behind it.
    pub version: String,
    /// Why it was not measured, or from some point on not any more.
    #[serde(default)]
    pub unavailable: Option<String>,
}

/// A question, as a job file of fio asks it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobInfo {
    /// Name of the file in `fio-jobs/`, without its ending.
    pub name: String,
    /// As a heading: "4K random read, depth 32".
    pub title: String,
    /// What it isolates, and what bounds it.
    pub question: String,
    /// What an operation is, where it is not an I/O: "file".
    #[serde(default)]
    pub unit: Option<String>,
    /// The target that ratios are to.
    pub reference: String,
    /// I/Os in flight in all, for the plot of throughput against depth; none: not part of it.
    #[serde(default)]
    pub depth: Option<u32>,
}

/// One job on one target in one round.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    pub round: u32,
    pub job: String,
    pub target: String,
    /// Operations a second.
    pub iops: f64,
    /// Bytes a second.
    pub bytes_per_s: f64,
    /// Latency of completion, median and 99th percentile.
    pub p50_ns: u64,
    pub p99_ns: u64,
    #[serde(default)]
    pub cost: Cost,
}

/// What one I/O cost. None: cannot be told.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Cost {
    /// CPU time of fio, the kernel's work for it included.
    pub submitter_ns: Option<f64>,
    /// CPU time of the process that serves the target, its kernel helper threads included.
    pub engine_ns: Option<f64>,
    /// All that the whole system did, idle time included; only in `icount`.
    pub system_ns: Option<f64>,
    /// Context switches of the process that serves the target.
    pub switches: Option<f64>,
    /// Operations that left the fast path for a kernel helper thread, as the engine counts them.
    pub punts: Option<f64>,
}

/// Completion latencies of one job on one target, all rounds together.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Latency {
    pub job: String,
    pub target: String,
    /// Nanoseconds and how often, in order: buckets of a histogram with two significant digits.
    pub counts: Vec<(u64, u64)>,
}

/// Attaching and detaching, a device at a time.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Attach {
    pub target: String,
    /// How it was asked for: "call" (of a client that is connected already) or "command".
    pub how: String,
    /// Devices that were there meanwhile.
    pub present: u32,
    /// From the call until the first block was read from the new device.
    pub attach_ns: Vec<u64>,
    /// Until it was gone.
    pub detach_ns: Vec<u64>,
}

/// A process that serves devices which nobody uses.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Idle {
    pub target: String,
    pub devices: u32,
    /// Proportional set size, with the devices and before.
    pub pss_kib: u64,
    pub pss_kib_before: u64,
    /// CPU time that it took meanwhile, and how long that was.
    pub cpu_ns: u64,
    pub over_ns: u64,
}

impl Mode {
    /// The word of the command line and of result directories.
    pub fn name(self) -> &'static str {
        match self {
            Mode::Icount => "icount",
            Mode::Smp => "smp",
            Mode::Host => "host",
        }
    }
}
