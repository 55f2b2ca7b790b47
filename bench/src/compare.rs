// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Compares two results row by row, and says what became slower.
//!
//! On real and emulated machines it compares ratios to the reference, so that the speed of the
//! machine cancels out. In `icount` it compares instructions per operation. Reads no file.

mod text;

use std::collections::BTreeSet;

use anyhow::{Result, bail};

use crate::outcome::{Cost, Mode, Outcome, Sample};
use crate::stats::{median, quotient_interval};
use crate::summary::{Interval, Verdict};
use crate::units::plain;

/// Smaller differences do not count in `icount`: a sealed machine repeats exactly, but another
/// build lays out code and data differently.
const THRESHOLD: f64 = 0.005;

/// Differences between two results.
#[derive(Clone, Debug, PartialEq)]
pub struct Comparison {
    pub mode: Mode,
    /// Why the results are not fully comparable.
    pub warnings: Vec<String>,
    /// Changes, in the order of the new result.
    pub changes: Vec<Change>,
    /// Job and target of rows that only one result has.
    pub only_old: Vec<(String, String)>,
    pub only_new: Vec<(String, String)>,
}

/// One target at one job, in both results.
#[derive(Clone, Debug, PartialEq)]
pub struct Change {
    pub job: String,
    pub target: String,
    /// Median ratio to the reference; in `icount`, instructions per operation.
    pub before: f64,
    pub after: f64,
    /// `after` divided by `before`, and its 95 % interval.
    pub quotient: f64,
    pub interval: Interval,
    pub verdict: Verdict,
}

impl Comparison {
    /// Whether a row became slower.
    pub fn slower(&self) -> bool {
        self.count(Verdict::Slower) > 0
    }

    /// Number of rows within the threshold, and the row with the largest change.
    fn agreement(&self) -> Option<(usize, &Change)> {
        let apart = |change: &Change| (change.quotient - 1.0).abs();
        let worst = self.changes.iter().max_by(|a, b| apart(a).total_cmp(&apart(b)))?;
        Some((self.changes.iter().filter(|change| apart(change) <= THRESHOLD).count(), worst))
    }

    fn count(&self, verdict: Verdict) -> usize {
        self.changes.iter().filter(|change| change.verdict == verdict).count()
    }
}

/// Compares `new` with `old`. Rejects results of different modes.
pub fn compare(old: &Outcome, new: &Outcome) -> Result<Comparison> {
    let (before, after) = (&old.manifest, &new.manifest);
    let mode = after.mode;
    if before.mode != mode {
        bail!("cannot compare a result of mode {} with one of mode {}", before.mode.name(), mode.name());
    }
    let differs = |what: &str, before: &str, after: &str| {
        (before != after).then(|| format!("different {what}: {} before, {} now", plain(before), plain(after)))
    };
    let incomplete =
        |complete: bool, which: &str| (!complete).then(|| format!("the {which} run was not complete"));
    let warnings = [
        differs("kernel", &before.kernel, &after.kernel),
        differs("fio", &before.fio, &after.fio),
        differs("CPU of the host", &before.host_cpu, &after.host_cpu),
        differs("length of a job in ms", &before.run_ms.to_string(), &after.run_ms.to_string()),
        incomplete(before.complete, "old"),
        incomplete(after.complete, "new"),
    ];
    let (had, have) = (pairs(old), pairs(new));
    let only = |these: &[(String, String)], others: &[(String, String)]| -> Vec<(String, String)> {
        let others: BTreeSet<_> = others.iter().collect();
        these.iter().filter(|pair| !others.contains(pair)).cloned().collect()
    };
    let (only_old, only_new) = (only(&had, &have), only(&have, &had));
    let both = have.into_iter().filter(|pair| !only_new.contains(pair));
    let changes = both.filter_map(|(job, target)| change(mode, old, new, job, target)).collect();
    Ok(Comparison { mode, warnings: warnings.into_iter().flatten().collect(), changes, only_old, only_new })
}

