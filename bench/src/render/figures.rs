// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The figures of results in documents.
//!
//! A table has figures if its header names a value: `IOPS` or `× kernel loop` in the first cell, with
//! a job in each other cell, or `IOPS × kernel loop` in the second, for a range over the jobs of the
//! report's summary. The first cell of a row names a target. The result is the first one that the
//! row, or else its section, links.

use std::path::Path;

use anyhow::{Context, Result, bail};

use super::report::summary_jobs;
use crate::outcome::Outcome;
use crate::summary::{Row, rows};
use crate::units::{NOTHING, count, ratio, span};

/// Documents with figures, from the root of the repository.
pub const DOCUMENTS: [&str; 2] = ["README.md", "engine/doc/measuring.md"];

/// Headers of columns, and the jobs.
const JOBS: [(&str, &str); 6] = [
    ("4K read, QD 32", "randread-4k-qd32"),
    ("QD 1", "randread-4k-qd1"),
    ("QD 32, two processes", "randread-4k-qd32x2"),
    ("4K write, QD 32", "randwrite-4k-qd32"),
    ("128K read, QD 8", "read-128k-qd8"),
    ("4K write + fsync", "fsync-4k-qd1"),
];

/// Beginnings of rows, and the targets.
const TARGETS: [(&str, &str); 12] = [
    ("the raw file", "raw file"),
    ("kernel loop", "kernel loop"),
    ("loopengine over kernel loop", "loopengine loop"),
    ("loopengine over ublk, batch", "loopengine batch"),
    ("loopengine over ublk, auto", "loopengine auto"),
    ("loopengine over ublk, copy", "loopengine copy"),
    ("loopengine over ublk, durable writes", "loopengine durable"),
    ("loopengine behind FUSE", "loopengine fuse"),
    ("rublk", "rublk"),
    ("QEMU's FUSE export", "qemu fuse"),
    ("FUSE passthrough", "fuse passthrough"),
    ("nbd, by qemu-nbd", "qemu nbd"),
];

/// What a table shows.
enum Value {
    Iops,
    Ratio,
    Range,
}

/// Returns the document with the figures of the results. `root`: of the repository.
pub fn refreshed(document: &str, root: &Path) -> Result<String> {
    let mut lines: Vec<String> = document.lines().map(str::to_owned).collect();
    let mut section = 0;
    let mut table: Option<(Value, Vec<String>)> = None;
    for at in 0..lines.len() {
        if lines[at].starts_with("## ") {
            section = at;
        }
        let Some(cells) = cells(&lines[at]) else {
            table = None;
            continue;
        };
        let Some((value, header)) = &table else {
            table = value_of(&cells).map(|value| (value, cells));
            continue;
        };
        if cells[0].starts_with("---") {
            continue;
        }
        let end = (at..lines.len()).find(|line| *line > section && lines[*line].starts_with("## "));
        let result = result_of(&lines[at], document)
            .or_else(|| lines[section..end.unwrap_or(lines.len())].iter().find_map(|line| linked(line)));
        let result = result.with_context(|| format!("no result is linked near '{}'", lines[at]))?;
        let outcome = super::read(&root.join("results").join(result))?;
        let figures = row(&cells[0], header, value, &outcome).with_context(|| lines[at].clone())?;
        lines[at] = format!("| {} | {} |", cells[0], figures.join(" | "));
    }
    Ok(lines.join("\n") + "\n")
}

fn value_of(header: &[String]) -> Option<Value> {
    match (header.first()?.as_str(), header.get(1)?.as_str()) {
        (_, "IOPS × kernel loop") => Some(Value::Range),
        (first, _) if first.starts_with("IOPS") => Some(Value::Iops),
        (first, _) if first.starts_with("× kernel loop") => Some(Value::Ratio),
        _ => None,
    }
}

fn row(name: &str, header: &[String], value: &Value, outcome: &Outcome) -> Result<Vec<String>> {
    let target = TARGETS.iter().filter(|(row, _)| name.starts_with(row)).max_by_key(|(row, _)| row.len());
    let Some((_, target)) = target else { bail!("'{name}' names no target") };
    let row_of = |job: &str| -> Result<Option<Row>> {
        let job = outcome.jobs.iter().find(|known| known.name == job);
        let job = job.context("the result does not have the job")?;
        Ok(rows(outcome, job).into_iter().find(|row| row.target == *target))
    };
    if let Value::Range = value {
        let jobs =
            summary_jobs(outcome).into_iter().map(|job| Ok(row_of(&job.name)?.and_then(|row| row.ratio)));
        let ratios: Vec<Option<f64>> = jobs.collect::<Result<_>>()?;
        return Ok(vec![span(ratios.into_iter().flatten()).unwrap_or(NOTHING.into())]);
    }
    let figure = |row: &Row| match value {
        Value::Iops => count(row.iops),
        _ => match (row.ratio, row.ratio_interval) {
            (Some(middle), Some((low, high))) => {
                format!("{} ({} … {})", ratio(middle), ratio(low), ratio(high))
            }
            (middle, _) => middle.map_or(NOTHING.into(), ratio),
        },
    };
    let column = |title: &String| -> Result<String> {
        let Some((_, job)) = JOBS.iter().find(|(known, _)| known == title) else {
            bail!("'{title}' names no job");
        };
        Ok(row_of(job)?.as_ref().map_or(NOTHING.into(), figure))
    };
    header[1..].iter().map(column).collect()
}

/// The cells of a line of a table.
fn cells(line: &str) -> Option<Vec<String>> {
    let inner = line.strip_prefix('|')?.trim_end().strip_suffix('|')?;
    Some(inner.split('|').map(|cell| cell.trim().to_owned()).collect())
}

/// The directory of a result, of a line that links it.
fn linked(line: &str) -> Option<String> {
    let (_, after) = line.split_once("results/2")?;
    Some(format!("2{}", after.split_once('/')?.0))
}

/// That of a row that links it with `[text][label]`.
fn result_of(row: &str, document: &str) -> Option<String> {
    let label = row.split_once("][")?.1.split_once(']')?.0;
    let target = document.lines().find(|line| line.starts_with(&format!("[{label}]: ")))?;
    linked(target)
}
