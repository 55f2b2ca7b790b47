// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Compares the instructions per I/O with the committed baseline.
//!
//! Needs a run in `icount`, where an instruction takes 1 ns: instructions = 10⁹ / IOPS. Targets
//! without loopengine (raw file, kernel loop) show whether the machines are comparable.

use std::fmt;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use crate::job::{self, Job};
use crate::outcome::{Mode, Outcome, Sample};
use crate::target::RAW;

/// Jobs that are measured: 4K reads at depth 1 and 32, 128K reads, and 4K writes with an fsync each.
pub const JOBS: [&Job; 4] = [&job::QD1, &job::QD32, &job::SEQ, &job::FSYNC];
/// Targets that are measured.
pub const TARGETS: [&str; 6] =
    [RAW, job::LOOP, "loopengine batch", "loopengine auto", "loopengine copy", "loopengine durable"];

/// Largest accepted increase, as a share of the baseline.
const LIMIT: f64 = 0.02;
/// If targets without loopengine differ by more than this share, the machines differ.
const DRIFT: f64 = 0.01;
/// File of the baseline, relative to the workspace.
pub const BASELINE: &str = "bench/baseline.json";

/// Instructions per I/O of a target at a job.
#[derive(Debug, Serialize, Deserialize)]
struct Baseline {
    kernel: String,
    fio: String,
    rows: Vec<RowCost>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct RowCost {
    job: String,
    target: String,
    instructions: u64,
}

impl RowCost {
    fn of(sample: &Sample) -> RowCost {
        let instructions = (1e9 / sample.iops).round() as u64;
        RowCost { job: sample.job.clone(), target: sample.target.clone(), instructions }
    }

    fn is_ours(&self) -> bool {
        ![RAW, job::LOOP].contains(&self.target.as_str())
    }
}

/// A row and its baseline.
#[derive(Debug, PartialEq)]
struct Compared {
    now: RowCost,
    before: Option<u64>,
}

impl Compared {
    /// Increase as a share of the baseline.
    fn excess(&self) -> Option<f64> {
        self.before.map(|before| self.now.instructions as f64 / before as f64 - 1.0)
    }

    fn is_too_much(&self) -> bool {
        self.now.is_ours() && self.excess().is_some_and(|excess| excess > LIMIT)
    }

    fn is_drift(&self) -> bool {
        !self.now.is_ours() && self.excess().is_none_or(|excess| excess.abs() > DRIFT)
    }
}

impl fmt::Display for Compared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let RowCost { job, target, instructions } = &self.now;
        write!(f, "  {job:<20} {target:<18} {instructions:>8}")?;
        match (self.before, self.excess()) {
            (Some(before), Some(excess)) => write!(f, " {before:>8} {:>+7.1} %", 100.0 * excess)?,
            _ => write!(f, " {:>8} {:>9}", "–", "new")?,
        }
        f.write_str(if self.is_too_much() { "  too much" } else { "" })
    }
}

#[derive(Debug, PartialEq)]
enum GateVerdict {
    Passed,
    Failed,
    /// Targets without loopengine changed: the machines differ.
    Incomparable,
}

fn compare(baseline: &Baseline, now: &[RowCost]) -> (Vec<Compared>, GateVerdict) {
    let before = |cost: &RowCost| {
        let same = |row: &&RowCost| row.job == cost.job && row.target == cost.target;
        baseline.rows.iter().find(same).map(|row| row.instructions)
    };
    let compared: Vec<Compared> =
        now.iter().map(|cost| Compared { now: cost.clone(), before: before(cost) }).collect();
    let missing = baseline
        .rows
        .iter()
        .any(|row| !now.iter().any(|cost| cost.job == row.job && cost.target == row.target));
    let verdict = if compared.iter().any(Compared::is_drift) {
        GateVerdict::Incomparable
    } else if missing || compared.iter().any(Compared::is_too_much) {
        GateVerdict::Failed
    } else {
        GateVerdict::Passed
    };
    (compared, verdict)
}

