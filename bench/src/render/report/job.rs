// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The section of one job: rate, latency and cost of each target.

use super::cost::{self, below, writer};
use super::{heading, kind};
use crate::compare::instructions;
use crate::outcome::{JobInfo, Latency, Mode, Outcome};
use crate::render::doc::{Block, Line, Table};
use crate::render::palette::{Palette, RAW};
use crate::render::svg::{bars::bars, curves, stack::stack};
use crate::stats::percentile;
use crate::summary::{Row, rows};
use crate::units::{
    NOTHING, change, contradiction, count, known, operation, plain, rate, ratio_of, slug, time,
};

/// Explanation of the tables.
pub(super) fn legend(outcome: &Outcome) -> Block {
    let below = "what the whole system did less submitter and engine: drivers, file system, kernel threads, idle time";
    let mut facts = vec![
        ("values", "medians over the rounds; min … max: the slowest and the fastest round"),
        (
            "× (95 %)",
            "median of the ratios within each round, and its 95 % confidence interval \
            (bootstrap; needs five rounds)",
        ),
        ("▲ ▼ ≈", "faster than the reference, slower, no difference shown"),
        ("percentiles", "of completion latencies; each needs ten completions beyond it"),
        ("submitter", "CPU time of fio, including kernel time"),
        ("engine", "CPU time of the process that serves the target, including its kernel threads"),
        ("switches", "context switches of that process"),
        ("punts", "requests that went to a kernel worker thread"),
    ];
    if outcome.manifest.mode == Mode::Icount {
        facts.insert(6, ("below", below));
    }
    Block::Facts(facts.into_iter().map(|(name, what)| (name.to_owned(), what.to_owned())).collect())
}

pub(super) fn job(outcome: &Outcome, job: &JobInfo, palette: &Palette) -> Vec<Block> {
    let rows = rows(outcome, job);
    let mut blocks =
        vec![heading(3, &format!("job-{}", slug(&job.name)), &job.title), Block::Text(job.question.clone())];
    if rows.is_empty() {
        blocks.push(Block::Text("Nothing was measured.".into()));
        return blocks;
    }
    let mode = outcome.manifest.mode;
    blocks.push(Block::Table(rates(job, &rows, mode)));
    blocks.extend(contradiction(&rows, &rate(job)).map(Block::Text));
    let mut latencies: Vec<&Latency> = outcome.latencies.iter().filter(|l| l.job == job.name).collect();
    let place = |latency: &Latency| outcome.targets.iter().position(|target| target.name == latency.target);
    latencies.sort_by_key(|latency| place(latency));
    let plots =
        [bars(job, &rows, palette), curves::curves(job, &latencies, palette), stack(job, &rows, mode)];
    let plots: Vec<_> = plots.into_iter().flatten().collect();
    if !plots.is_empty() {
        blocks.push(Block::Plots(plots));
    }
    let tails = tails(job, &latencies);
    let costs = costs(job, &rows, mode);
    blocks.extend([tails, costs].into_iter().filter(|table| table.columns.len() > 1).map(Block::Table));
    blocks
}

fn rates(job: &JobInfo, rows: &[Row], mode: Mode) -> Table {
    let reference = format!("× {} (95 %)", plain(&job.reference));
    let each = format!("instructions per {}", operation(job));
    let rate = rate(job);
    let titles = ["<target", &rate, &reference, "min … max", "MB/s", "p50", "p99", &each, "above raw file"];
    let mut table = Table::new(format!("{}: throughput", job.title), &titles);
    let raw = rows.iter().find(|row| row.target == RAW).map(|raw| instructions(&raw.cost, raw.iops));
    for row in rows {
        let work = Some(instructions(&row.cost, row.iops)).filter(|_| mode == Mode::Icount);
        let more = work.zip(raw).filter(|_| row.target != RAW);
        let more = more.map(|(ours, raw)| format!("{} ({})", signed(ours - raw), change(ours / raw)));
        let cells = vec![
            plain(&row.target),
            count(row.iops),
            ratio_of(row),
            format!("{} … {}", count(row.range.0), count(row.range.1)),
            count(row.bytes_per_s / 1e6),
            time(row.p50_ns),
            time(row.p99_ns),
            known(work, count),
            more.unwrap_or(NOTHING.into()),
        ];
        let kind = kind(&row.target, &job.reference);
        table.lines.push(Line { cells, kind, verdict: Some(row.verdict()) });
    }
    table.condensed()
}

fn signed(value: f64) -> String {
    format!("{}{}", if value < 0.0 { "−" } else { "+" }, count(value.abs()))
}

fn tails(job: &JobInfo, latencies: &[&Latency]) -> Table {
    let names: Vec<String> = curves::PERCENTILES.iter().map(|(_, name)| format!("p{name}")).collect();
    let mut titles = vec!["<target"];
    titles.extend(names.iter().map(String::as_str));
    titles.extend(["longest", "completions"]);
    let mut table = Table::new(format!("{}: latency of completion, all rounds together", job.title), &titles);
    for latency in latencies {
        let mut cells = vec![plain(&latency.target)];
        let at = |share| known(percentile(&latency.counts, share).map(|ns| ns as f64), time);
        cells.extend(curves::PERCENTILES.iter().map(|(share, _)| at(*share)));
        let seen = latency.counts.iter().filter(|(_, often)| *often > 0);
        cells.push(known(seen.map(|(ns, _)| *ns as f64).reduce(f64::max), time));
        cells.push(count(latency.counts.iter().map(|(_, often)| *often as f64).sum()));
        table.line(kind(&latency.target, &job.reference), cells);
    }
    table.condensed()
}

fn costs(job: &JobInfo, rows: &[Row], mode: Mode) -> Table {
    let write = writer(mode);
    let what = cost::unit(mode);
    let each = operation(job);
    let mut table = Table::new(
        format!("{}: {what} per {each}", job.title),
        &["<target", "submitter", "engine", "below", "switches", "punts", "engine CPU s/GiB"],
    );
    for row in rows {
        let spent = &row.cost;
        // A nanosecond per byte is 1.07 s per GiB.
        let gib = spent.engine_ns.map(|ns| ns * 1e-9 * (1u64 << 30) as f64 * row.iops / row.bytes_per_s);
        let cells = vec![
            plain(&row.target),
            known(spent.submitter_ns, write),
            known(spent.engine_ns, write),
            known(below(spent), write),
            known(spent.switches, count),
            known(spent.punts, count),
            known(gib, count),
        ];
        table.line(kind(&row.target, &job.reference), cells);
    }
    table.condensed()
}
