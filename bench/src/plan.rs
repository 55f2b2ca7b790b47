// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Options of a run, and an estimate of its duration.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use clap::Args;

use crate::fio::{self, Length};
use crate::job::{self, JOBS, Job};
use crate::measure::Extras;
use crate::outcome::Mode;
use crate::run::Plan;
use crate::store::DEFAULTS;
use crate::{site, target};

/// Rough seconds of a start of fio and of setting up a target, on hardware and under emulation.
const START_S: (f64, f64) = (0.3, 2.5);
const SET_UP_S: (f64, f64) = (1.0, 6.0);

/// What to measure.
#[derive(Args, Clone, Debug)]
pub struct Choice {
    /// Fewer jobs, shorter rounds, fewer devices: takes minutes
    #[arg(long)]
    pub quick: bool,
    /// Kind of machine; the lab sets it
    #[arg(long, value_enum, default_value = "host", hide = true)]
    pub mode: Mode,
    /// Interleaved rounds; five or more give confidence intervals [default: 7; quick 5; icount 1]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub rounds: Option<u32>,
    /// Duration of a job per round, without its ramp-up of a fifth [default: 1000; quick 500; quick
    /// icount 200]
    #[arg(long, value_name = "MS", value_parser = clap::value_parser!(u32).range(10..=3_600_000))]
    pub run_ms: Option<u32>,
    /// Jobs to run: names of files in fio-jobs/ without .fio [default: all]
    #[arg(long, value_name = "NAME,…", value_delimiter = ',')]
    pub jobs: Vec<String>,
    /// Targets to measure [default: all that can be set up here]
    #[arg(long, value_name = "NAME,…", value_delimiter = ',')]
    pub targets: Vec<String>,
    /// Directory for the images [default: a file system in memory, which needs null_blk]
    #[arg(long, value_name = "DIR")]
    pub images: Option<PathBuf>,
    /// Mount options of the file system in memory
    #[arg(long, value_name = "OPTION,…", default_value = DEFAULTS, conflicts_with = "images")]
    pub store_options: String,
    /// Size of each target's image [default: 96; quick 32]
    #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u32).range(32..=1_048_576))]
    pub image_mb: Option<u32>,
    /// Devices to attach and detach, to measure how long that takes; 0: none [default: 50; quick
    /// 20; icount none]
    #[arg(long, value_name = "N")]
    pub attaches: Option<u32>,
    /// Idle devices, to measure their cost in memory and CPU time; 0: none [default: 1000; quick
    /// 100; icount none]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(0..=4096))]
    pub idle: Option<u32>,
    /// Note for the manifest
    #[arg(long, value_name = "KEY=VALUE", hide = true)]
    pub note: Vec<String>,
    /// Mark a window of each job for `cargo lab profile`
    #[arg(long, hide = true)]
    pub windows: bool,
}

impl Choice {
    /// The plan for these options.
    pub fn plan(&self) -> Result<Plan> {
        let icount = self.mode == Mode::Icount;
        let run_ms = self.run_ms.unwrap_or(match (self.quick, icount) {
            (false, _) => 1000,
            (true, false) => 500,
            (true, true) => 200,
        });
        let note = |text: &String| {
            let (key, value) = text.split_once('=').with_context(|| format!("--note {text:?} has no ="))?;
            Ok((key.to_owned(), value.to_owned()))
        };
        let plan = Plan {
            mode: self.mode,
            // In `icount` every round is the same.
            rounds: self.rounds.unwrap_or(if icount { 1 } else { 7 - 2 * u32::from(self.quick) }),
            length: Length { ramp_ms: run_ms / 5, run_ms },
            jobs: self.jobs()?,
            targets: (!self.targets.is_empty()).then(|| self.targets.clone()),
            images: self.images.clone(),
            store_options: self.store_options.clone(),
            image_mb: self.image_mb.unwrap_or(if self.quick { 32 } else { 96 }),
            extras: Extras {
                attaches: self.attaches.unwrap_or(if icount {
                    0
                } else if self.quick {
                    20
                } else {
                    50
                }),
                present: 100,
                idle: self.idle.unwrap_or(if icount {
                    0
                } else if self.quick {
                    100
                } else {
                    1000
                }),
            },
            notes: self.note.iter().map(note).collect::<Result<BTreeMap<_, _>>>()?,
            windows: self.windows,
        };
        plan.targets()?;
        Ok(plan)
    }

    fn jobs(&self) -> Result<Vec<&'static Job>> {
        if self.jobs.is_empty() {
            let one_cpu = self.mode == Mode::Icount;
            let wanted = |job: &&Job| (job.quick || !self.quick) && !(one_cpu && job.two_cpus);
            return Ok(JOBS.iter().filter(wanted).collect());
        }
        let find = |name: &String| match job::by_name(name) {
            Some(job) => Ok(job),
            None => bail!(
                "there is no job {name:?}; there are: {}",
                JOBS.iter().map(|job| job.name).collect::<Vec<_>>().join(", ")
            ),
        };
        self.jobs.iter().map(find).collect()
    }
}

/// Describes jobs, targets and the duration of a run.
pub fn describe(plan: &Plan) -> Result<String> {
    let targets = plan.targets()?;
    let mut text = format!(
        "{} rounds of {} jobs, {} ms each after a ramp of {} ms\n\njobs\n",
        plan.rounds,
        plan.jobs.len(),
        plan.length.run_ms,
        plan.length.ramp_ms
    );
    for job in &plan.jobs {
        text.push_str(&format!("  {:<22} {}\n", job.name, job.title));
    }
    text.push_str("\ntargets\n");
    let mut able = 0;
    for target in &targets {
        let version = target::check(&**target);
        able += usize::from(version.is_ok());
        text.push_str(&format!("  {:<22} {}\n", target.name(), or_unavailable(version)));
    }
    text.push_str(&format!(
        "\nfio: {}\nimages of {} MiB each: {}\n",
        or_unavailable(fio::version().map(|version| version.to_string())),
        plan.image_mb,
        or_unavailable(site::describe(plan.images.as_deref(), &plan.store_options))
    ));
    if !rustix::process::geteuid().is_root() {
        text.push_str("run it as root: otherwise most targets are unavailable\n");
    }
    text.push_str(&format!("about {} min\n", (seconds(plan, able) / 60.0).ceil()));
    Ok(text)
}

fn or_unavailable(found: Result<String>) -> String {
    found.unwrap_or_else(|error| format!("unavailable: {error:#}"))
}

fn seconds(plan: &Plan, targets: usize) -> f64 {
    let pick = |(host, emulated): (f64, f64)| if plan.mode == Mode::Host { host } else { emulated };
    let length = f64::from(plan.length.ramp_ms + plan.length.run_ms) / 1000.0;
    // A second of `icount` takes several seconds of real time.
    let length = if plan.mode == Mode::Icount { length * 6.0 } else { length };
    let jobs = plan.jobs.len() as f64;
    let round = jobs * (pick(START_S) + targets as f64 * length);
    f64::from(plan.rounds) * round + targets as f64 * pick(SET_UP_S)
}