/// Compares `outcome` with the baseline at `path`, or makes it the baseline; returns the exit code.
pub fn run(outcome: &Outcome, path: &Path, accept: bool) -> Result<u8> {
    if outcome.manifest.mode != Mode::Icount {
        bail!("instructions are counted in icount only: run cargo lab gate");
    }
    let (kernel, fio) = (&outcome.manifest.kernel, &outcome.manifest.fio);
    let now: Vec<RowCost> = outcome.samples.iter().map(RowCost::of).collect();
    if accept {
        return self::accept(path, &Baseline { kernel: kernel.clone(), fio: fio.clone(), rows: now });
    }
    let baseline = read(path)?;
    let (compared, verdict) = compare(&baseline, &now);
    println!("\ninstructions per I/O: now, in the baseline, and the difference");
    compared.iter().for_each(|row| println!("{row}"));
    Ok(match verdict {
        GateVerdict::Passed => {
            println!("gate: passed: no row is more than {:.0} % above the baseline", 100.0 * LIMIT);
            0
        }
        GateVerdict::Failed => {
            println!(
                "gate: failed: a row costs too much, or a row of the baseline is missing; if this is intended, run 'cargo lab gate --accept' and commit the baseline"
            );
            1
        }
        GateVerdict::Incomparable => {
            println!(
                "gate: skipped: raw file or kernel loop cost more or less than in the baseline, so the \
                 numbers are not comparable (baseline: {}, {}; now: {}, {}): 'cargo lab gate --accept' writes a new baseline",
                baseline.kernel, baseline.fio, kernel, fio
            );
            0
        }
    })
}

fn read(path: &Path) -> Result<Baseline> {
    let text = fs::read_to_string(path)
        .with_context(|| format!("cannot read {}; 'cargo lab gate --accept' makes one", path.display()))?;
    serde_json::from_str(&text).with_context(|| format!("{} is damaged", path.display()))
}

/// Instructions per I/O of `target` at `job` in the baseline at `path`, if they are there.
pub fn baseline(path: &Path, job: &str, target: &str) -> Option<u64> {
    let rows = read(path).ok()?.rows;
    rows.into_iter().find(|row| row.job == job && row.target == target).map(|row| row.instructions)
}

fn accept(path: &Path, baseline: &Baseline) -> Result<u8> {
    let mut text = serde_json::to_string_pretty(baseline)?;
    text.push('\n');
    fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))?;
    println!("gate: {} rows written to {}", baseline.rows.len(), path.display());
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cost(target: &str, instructions: u64) -> RowCost {
        RowCost { job: job::QD1.name.into(), target: target.into(), instructions }
    }

    fn verdict(raw: u64, ours: u64) -> GateVerdict {
        let rows = vec![cost(RAW, 13_000), cost("loopengine batch", 18_000)];
        let baseline = Baseline { kernel: "k".into(), fio: "f".into(), rows };
        compare(&baseline, &[cost(RAW, raw), cost("loopengine batch", ours)]).1
    }

    #[test]
    fn more_than_two_percent_fails_and_less_does_not() {
        assert_eq!(verdict(13_000, 18_350), GateVerdict::Passed);
        assert_eq!(verdict(13_000, 10_000), GateVerdict::Passed);
        assert_eq!(verdict(13_000, 18_400), GateVerdict::Failed);
    }

    #[test]
    fn another_machine_gives_no_verdict() {
        assert_eq!(verdict(13_200, 18_400), GateVerdict::Incomparable);
        assert_eq!(verdict(12_800, 18_000), GateVerdict::Incomparable);
    }

    #[test]
    fn reports_missing_and_new_rows() {
        let rows = vec![cost(RAW, 13_000), cost("loopengine auto", 18_000)];
        let baseline = Baseline { kernel: "k".into(), fio: "f".into(), rows };
        let (rows, verdict) = compare(&baseline, &[cost(RAW, 13_000), cost("loopengine batch", 18_000)]);
        assert_eq!(verdict, GateVerdict::Failed);
        assert!(rows[1].to_string().ends_with("new"));
        assert!(
            Compared { now: cost("loopengine x", 103), before: Some(100) }.to_string().ends_with("too much")
        );
    }
}
