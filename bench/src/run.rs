// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A run: interleaved rounds of jobs over targets; writes raw files.
//!
//! Each round runs every job once, and each job runs on every target, one after another, in one
//! start of fio. So a ratio compares measurements that are close in time. Each measurement is
//! written at once: Ctrl-C loses only the job that it interrupts, and `--resume` continues there.
//! Draws no conclusions.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::cost::Reading;
use crate::fio::{self, Length};
use crate::job::{Job, Needs};
use crate::measure::{self, Extras};
use crate::outcome::{Manifest, Mode};
use crate::progress::Progress;
use crate::raw::{self, FACTS, Facts, Round};
use crate::site::{Set, Site};
use crate::target::{self, Kind, MANY, Target};
use crate::{check, sh, site, window};

/// What to measure.
#[derive(Clone, Debug)]
pub struct Plan {
    pub mode: Mode,
    pub rounds: u32,
    pub length: Length,
    pub jobs: Vec<&'static Job>,
    /// Names of targets; `None` means all.
    pub targets: Option<Vec<String>>,
    /// Directory for the images; `None` means a file system in memory.
    pub images: Option<PathBuf>,
    /// Its mount options.
    pub store_options: String,
    pub image_mb: u32,
    pub extras: Extras,
    /// Notes for the manifest.
    pub notes: BTreeMap<String, String>,
    /// Mark a window of each job for a profile.
    pub windows: bool,
}

/// Size of each device of a job that needs many, in MiB.
const MANY_MB: u32 = 4;

impl Plan {
    /// Targets of the plan in the order of a table.
    pub fn targets(&self) -> Result<Vec<Box<dyn Target>>> {
        let mut targets = target::all();
        let Some(names) = &self.targets else { return Ok(targets) };
        if let Some(unknown) = names.iter().find(|name| !targets.iter().any(|target| target.name() == **name))
        {
            let known: Vec<String> = targets.iter().map(|target| target.name()).collect();
            bail!("there is no target {unknown:?}; there are: {}", known.join(", "));
        }
        targets.retain(|target| names.contains(&target.name()));
        Ok(targets)
    }

    fn needs(&self, needs: Needs) -> bool {
        self.jobs.iter().any(|job| job.needs == needs)
    }
}

/// Whether `job` can run on the target.
fn fits(job: &Job, set: &Set) -> bool {
    let Some(opened) = &set.opened else { return false };
    match job.needs {
        Needs::Data => opened.kind != Kind::Mount,
        Needs::Block => opened.kind == Kind::Block,
        Needs::Many => opened.many.len() == MANY,
        Needs::Mount => opened.kind == Kind::Mount,
    }
}

/// Measures `plan` and writes raw files to `out`; with `resume`, only those that are missing.
///
/// Returns whether the run is complete: an interruption is no error.
pub fn run(plan: &Plan, out: &Path, resume: bool) -> Result<bool> {
    fs::create_dir_all(out).with_context(|| format!("cannot make {}", out.display()))?;
    let version = fio::version()?;
    let mut warnings = check::machine(plan.mode);
    let many_mb = if plan.needs(Needs::Many) { MANY_MB } else { 0 };
    let site = Site::new(plan.images.as_deref(), &plan.store_options, plan.image_mb, many_mb)?;
    let mut sets = Vec::new();
    for target in plan.targets()? {
        let (set, more) = Set::up(target, &site.place)?;
        match &set.info.unavailable {
            None => println!("target {}: {}", set.info.name, set.info.version),
            Some(why) => println!("target {}: unavailable: {why}", set.info.name),
        }
        warnings.extend(more);
        sets.push(set);
    }
    for warning in &warnings {
        println!("warning: {}: {}", warning.what, warning.advice);
    }
    let mut facts = Facts {
        manifest: manifest(plan, version.to_string())?,
        warnings,
        targets: sets.iter().map(|set| set.info.clone()).collect(),
        jobs: plan.jobs.iter().map(|job| job.info()).collect(),
    };
    if resume {
        same_run(&facts, out)?;
    }
    raw::write(out, FACTS, &facts)?;
    let measured = rounds(plan, &mut sets, &site, out);
    // Targets are torn down first: the extras make their own devices.
    sets.clear();
    let measured = measured.and_then(|()| measure::run(&plan.extras, &site, out));
    if plan.windows {
        window::send_symbols(out)?;
    }
    let complete = match measured {
        Ok(()) => true,
        Err(_) if sh::interrupted().is_err() => false,
        Err(error) => return Err(error),
    };
    facts.manifest.complete = complete;
    raw::write(out, FACTS, &facts)?;
    Ok(complete)
}