fn change(mode: Mode, old: &Outcome, new: &Outcome, job: String, target: String) -> Option<Change> {
    let old_values = values(mode, old, &job, &target);
    let new_values = values(mode, new, &job, &target);
    let (before, after) = (median(&old_values)?, median(&new_values)?);
    let quotient = after / before;
    let interval = quotient_interval(&old_values, &new_values);
    let verdict = verdict(mode, quotient, interval);
    Some(Change { job, target, before, after, quotient, interval, verdict })
}

fn verdict(mode: Mode, quotient: f64, interval: Interval) -> Verdict {
    let counted = mode == Mode::Icount;
    let (low, high) = match interval {
        _ if !quotient.is_finite() => return Verdict::Unknown,
        Some(interval) => interval,
        None if counted => (quotient, quotient),
        None => return Verdict::Unknown,
    };
    if low <= 1.0 && 1.0 <= high || counted && (quotient - 1.0).abs() <= THRESHOLD {
        return Verdict::NoDifference;
    }
    // More instructions mean slower; a higher ratio means faster.
    if (low > 1.0) == counted { Verdict::Slower } else { Verdict::Faster }
}

/// Values to compare, one per round. The reference itself has no ratio.
fn values(mode: Mode, outcome: &Outcome, job: &str, target: &str) -> Vec<f64> {
    let of = |target: &str| {
        let target = target.to_owned();
        outcome.samples.iter().filter(move |sample| sample.job == job && sample.target == target)
    };
    let finite = |value: &f64| value.is_finite() && *value > 0.0;
    if mode == Mode::Icount {
        return of(target).map(|sample| instructions(&sample.cost, sample.iops)).filter(finite).collect();
    }
    let reference = outcome.jobs.iter().find(|info| info.name == job).map(|info| info.reference.as_str());
    let Some(reference) = reference.filter(|reference| *reference != target) else { return Vec::new() };
    let beside = |sample: &Sample| {
        of(reference).find(|other| other.round == sample.round).map(|other| sample.iops / other.iops)
    };
    of(target).filter_map(beside).filter(finite).collect()
}

/// Instructions per operation: on the emulated CPU an instruction takes a nanosecond.
pub(crate) fn instructions(cost: &Cost, iops: f64) -> f64 {
    cost.system_ns.unwrap_or(1e9 / iops)
}

