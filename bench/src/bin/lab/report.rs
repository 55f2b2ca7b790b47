//! From samples to a table: medians, and ratios taken within a round.
//!
//! Pure: no file, no clock.

use crate::fio::{Job, Sample};
use crate::rig::REFERENCE;
use crate::stats::{interval, median};

/// A line of a table: one target at one job.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Row {
    pub(crate) target: String,
    /// Median over the rounds.
    pub(crate) iops: f64,
    /// Median bytes a second.
    pub(crate) bandwidth: f64,
    /// Smallest and largest IOPS of a round.
    pub(crate) range: (f64, f64),
    /// Median over the rounds of IOPS divided by the kernel loop's in the same round.
    pub(crate) ratio: Option<f64>,
    /// Where that median lies with 95 % confidence; none with too few rounds.
    pub(crate) interval: Option<(f64, f64)>,
    /// Median of the rounds' median latencies.
    pub(crate) p50_ns: f64,
    /// Median of the rounds' 99th percentiles.
    pub(crate) p99_ns: f64,
}

/// The rows of `job`, in the order in which targets first appear.
pub(crate) fn rows(job: &Job, rounds: &[Vec<Sample>]) -> Vec<Row> {
    let mut targets: Vec<&str> = Vec::new();
    for sample in rounds.iter().flatten().filter(|sample| sample.job == job.name) {
        if !targets.contains(&sample.target.as_str()) {
            targets.push(&sample.target);
        }
    }
    targets.into_iter().map(|target| row(job, target, rounds)).collect()
}

fn row(job: &Job, target: &str, rounds: &[Vec<Sample>]) -> Row {
    let find = |round: &'_ [Sample], target: &str| -> Option<Sample> {
        round.iter().find(|sample| sample.job == job.name && sample.target == target).cloned()
    };
    let samples: Vec<Sample> = rounds.iter().filter_map(|round| find(round, target)).collect();
    let all = |value: fn(&Sample) -> f64| -> Vec<f64> { samples.iter().map(value).collect() };
    let ratios: Vec<f64> = rounds
        .iter()
        .filter_map(|round| Some(find(round, target)?.iops / find(round, REFERENCE)?.iops))
        .collect();
    let iops = all(|sample| sample.iops);
    Row {
        target: target.to_owned(),
        iops: median(&iops).unwrap_or(0.0),
        bandwidth: median(&all(|sample| sample.bandwidth)).unwrap_or(0.0),
        range: (iops.iter().copied().fold(f64::INFINITY, f64::min), iops.iter().copied().fold(0.0, f64::max)),
        ratio: median(&ratios),
        interval: interval(&ratios).filter(|_| target != REFERENCE),
        p50_ns: median(&all(|sample| sample.p50_ns as f64)).unwrap_or(0.0),
        p99_ns: median(&all(|sample| sample.p99_ns as f64)).unwrap_or(0.0),
    }
}

/// Three digits that count: "76.8K".
pub(crate) fn human(value: f64) -> String {
    let (scaled, unit) = match value {
        value if value >= 1e6 => (value / 1e6, "M"),
        value if value >= 1e3 => (value / 1e3, "K"),
        value => (value, ""),
    };
    let digits = if scaled >= 100.0 {
        0
    } else if scaled >= 10.0 {
        1
    } else {
        2
    };
    format!("{scaled:.digits$}{unit}")
}

/// Microseconds, for a latency.
pub(crate) fn micros(ns: f64) -> String {
    format!("{:.1} µs", ns / 1000.0)
}

/// The ratio, its interval, and a mark where the interval has both sides of 1.
fn ratio(row: &Row) -> String {
    match (row.ratio, row.interval) {
        (None, _) => "–".into(),
        (Some(ratio), None) => format!("{ratio:.2}"),
        (Some(ratio), Some((low, high))) => {
            let mark = if low <= 1.0 && 1.0 <= high { " ≈" } else { "" };
            format!("{ratio:.2} ({low:.2} … {high:.2}){mark}")
        }
    }
}