fn rounds(plan: &Plan, sets: &mut [Set], site: &Site, out: &Path) -> Result<()> {
    let (able, unable): (Vec<&Job>, Vec<&Job>) =
        plan.jobs.iter().partition(|job| sets.iter().any(|set| fits(job, set)));
    for job in unable {
        println!("job {}: no target can run it", job.name);
    }
    let mut steps: Vec<(u32, &Job)> =
        (0..plan.rounds).flat_map(|round| able.iter().map(move |job| (round, *job))).collect();
    let all = steps.len();
    steps.retain(|(round, job)| !out.join(raw::round_file(*round, job.name)).exists());
    let mut progress = Progress::new(all, all - steps.len());
    let mut broken: Vec<(&str, String)> = Vec::new();
    for (round, job) in steps {
        let what = format!("round {} of {}: {}", round + 1, plan.rounds, job.title);
        progress.doing(&what);
        let mut able: Vec<&Set> = sets.iter().filter(|set| fits(job, set)).collect();
        able.retain(|set| !broken.contains(&(job.name, set.info.name.clone())));
        if able.is_empty() {
            progress.step(&format!("{what}: no target is left for it"));
            continue;
        }
        let turn = round as usize % able.len();
        able.rotate_left(turn);
        let measured = one(plan, job, round, &able, &site.scratch())?;
        for (target, why) in &measured.failed {
            progress.say(&format!("{target}: {}: {why}", job.name));
            broken.push((job.name, target.clone()));
        }
        raw::write(out, &raw::round_file(round, job.name), &measured)?;
        progress.step(&what);
    }
    Ok(())
}

/// Runs a job on all targets in one start of fio; in one start per target if that fails or if
/// windows are marked.
fn one(plan: &Plan, job: &Job, round: u32, sets: &[&Set], scratch: &Path) -> Result<Round> {
    let mut raw = Round {
        round,
        job: job.name.into(),
        fio: Vec::new(),
        spent: BTreeMap::new(),
        failed: BTreeMap::new(),
        windows: Vec::new(),
    };
    if !plan.windows {
        match start(plan, job, sets, scratch, &mut raw) {
            Ok(()) => return Ok(raw),
            Err(error) => {
                sh::interrupted()?;
                if let [only] = sets {
                    raw.failed.insert(only.info.name.clone(), format!("{error:#}"));
                    return Ok(raw);
                }
            }
        }
        raw.failed.clear();
    }
    for set in sets {
        if let Err(error) = start(plan, job, &[set], scratch, &mut raw) {
            sh::interrupted()?;
            raw.failed.insert(set.info.name.clone(), format!("{error:#}"));
        }
    }
    Ok(raw)
}

