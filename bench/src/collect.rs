// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Turns raw files into an outcome: reports of fio become samples, latencies of all rounds are
//! merged.
//!
//! Reads raw files; measures nothing.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};
use hdrhistogram::Histogram;

use crate::cost::Spent;
use crate::fio::{self, Values};
use crate::job;
use crate::outcome::{Cost, Latency, Manifest, Mode, Outcome, SCHEMA, Sample, TargetInfo};
use crate::raw::{self, ATTACH, FACTS, Facts, IDLE, Round, read};

/// The outcome of the result in `dir`, whose raw files may be packed.
pub fn result(dir: &Path) -> Result<Outcome> {
    collect(raw::open(dir)?.path())
}

/// The outcome of the raw files in the directory `raw`.
pub fn collect(raw: &Path) -> Result<Outcome> {
    let facts: Facts = read(raw, FACTS)?
        .with_context(|| format!("{} has no {FACTS}: the run measured nothing", raw.display()))?;
    let mut targets = facts.targets;
    let (mut samples, mut histograms) =
        (Vec::new(), BTreeMap::<(String, String), Vec<Histogram<u64>>>::new());
    for name in raw::round_files(raw)? {
        let Some(one) = read::<Round>(raw, &name)? else { continue };
        for (target, why) in &one.failed {
            give_up(&mut targets, target, &one.job, why);
        }
        for said in &one.fio {
            for measured in fio::parse(&said.to_string()).with_context(|| name.clone())? {
                match measured.outcome {
                    Err(why) => give_up(&mut targets, &measured.target, &measured.job, &why),
                    Ok(values) => {
                        let spent = one.spent.get(&measured.target);
                        // Of files a second, fio times but the write into the page cache.
                        let timed = job::by_name(&measured.job).is_none_or(|job| job.unit.is_none());
                        let latency = |ns: u64| if timed { ns } else { 0 };
                        samples.push(Sample {
                            round: one.round,
                            job: measured.job.clone(),
                            target: measured.target.clone(),
                            iops: values.iops,
                            bytes_per_s: values.bytes_per_s,
                            p50_ns: latency(values.p50_ns),
                            p99_ns: latency(values.p99_ns),
                            cost: cost(&facts.manifest, &measured.job, &values, spent),
                        });
                        if timed {
                            let of = histograms.entry((measured.job, measured.target));
                            of.or_default().push(values.latency);
                        }
                    }
                }
            }
        }
    }
    let latencies = histograms
        .into_iter()
        .map(|((job, target), all)| Latency {
            job,
            target,
            counts: fio::latency::counts(&fio::latency::merge(&all)),
        })
        .collect();
    Ok(Outcome {
        schema: SCHEMA,
        manifest: facts.manifest,
        warnings: facts.warnings,
        targets,
        jobs: facts.jobs,
        samples,
        latencies,
        attach: read(raw, ATTACH)?.unwrap_or_default(),
        idle: read(raw, IDLE)?.unwrap_or_default(),
    })
}

fn give_up(targets: &mut [TargetInfo], target: &str, job: &str, why: &str) {
    if let Some(info) = targets.iter_mut().find(|info| info.name == target) {
        info.unavailable.get_or_insert_with(|| format!("{job}: {why}"));
    }
}

/// What an I/O cost. The server's part was counted during the ramp, too, when fio did not count.
fn cost(manifest: &Manifest, job: &str, values: &Values, spent: Option<&Spent>) -> Cost {
    let ramps = job::by_name(job).is_none_or(|job| job.text.contains("ramp_time"));
    let (run, ramp) = (f64::from(manifest.run_ms), f64::from(manifest.ramp_ms));
    let counted = if ramps && run > 0.0 { run / (run + ramp) } else { 1.0 };
    let each = |sum: u64| sum as f64 * counted / values.total_ios as f64;
    Cost {
        submitter_ns: Some(values.submitter_ns),
        engine_ns: spent.map(|spent| each(spent.cpu_ns)),
        system_ns: (manifest.mode == Mode::Icount).then(|| 1e9 / values.iops),
        switches: spent.map(|spent| each(spent.switches)),
        punts: spent.and_then(|spent| spent.punts).map(each),
    }
}
