// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Completion latency of one job: percentiles from the median to 99.99, one line per target.

use super::axis::Axis;
use super::{Anchor, CHARACTER, LINE, Plot};
use crate::outcome::{JobInfo, Latency};
use crate::render::palette::Palette;
use crate::stats;
use crate::units::{self, time};

/// Percentiles and their names.
pub(in crate::render) const PERCENTILES: [(f64, &str); 5] =
    [(0.5, "50"), (0.9, "90"), (0.99, "99"), (0.999, "99.9"), (0.9999, "99.99")];
const HEIGHT: f64 = 230.0;

pub(in crate::render) fn curves(job: &JobInfo, latencies: &[&Latency], palette: &Palette) -> Option<Plot> {
    let lines: Vec<(&Latency, Vec<(f64, f64)>)> = latencies
        .iter()
        .map(|latency| (*latency, curve(latency)))
        .filter(|(_, curve)| !curve.is_empty())
        .collect();
    let values = || lines.iter().flat_map(|(_, curve)| curve.iter().map(|(_, ns)| *ns));
    let (least, most) = (values().fold(f64::INFINITY, f64::min), values().fold(0.0, f64::max));
    if lines.is_empty() {
        return None;
    }
    let title = format!("{}: latency", job.title);
    let about = format!(
        "Percentiles of completion latency on log axes, all rounds together; {} to {}.",
        time(least),
        time(most)
    );
    Some(Plot::new(&format!("latency-{}", job.name), &title, about, |canvas, top| {
        canvas.text("soft", 0.0, top, Anchor::Start, "latency (log scale)");
        let top = top + LINE;
        let bottom = top + canvas.tall(HEIGHT, lines.len());
        let (names, longest) = canvas.names(lines.iter().map(|(latency, _)| latency.target.as_str()));
        let right = canvas.width - longest - 14.0;
        let y = Axis::log((least / 1.05, most * 1.05), (bottom, top));
        let left = 8.0 * CHARACTER;
        let x = Axis::log((2.0, 10_000.0), (left, right - 18.0));
        for tick in y.ticks() {
            canvas.line("rule", (left, y.place(tick)), (x.places.1, y.place(tick)));
            canvas.text("soft", left - 7.0, y.place(tick), Anchor::End, &units::tick(&time(tick)));
        }
        for (share, name) in PERCENTILES {
            let place = x.place(1.0 / (1.0 - share));
            canvas.line("rule", (place, top), (place, bottom));
            canvas.text("soft", place, bottom + LINE * 0.75, Anchor::Middle, name);
        }
        let middle = f64::midpoint(left, x.places.1);
        canvas.text("soft", middle, bottom + LINE * 1.75, Anchor::Middle, "percentile (log scale)");
        let mut ends = Vec::new();
        for ((latency, curve), name) in lines.iter().zip(names) {
            let style = palette.of(&latency.target);
            let points: Vec<(f64, f64)> =
                curve.iter().map(|(rarity, ns)| (x.place(*rarity), y.place(*ns))).collect();
            canvas.path(style, &points);
            if let Some(end) = points.last() {
                ends.push((name, style, *end));
            }
        }
        canvas.ends(ends, right, (top + 2.0, bottom - 2.0));
        bottom + LINE * 2.5
    }))
}

/// Rarity (one in …) and latency, as far as enough completions were that rare.
fn curve(latency: &Latency) -> Vec<(f64, f64)> {
    const STEPS: u32 = 40;
    let at = |step: u32| 2.0 * 5000f64.powf(f64::from(step) / f64::from(STEPS));
    let point = |rarity: f64| Some((rarity, stats::percentile(&latency.counts, 1.0 - 1.0 / rarity)?));
    (0..=STEPS).map_while(|step| point(at(step))).map(|(rarity, ns)| (rarity, (ns as f64).max(1.0))).collect()
}