/// Distinct jobs and targets of the samples, in order of jobs and targets.
fn pairs(outcome: &Outcome) -> Vec<(String, String)> {
    let sampled: BTreeSet<(&str, &str)> =
        outcome.samples.iter().map(|sample| (sample.job.as_str(), sample.target.as_str())).collect();
    let mut pairs = Vec::new();
    for job in &outcome.jobs {
        let targets = outcome.targets.iter().map(|target| target.name.as_str());
        let present = targets.filter(|target| sampled.contains(&(job.name.as_str(), target)));
        pairs.extend(present.map(|target| (job.name.clone(), target.to_owned())));
    }
    pairs
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::render::synthetic;

    fn scaled(mode: Mode, rounds: u32, factor: f64) -> (Outcome, Outcome) {
        let mut old = synthetic::outcome(rounds);
        old.manifest.mode = mode;
        let mut new = old.clone();
        let ours = |sample: &&mut Sample| sample.target == "loopengine batch";
        new.samples.iter_mut().filter(ours).for_each(|sample| sample.iops *= factor);
        (old, new)
    }

    fn verdicts(comparison: &Comparison, target: &str) -> Vec<Verdict> {
        let of = comparison.changes.iter().filter(|change| change.target == target);
        of.map(|change| change.verdict).collect()
    }

    #[test]
    fn finds_only_the_rows_that_became_slower() {
        for mode in [Mode::Smp, Mode::Host, Mode::Icount] {
            let (old, new) = scaled(mode, 9, 0.6);
            let comparison = compare(&old, &new).unwrap();
            assert!(comparison.slower());
            assert_eq!(verdicts(&comparison, "loopengine batch"), [Verdict::Slower; 7], "{mode:?}");
            assert_eq!(comparison.count(Verdict::Slower), 7, "{comparison}");
            let back = compare(&new, &old).unwrap();
            assert_eq!(verdicts(&back, "loopengine batch"), [Verdict::Faster; 7], "{mode:?}");
            assert!(!back.slower() && !compare(&old, &old).unwrap().slower());
        }
    }

    #[test]
    fn a_single_round_shows_something_only_where_instructions_are_counted() {
        let (old, new) = scaled(Mode::Smp, 1, 0.5);
        let comparison = compare(&old, &new).unwrap();
        assert!(!comparison.slower());
        assert_eq!(verdicts(&comparison, "loopengine batch"), [Verdict::Unknown; 7]);
        let verdict = |factor| {
            let (old, new) = scaled(Mode::Icount, 1, factor);
            verdicts(&compare(&old, &new).unwrap(), "loopengine batch")[0]
        };
        assert_eq!(
            [0.99, 0.996, 1.004, 1.01].map(verdict),
            [Verdict::Slower, Verdict::NoDifference, Verdict::NoDifference, Verdict::Faster]
        );
    }

    #[test]
    fn the_last_line_says_how_many_rows_repeat_and_which_does_not() {
        let last = |factor| {
            let (old, new) = scaled(Mode::Icount, 1, factor);
            let comparison = compare(&old, &new).unwrap();
            (comparison.changes.len(), comparison.to_string().lines().last().unwrap().to_owned())
        };
        let (rows, said) = last(1.0 / 1.1);
        let expected =
            format!("{} of {rows} rows agree within 0.5 %; farthest apart: loopengine batch at ", rows - 7);
        assert!(said.starts_with(&expected) && said.ends_with(", +10.00 %"), "{said}");
        let (rows, said) = last(1.0 / 1.004);
        assert!(said.starts_with(&format!("{rows} of {rows} ")) && said.ends_with(", +0.40 %"), "{said}");
        assert_eq!(last(1.0).1, format!("{rows} of {rows} rows agree within 0.5 %, all of them exactly"));
    }

    #[test]
    fn the_reference_is_compared_only_where_it_can_be() {
        let (old, new) = scaled(Mode::Host, 5, 1.0);
        assert!(verdicts(&compare(&old, &new).unwrap(), "kernel loop").is_empty());
        let (old, new) = scaled(Mode::Icount, 5, 1.0);
        assert_eq!(verdicts(&compare(&old, &new).unwrap(), "kernel loop").len(), 7);
    }

    #[test]
    fn modes_must_agree_and_rows_may_be_missing() {
        let (old, mut new) = scaled(Mode::Host, 5, 1.0);
        new.manifest.kernel = "8.0".into();
        new.samples.retain(|sample| {
            (sample.job.as_str(), sample.target.as_str()) != ("fs-create", "ext4 on loopengine")
        });
        let comparison = compare(&old, &new).unwrap();
        assert_eq!(comparison.only_old, [("fs-create".to_owned(), "ext4 on loopengine".to_owned())]);
        assert!(comparison.only_new.is_empty());
        assert_eq!(comparison.warnings.len(), 1, "{:?}", comparison.warnings);
        let said = comparison.to_string();
        assert!(said.contains("different kernel: 7.3.4+deb13-amd64 before, 8.0 now"), "{said}");
        assert!(said.contains("only before: ext4 on loopengine at fs-create"), "{said}");
        new.manifest.mode = Mode::Smp;
        let refused = compare(&old, &new).unwrap_err().to_string();
        assert_eq!(refused, "cannot compare a result of mode host with one of mode smp");
    }

    #[test]
    fn zeros_and_invalid_numbers_give_no_verdict() {
        let (old, mut new) = scaled(Mode::Host, 5, 0.0);
        new.samples.iter_mut().step_by(3).for_each(|sample| sample.iops = f64::NAN);
        let comparison = compare(&old, &new).unwrap();
        assert!(!comparison.to_string().contains("NaN"));
        let (none, _) = scaled(Mode::Host, 0, 1.0);
        assert!(compare(&none, &new).unwrap().changes.is_empty());
    }
}
