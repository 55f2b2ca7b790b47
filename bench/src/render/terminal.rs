// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The summary at the end of a run: one block per job, 80 columns.
//!
//! Without colour, so that it reads the same in a log.

use std::fmt::Write;

use crate::outcome::{JobInfo, Outcome};
use crate::summary::{Row, Verdict, rows};
use crate::units::{contradiction, count, mark, plain, rate, ratio, ratio_of, short, time, wrapped};

/// Longer names are truncated.
const NAME: usize = 32;

/// Prints target, rate, ratio with interval and verdict, and latencies.
pub fn terminal(outcome: &Outcome) -> String {
    let mut text = String::new();
    let mut intervals = false;
    for job in &outcome.jobs {
        let rows = rows(outcome, job);
        if rows.is_empty() {
            continue;
        }
        intervals |= rows.iter().any(|row| row.ratio_interval.is_some());
        block(&mut text, job, &rows);
    }
    if text.is_empty() {
        text.push_str("nothing was measured\n");
    }
    if intervals {
        text.push_str("▲ faster, ▼ slower than the reference; ≈ no difference shown (95 % interval)\n");
    }
    for target in &outcome.targets {
        if let Some(why) = &target.unavailable {
            let _ = writeln!(text, "not measured: {}: {}", plain(&target.name), plain(why));
        }
    }
    for warning in &outcome.warnings {
        let _ = writeln!(text, "warning: {}: {}", plain(&warning.what), plain(&warning.advice));
    }
    if !outcome.manifest.complete {
        text.push_str("warning: the run was not complete\n");
    }
    closing(&mut text, outcome);
    text
}

/// One sentence per reference that sums up the ratios.
fn closing(text: &mut String, outcome: &Outcome) {
    let mut references: Vec<&str> = outcome.jobs.iter().map(|job| job.reference.as_str()).collect();
    references.sort_unstable();
    references.dedup();
    for reference in references {
        let jobs = outcome.jobs.iter().filter(|job| job.reference == reference);
        let rows: Vec<Row> = jobs.flat_map(|job| rows(outcome, job)).collect();
        let others = outcome.targets.iter().filter(|target| target.name != reference);
        let lines: Vec<String> = others.filter_map(|target| ran(&rows, &target.name)).collect();
        if !lines.is_empty() {
            let _ = writeln!(text, "\nIn short, beside {}\n{}", plain(reference), lines.join("\n"));
        }
    }
}

/// "  raw file ran 1.10 to 1.70 times as fast in 3 jobs (▲ 2, ≈ 1)"
fn ran(rows: &[Row], target: &str) -> Option<String> {
    let rows: Vec<&Row> = rows.iter().filter(|row| row.target == target).collect();
    let ratios: Vec<f64> =
        rows.iter().filter_map(|row| row.ratio).filter(|ratio| ratio.is_finite()).collect();
    let least = ratio(ratios.iter().copied().reduce(f64::min)?);
    let most = ratio(ratios.iter().copied().reduce(f64::max)?);
    let span = if least == most { least } else { format!("{least} to {most}") };
    let jobs = if ratios.len() == 1 { "1 job".into() } else { format!("{} jobs", ratios.len()) };
    let shown = [Verdict::Faster, Verdict::Slower, Verdict::NoDifference].map(|verdict| {
        let times = rows.iter().filter(|row| row.verdict() == verdict).count();
        (times > 0).then(|| format!("{} {times}", mark(verdict)))
    });
    let shown: Vec<String> = shown.into_iter().flatten().collect();
    let shown = if shown.is_empty() { String::new() } else { format!(" ({})", shown.join(", ")) };
    Some(format!("  {} ran {span} times as fast in {jobs}{shown}", short(target, NAME)))
}

fn block(text: &mut String, job: &JobInfo, rows: &[Row]) {
    let against = format!("× {}", short(&job.reference, 22));
    let width = rows.iter().map(|row| row.target.chars().count().min(NAME)).max().unwrap_or(0);
    let _ = writeln!(text, "{} ({})", plain(&job.title), plain(&job.name));
    let _ = writeln!(text, "  {:<width$} {:>7} {against:>24} {:>9} {:>9}", "", rate(job), "p50", "p99");
    for row in rows {
        let (name, iops, ratio) = (short(&row.target, NAME), count(row.iops), ratio_of(row));
        // Without a mark the column is padded, so that ratios stay aligned.
        let ratio = if row.ratio_interval.is_some() { ratio } else { format!("{ratio}  ") };
        let (p50, p99) = (time(row.p50_ns), time(row.p99_ns));
        let _ = writeln!(text, "  {name:<width$} {iops:>7} {ratio:>24} {p50:>9} {p99:>9}");
    }
    if let Some(why) = contradiction(rows, &rate(job)) {
        let _ = writeln!(text, "  {}", wrapped(&why, 78).join("\n  "));
    }
    text.push('\n');
}
