// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Turns samples into medians, ratios within rounds, and verdicts.
//!
//! Pure: reads no file and no clock. `render` formats the result.

use crate::outcome::{Cost, JobInfo, Outcome, Sample};
use crate::stats::{interval, median};

/// 95 % confidence interval of a median; `None` with too few rounds.
pub type Interval = Option<(f64, f64)>;

/// One target at one job over all rounds.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    pub target: String,
    /// Median of operations per second.
    pub iops: f64,
    pub iops_interval: Interval,
    /// Smallest and largest IOPS of a round.
    pub range: (f64, f64),
    /// Median of bytes per second.
    pub bytes_per_s: f64,
    /// Median of the ratios to the reference's IOPS in the same round.
    pub ratio: Option<f64>,
    pub ratio_interval: Interval,
    /// Medians of the rounds' percentiles.
    pub p50_ns: f64,
    pub p99_ns: f64,
    /// Medians.
    pub cost: Cost,
}

/// What a ratio with its interval shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The interval is above 1.
    Faster,
    /// The interval is below 1.
    Slower,
    /// The interval includes 1.
    NoDifference,
    /// There is no interval: too few rounds, or the reference itself.
    Unknown,
}

impl Row {
    /// The verdict of the ratio.
    pub fn verdict(&self) -> Verdict {
        match self.ratio_interval {
            None => Verdict::Unknown,
            Some((low, _)) if low > 1.0 => Verdict::Faster,
            Some((_, high)) if high < 1.0 => Verdict::Slower,
            Some(_) => Verdict::NoDifference,
        }
    }
}

/// The rows of `job`, in the order of the outcome's targets.
pub fn rows(outcome: &Outcome, job: &JobInfo) -> Vec<Row> {
    let of_job: Vec<&Sample> = outcome.samples.iter().filter(|sample| sample.job == job.name).collect();
    let targets = outcome.targets.iter().map(|target| target.name.as_str());
    targets.filter_map(|target| row(&of_job, target, &job.reference)).collect()
}

/// Two rows that seem to contradict each other: the first has the larger median and the smaller
/// ratio. Both are correct if the machine's speed changed between rounds.
pub fn contradiction(rows: &[Row]) -> Option<(&Row, &Row)> {
    // Smaller differences are not visible in a table.
    let more = |a: f64, b: f64| a > b * 1.005;
    let contradict = |a: &Row, b: &Row| {
        a.ratio.zip(b.ratio).is_some_and(|(ours, theirs)| more(a.iops, b.iops) && more(theirs, ours))
    };
    let pairs = rows.iter().flat_map(|a| rows.iter().map(move |b| (a, b)));
    pairs.into_iter().find(|(a, b)| contradict(a, b))
}

