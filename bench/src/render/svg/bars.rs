// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Operations per second of one job: a bar per target, with whiskers for the interval of the
//! median.

use super::axis::Axis;
use super::{Anchor, CHARACTER, LINE, Plot};
use crate::outcome::JobInfo;
use crate::render::palette::Palette;
use crate::summary::Row;
use crate::units::{self, count, rate};

const STEP: f64 = 23.0;
const THICK: f64 = 14.0;

pub(in crate::render) fn bars(job: &JobInfo, rows: &[Row], palette: &Palette) -> Option<Plot> {
    let rows: Vec<&Row> = rows.iter().filter(|row| row.iops.is_finite() && row.iops >= 0.0).collect();
    let most =
        rows.iter().map(|row| row.iops_interval.map_or(row.iops, |(_, high)| high)).fold(0.0, f64::max);
    if rows.is_empty() {
        return None;
    }
    let title = format!("{}: {}", job.title, rate(job));
    let listed: Vec<String> = rows.iter().map(|row| format!("{} {}", row.target, count(row.iops))).collect();
    let about = format!("Median {}: {}. Dashed line: {}.", rate(job), listed.join(", "), job.reference);
    Some(Plot::new(&format!("iops-{}", job.name), &title, about, |canvas, top| {
        let (names, longest) = canvas.names(rows.iter().map(|row| row.target.as_str()));
        let left = longest + 8.0;
        // Numbers have their own column, so that no line crosses them.
        let x = Axis::linear(most, (left, canvas.width - 7.0 * CHARACTER));
        let reference = rows.iter().find(|row| row.target == job.reference).map(|row| x.place(row.iops));
        let top = top + reference.map_or(0.0, |_| LINE);
        let bottom = top + rows.len() as f64 * STEP;
        for tick in x.ticks() {
            canvas.line("rule", (x.place(tick), top), (x.place(tick), bottom));
            canvas.text(
                "soft",
                x.place(tick),
                bottom + LINE * 0.7,
                Anchor::Middle,
                &units::tick(&count(tick)),
            );
        }
        for (index, (row, name)) in rows.iter().zip(&names).enumerate() {
            let y = top + (index as f64 + 0.5) * STEP;
            canvas.text("", left - 8.0, y, Anchor::End, name);
            let length = x.place(row.iops) - left;
            canvas.bar(palette.of(&row.target).colour, (left, y - THICK / 2.0), length, THICK);
            if let Some((low, high)) = row.iops_interval {
                canvas.whisker(y, x.place(low), x.place(high));
            }
            canvas.text("", canvas.width, y, Anchor::End, &count(row.iops));
        }
        if let Some(place) = reference {
            canvas.line_name(place, top - LINE * 0.5, &job.reference);
            canvas.line("mark", (place, top), (place, bottom));
        }
        canvas.line("base", (left, top), (left, bottom));
        bottom + LINE * 1.5
    }))
}