/// A table in Markdown of one job.
pub(crate) fn markdown(job: &Job, rows: &[Row]) -> String {
    let mut text = format!("## {}\n\n", job.title);
    text.push_str("| target | IOPS | × kernel loop (95 %) | min … max | MB/s | p50 | p99 |\n|---|---:|---:|---:|---:|---:|---:|\n");
    for row in rows {
        text.push_str(&format!(
            "| {} | {} | {} | {} … {} | {} | {} | {} |\n",
            row.target,
            human(row.iops),
            ratio(row),
            human(row.range.0),
            human(row.range.1),
            human(row.bandwidth / 1e6),
            micros(row.p50_ns),
            micros(row.p99_ns),
        ));
    }
    text.push('\n');
    text
}

/// A table for a terminal: a line a target, two columns a job.
pub(crate) fn terminal(jobs: &[Job], rounds: &[Vec<Sample>]) -> String {
    let columns: Vec<Vec<Row>> = jobs.iter().map(|job| rows(job, rounds)).collect();
    let mut text = format!("  {:<20}", "");
    for job in jobs {
        text.push_str(&format!("{:>30}", job.title));
    }
    text.push('\n');
    for (index, first) in columns.first().into_iter().flatten().enumerate() {
        text.push_str(&format!("  {:<20}", first.target));
        for column in &columns {
            let cell = column.get(index).map_or(String::new(), |row| {
                let ratio = row.ratio.map_or(String::new(), |ratio| format!("{ratio:.2} ×"));
                format!("{:>20}{ratio:>10}", human(row.iops))
            });
            text.push_str(&cell);
        }
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fio::{QD1, QD32};

    fn sample(target: &str, iops: f64) -> Sample {
        let (job, target) = (QD1.name.to_owned(), target.to_owned());
        Sample { job, target, iops, bandwidth: iops * 4096.0, p50_ns: 10, p99_ns: 20 }
    }

    #[test]
    fn ratios_are_taken_within_a_round() {
        // The machine was twice as fast in the second round: the ratio does not see it.
        let rounds = [
            vec![sample("raw file", 40.0), sample(REFERENCE, 10.0), sample("x", 15.0)],
            vec![sample("raw file", 80.0), sample(REFERENCE, 20.0), sample("x", 30.0)],
            vec![sample("x", 13.0), sample("raw file", 40.0), sample(REFERENCE, 10.0)],
        ];
        let rows = rows(&QD1, &rounds);
        let names: Vec<&str> = rows.iter().map(|row| row.target.as_str()).collect();
        assert_eq!(names, ["raw file", REFERENCE, "x"]);
        assert_eq!((rows[2].ratio, rows[2].iops, rows[2].range), (Some(1.5), 15.0, (13.0, 30.0)));
        assert_eq!((rows[1].ratio, rows[0].ratio), (Some(1.0), Some(4.0)));
        assert!(super::rows(&QD32, &rounds).is_empty());
    }

    #[test]
    fn numbers_for_people() {
        assert_eq!(human(76_812.0), "76.8K");
        assert_eq!(human(7_420.0), "7.42K");
        assert_eq!(human(1_250_000.0), "1.25M");
        assert_eq!(human(312.4), "312");
    }

    #[test]
    fn a_ratio_is_marked_where_no_difference_is_shown() {
        let rounds = |values: [f64; 5]| -> Vec<Vec<Sample>> {
            values.iter().map(|value| vec![sample(REFERENCE, 10.0), sample("x", *value)]).collect()
        };
        let shown = |values| ratio(&rows(&QD1, &rounds(values))[1]);
        assert_eq!(shown([15.0; 5]), "1.50 (1.50 … 1.50)");
        assert!(shown([8.0, 9.0, 10.0, 11.0, 12.0]).ends_with(" ≈"));
        assert_eq!(ratio(&rows(&QD1, &rounds([9.0; 5]))[0]), "1.00");
    }

    #[test]
    fn every_target_has_a_line_in_every_table() {
        let rounds = [vec![sample("raw file", 40.0), sample(REFERENCE, 10.0)]];
        assert_eq!(markdown(&QD1, &rows(&QD1, &rounds)).matches("\n| ").count(), 3);
        let text = terminal(&[QD1], &rounds);
        assert!(text.contains("raw file") && text.contains("4.00 ×") && text.lines().count() == 3, "{text}");
    }
}