fn row(samples: &[&Sample], target: &str, reference: &str) -> Option<Row> {
    let ours: Vec<&Sample> = samples.iter().copied().filter(|sample| sample.target == target).collect();
    let all = |value: fn(&Sample) -> f64| -> Vec<f64> { ours.iter().map(|sample| value(sample)).collect() };
    let cost = |value: fn(&Cost) -> Option<f64>| -> Option<f64> {
        median(&ours.iter().filter_map(|sample| value(&sample.cost)).collect::<Vec<_>>())
    };
    let beside = |sample: &Sample| {
        let same = |other: &&&Sample| other.round == sample.round && other.target == reference;
        samples.iter().find(same).map(|other| sample.iops / other.iops)
    };
    let ratios: Vec<f64> = ours.iter().filter_map(|sample| beside(sample)).collect();
    let iops = all(|sample| sample.iops);
    Some(Row {
        target: target.to_owned(),
        iops: median(&iops)?,
        iops_interval: interval(&iops),
        range: (iops.iter().copied().fold(f64::INFINITY, f64::min), iops.iter().copied().fold(0.0, f64::max)),
        bytes_per_s: median(&all(|sample| sample.bytes_per_s))?,
        ratio: median(&ratios),
        ratio_interval: interval(&ratios).filter(|_| target != reference),
        p50_ns: median(&all(|sample| sample.p50_ns as f64))?,
        p99_ns: median(&all(|sample| sample.p99_ns as f64))?,
        cost: Cost {
            submitter_ns: cost(|cost| cost.submitter_ns),
            engine_ns: cost(|cost| cost.engine_ns),
            system_ns: cost(|cost| cost.system_ns),
            switches: cost(|cost| cost.switches),
            punts: cost(|cost| cost.punts),
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::outcome::{Manifest, SCHEMA, TargetInfo};

    fn outcome(rounds: &[&[(&str, f64)]]) -> (Outcome, JobInfo) {
        let job = JobInfo {
            name: "j".into(),
            title: "J".into(),
            question: "q".into(),
            unit: None,
            reference: "loop".into(),
            depth: None,
        };
        let mut targets: Vec<TargetInfo> = Vec::new();
        let mut samples = Vec::new();
        for (round, entries) in rounds.iter().enumerate() {
            for (target, iops) in *entries {
                if !targets.iter().any(|present| present.name == *target) {
                    let name = (*target).to_owned();
                    targets.push(TargetInfo {
                        name,
                        about: String::new(),
                        version: String::new(),
                        unavailable: None,
                    });
                }
                samples.push(Sample {
                    round: round as u32,
                    job: "j".into(),
                    target: (*target).to_owned(),
                    iops: *iops,
                    bytes_per_s: iops * 4096.0,
                    p50_ns: 10,
                    p99_ns: 20,
                    cost: Cost::default(),
                });
            }
        }
        let outcome = Outcome {
            schema: SCHEMA,
            manifest: Manifest::default(),
            warnings: Vec::new(),
            targets,
            jobs: vec![job.clone()],
            samples,
            latencies: Vec::new(),
            attach: Vec::new(),
            idle: Vec::new(),
        };
        (outcome, job)
    }

    #[test]
    fn ratios_are_taken_within_a_round() {
        // The machine was twice as fast in the second round, which does not change the ratio.
        let (outcome, job) = outcome(&[
            &[("raw", 40.0), ("loop", 10.0), ("x", 15.0)],
            &[("raw", 80.0), ("loop", 20.0), ("x", 30.0)],
            &[("x", 13.0), ("raw", 40.0), ("loop", 10.0)],
        ]);
        let rows = rows(&outcome, &job);
        let names: Vec<&str> = rows.iter().map(|row| row.target.as_str()).collect();
        assert_eq!(names, ["raw", "loop", "x"]);
        assert_eq!((rows[2].ratio, rows[2].iops, rows[2].range), (Some(1.5), 15.0, (13.0, 30.0)));
        assert_eq!((rows[1].ratio, rows[0].ratio), (Some(1.0), Some(4.0)));
    }

    #[test]
    fn a_larger_median_with_a_smaller_ratio_is_noticed() {
        // 10 % slower than kernel loop in all rounds but the fast one.
        let (outcome, job) = outcome(&[
            &[("loop", 10.0), ("x", 9.0)],
            &[("loop", 20.0), ("x", 18.0)],
            &[("loop", 10.0), ("x", 60.0)],
        ]);
        let all = rows(&outcome, &job);
        assert_eq!((all[1].iops, all[0].iops, all[1].ratio), (18.0, 10.0, Some(0.9)));
        let names = contradiction(&all).map(|(a, b)| (a.target.as_str(), b.target.as_str()));
        assert_eq!(names, Some(("x", "loop")));
        assert!(contradiction(&all[..1]).is_none());
    }

    #[test]
    fn a_target_without_its_reference_has_no_ratio() {
        let (outcome, job) = outcome(&[&[("x", 15.0)]]);
        assert_eq!(rows(&outcome, &job)[0].ratio, None);
    }

    #[test]
    fn a_verdict_needs_an_interval_that_leaves_out_one() {
        let verdict = |values: [f64; 5]| {
            let pairs: Vec<[(&str, f64); 2]> =
                values.iter().map(|value| [("loop", 10.0), ("x", *value)]).collect();
            let rounds: Vec<&[(&str, f64)]> = pairs.iter().map(|pair| &pair[..]).collect();
            let (outcome, job) = outcome(&rounds);
            let rows = rows(&outcome, &job);
            assert_eq!(rows[0].verdict(), Verdict::Unknown);
            rows[1].verdict()
        };
        assert_eq!(verdict([15.0; 5]), Verdict::Faster);
        assert_eq!(verdict([5.0; 5]), Verdict::Slower);
        assert_eq!(verdict([8.0, 9.0, 10.0, 11.0, 12.0]), Verdict::NoDifference);
    }
}
