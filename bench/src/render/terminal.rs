//! The summary that ends a run: a block a job, 80 columns.
//!
//! No colour: it is as readable in a log as in a terminal.

use std::fmt::Write;

use super::units::{count, plain, rate, ratio_of, short, time};
use crate::outcome::{JobInfo, Outcome};
use crate::summary::{Row, rows};

const NAME: usize = 22;

/// Target, rate, ratio with interval and verdict, latencies.
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
    text
}

fn block(text: &mut String, job: &JobInfo, rows: &[Row]) {
    let against = format!("× {}", short(&job.reference, 20));
    let _ = writeln!(text, "{} ({})", plain(&job.title), plain(&job.name));
    let _ = writeln!(text, "  {:<NAME$} {:>7} {against:>24} {:>9} {:>9}", "", rate(job), "p50", "p99");
    for row in rows {
        let (name, iops, ratio) = (short(&row.target, NAME), count(row.iops), ratio_of(row));
        // The mark has a place of its own: ratios stay in line without it.
        let ratio = if row.ratio_interval.is_some() { ratio } else { format!("{ratio}  ") };
        let (p50, p99) = (time(row.p50_ns), time(row.p99_ns));
        let _ = writeln!(text, "  {name:<NAME$} {iops:>7} {ratio:>24} {p50:>9} {p99:>9}");
    }
    text.push('\n');
}