fn start(plan: &Plan, job: &Job, sets: &[&Set], scratch: &Path, raw: &mut Round) -> Result<()> {
    let opened = |set: &&Set| {
        let opened = set.opened.clone()?;
        Some(fio::JobTarget { name: set.info.name.clone(), path: opened.path, many: opened.many })
    };
    let places: Vec<fio::JobTarget> = sets.iter().filter_map(opened).collect();
    let account = |set: &&Set| {
        let server = set.opened.as_ref().and_then(|opened| opened.server);
        server.map(|pid| (Reading::of(pid), set.punts()))
    };
    let before: Vec<Option<(Reading, Option<u64>)>> = sets.iter().map(account).collect();
    let fio = || fio::run(job, &places, plan.length, scratch);
    let said = if plan.windows {
        let (said, window) = window::mark_during(plan.length, fio)?;
        raw.windows.push(window);
        said
    } else {
        fio()?
    };
    // A service manager stops fio together with this program: its report is truncated then.
    sh::interrupted()?;
    for (set, before) in sets.iter().zip(before) {
        if let (Some((before, punts)), Some((now, punts_now))) = (before, account(set)) {
            let mut spent = now.since(&before);
            spent.punts = punts_now.zip(punts).map(|(now, then)| now.saturating_sub(then));
            raw.spent.insert(set.info.name.clone(), spent);
        }
    }
    for measured in fio::complete(&fio::parse(&said)?, job, &places) {
        if let Err(why) = measured.outcome {
            raw.failed.insert(measured.target, why);
        }
    }
    // A truncated report is an error, so that each target gets its own start of fio.
    let start = said.find('{').context("fio printed no report")?;
    let mut stream = serde_json::Deserializer::from_str(&said[start..]).into_iter::<Value>();
    let mut said = stream.next().context("fio printed no report")?.context("fio's report is truncated")?;
    // Statistics of all block devices of the machine: large and not used.
    if let Some(report) = said.as_object_mut() {
        report.remove("disk_util");
    }
    raw.fio.push(said);
    Ok(())
}

fn manifest(plan: &Plan, fio: String) -> Result<Manifest> {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let mut notes = plan.notes.clone();
    // In a VM /proc/cpuinfo shows the emulated CPU.
    let host_cpu = notes.remove("host-cpu");
    let images = site::describe(plan.images.as_deref(), &plan.store_options);
    let images = images.unwrap_or_else(|error| format!("{error:#}"));
    notes.insert("images".into(), format!("{} MiB each, in {images}", plan.image_mb));
    Ok(Manifest {
        date: sh::capture(std::process::Command::new("date").args(["-u", "+%F"]), target::LIMIT)?
            .trim()
            .to_owned(),
        kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
        mode: plan.mode,
        cpus: std::thread::available_parallelism()?.get(),
        host_cpu: host_cpu
            .or_else(|| cpu_model(&read("/proc/cpuinfo")).map(str::to_owned))
            .unwrap_or_default(),
        fio,
        rounds: plan.rounds,
        run_ms: plan.length.run_ms,
        ramp_ms: plan.length.ramp_ms,
        complete: false,
        notes,
    })
}

/// Model name of the first CPU.
pub fn cpu_model(cpuinfo: &str) -> Option<&str> {
    cpuinfo.lines().find_map(|line| Some(line.strip_prefix("model name")?.split_once(':')?.1.trim()))
}

/// Fails if the raw files in `out` are of a different run.
fn same_run(now: &Facts, out: &Path) -> Result<()> {
    let Some(before) = raw::read::<Facts>(out, FACTS)? else { return Ok(()) };
    let key = |facts: &Facts| {
        let manifest = &facts.manifest;
        let names: Vec<String> = facts.jobs.iter().map(|job| job.name.clone()).collect();
        (manifest.kernel.clone(), manifest.mode, manifest.run_ms, manifest.fio.clone(), names)
    };
    if key(&before) != key(now) {
        bail!(
            "{} contains another run (kernel, fio, jobs or lengths differ): omit --resume to start again",
            out.display()
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cpu_is_named() {
        assert_eq!(cpu_model("vendor_id\t: X\nmodel name\t: Fast CPU @ 3 GHz\n"), Some("Fast CPU @ 3 GHz"));
        assert_eq!(cpu_model(""), None);
    }
}
