// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Throughput against depth: one line per target, over jobs that differ only in depth.

use super::axis::Axis;
use super::{Anchor, CHARACTER, LINE, Plot};
use crate::outcome::{JobInfo, Outcome};
use crate::render::palette::Palette;
use crate::summary::rows;
use crate::units::{self, count};

const HEIGHT: f64 = 240.0;

pub(in crate::render) fn depth(outcome: &Outcome, palette: &Palette) -> Option<Plot> {
    let jobs = reads(outcome);
    let mut lines: Vec<(String, Vec<(f64, f64)>)> = Vec::new();
    for (depth, job) in &jobs {
        for row in rows(outcome, job).into_iter().filter(|row| row.iops.is_finite()) {
            let point = (f64::from(*depth), row.iops);
            match lines.iter_mut().find(|(target, _)| *target == row.target) {
                Some((_, line)) => line.push(point),
                None => lines.push((row.target, vec![point])),
            }
        }
    }
    let ((least, _), (deepest, _)) = (jobs.first()?, jobs.last()?);
    if least == deepest || lines.is_empty() {
        return None;
    }
    let title = format!("{}: IOPS against depth", plain_title(jobs[0].1));
    let most = lines.iter().flat_map(|(_, line)| line.iter().map(|(_, iops)| *iops)).fold(0.0, f64::max);
    let about = format!("Median IOPS of {} targets at depths {least} to {deepest}.", lines.len());
    Some(Plot::new("depth", &title, about, |canvas, top| {
        let top = top + 4.0;
        let bottom = top + canvas.tall(HEIGHT, lines.len());
        let (names, longest) = canvas.names(lines.iter().map(|(target, _)| target.as_str()));
        let (left, right) = (6.0 * CHARACTER, canvas.width - longest - 14.0);
        let y = Axis::linear(most * 1.05, (bottom, top));
        let x = Axis::log((f64::from(*least), f64::from(*deepest)), (left + 8.0, right - 22.0));
        for tick in y.ticks() {
            canvas.line("rule", (left, y.place(tick)), (x.places.1, y.place(tick)));
            canvas.text("soft", left - 7.0, y.place(tick), Anchor::End, &units::tick(&count(tick)));
        }
        for (depth, _) in &jobs {
            let place = x.place(f64::from(*depth));
            canvas.line("rule", (place, top), (place, bottom));
            canvas.text("soft", place, bottom + LINE * 0.75, Anchor::Middle, &depth.to_string());
        }
        let middle = f64::midpoint(left, x.places.1);
        canvas.text("soft", middle, bottom + LINE * 1.75, Anchor::Middle, "I/Os in flight (log scale)");
        let mut ends = Vec::new();
        for ((target, line), name) in lines.iter().zip(names) {
            let style = palette.of(target);
            let points: Vec<(f64, f64)> =
                line.iter().map(|(depth, iops)| (x.place(*depth), y.place(*iops))).collect();
            canvas.path(style, &points);
            for point in &points {
                canvas.marker(style, *point);
            }
            if let Some(end) = points.last() {
                ends.push((name, style, *end));
            }
        }
        canvas.ends(ends, right, (top + 2.0, bottom - 2.0));
        bottom + LINE * 2.5
    }))
}

/// The jobs that were run at the most depths, by depth; of two at the same depth the first.
fn reads(outcome: &Outcome) -> Vec<(u32, &JobInfo)> {
    let measured = |job: &&JobInfo| {
        let reads = kind(job).contains("read") && job.unit.is_none();
        reads && outcome.samples.iter().any(|sample| sample.job == job.name)
    };
    let mut best: Vec<(u32, &JobInfo)> = Vec::new();
    for first in outcome.jobs.iter().filter(measured) {
        let mut same: Vec<(u32, &JobInfo)> = Vec::new();
        for job in outcome.jobs.iter().filter(measured).filter(|job| kind(job) == kind(first)) {
            if let Some(depth) = job.depth.filter(|depth| *depth > 0)
                && !same.iter().any(|(present, _)| *present == depth)
            {
                same.push((depth, job));
            }
        }
        if same.len() > best.len() {
            best = same;
        }
    }
    best.sort_by_key(|(depth, _)| *depth);
    best
}

/// "4K random read"
fn plain_title(job: &JobInfo) -> &str {
    job.title.split(", depth").next().unwrap_or(&job.title)
}

/// The name of a job without its depth.
fn kind(job: &JobInfo) -> &str {
    job.name.split("-qd").next().unwrap_or(&job.name)
}
