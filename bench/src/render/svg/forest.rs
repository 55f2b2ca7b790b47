// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Ratios to a reference with their intervals: one group per job, one line per contender.

use super::axis::Axis;
use super::{Anchor, CHARACTER, LINE, Plot, WIDE};
use crate::render::palette::Style;
use crate::summary::Interval;
use crate::units::ratio;

/// A job, and the ratio of each contender.
pub(in crate::render) struct Group {
    pub(in crate::render) title: String,
    pub(in crate::render) points: Vec<Option<Point>>,
}

/// A ratio and its interval.
pub(in crate::render) type Point = (f64, Interval);

const STEP: f64 = 15.0;
/// If the ends differ by more than this factor, the axis has fewer ticks.
const WIDE_SPAN: f64 = 6.0;

pub(in crate::render) fn forest(
    reference: &str,
    about: String,
    contenders: &[(String, Style)],
    groups: &[Group],
) -> Option<Plot> {
    let fine = |value: &f64| value.is_finite() && *value > 0.0;
    let points = groups.iter().flat_map(|group| group.points.iter().flatten());
    let values = points.flat_map(|(value, interval)| {
        let (low, high) = interval.unwrap_or((*value, *value));
        [*value, low, high]
    });
    let values: Vec<f64> = values.filter(fine).collect();
    if values.is_empty() {
        return None;
    }
    let least = values.iter().copied().fold(0.8, f64::min) / 1.05;
    let most = values.iter().copied().fold(1.25, f64::max) * 1.05;
    let seen = |index: usize| groups.iter().any(|group| group.points.get(index).is_some_and(Option::is_some));
    let shown = contenders.iter().enumerate().filter(|(index, _)| seen(*index));
    let shown: Vec<(String, Style)> = shown.map(|(_, contender)| contender.clone()).collect();
    // A wide axis has room for few ticks.
    let ticks: &[f64] = if most / least > WIDE_SPAN {
        &[0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0]
    } else {
        &[0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0]
    };
    let ticks = || ticks.iter().copied().filter(|tick| (least..=most).contains(tick));
    let title = format!("Throughput as a multiple of {reference}");
    Some(Plot::new("ratios", &title, about, |canvas, top| {
        let mut y = canvas.legend(&shown, top + 2.0);
        // Values have their own column, with the interval if there is room, so that no line crosses
        // them.
        let with_interval = canvas.width >= WIDE;
        let written = |(value, interval): Point| match interval.filter(|_| with_interval) {
            Some((low, high)) => format!("{} ({} … {})", ratio(value), ratio(low), ratio(high)),
            None => ratio(value),
        };
        let of = |group: &Group| -> Vec<(Point, Style)> {
            let points = group.points.iter().zip(contenders);
            points
                .filter_map(|(point, (_, style))| Some((point.filter(|(it, _)| fine(it))?, *style)))
                .collect()
        };
        let lengths = groups.iter().flat_map(of).map(|(point, _)| written(point).chars().count());
        let column = lengths.max().unwrap_or(0) as f64 * CHARACTER + 12.0;
        let x = Axis::log((least, most), (8.0, canvas.width - column));
        canvas.line_name(x.place(1.0), y + LINE * 0.3, reference);
        y += LINE * 0.9;
        for group in groups {
            canvas.text("", 0.0, y + LINE * 0.6, Anchor::Start, &group.title);
            let points = of(group);
            y += LINE + 4.0;
            // The line is beside the points only, so that it does not cross a title.
            let bottom = y + points.len() as f64 * STEP;
            for tick in ticks() {
                let class = if tick == 1.0 { "mark" } else { "rule" };
                canvas.line(class, (x.place(tick), y), (x.place(tick), bottom));
            }
            for ((value, interval), style) in points {
                let middle = y + STEP * 0.5;
                if let Some((low, high)) = interval {
                    canvas.whisker(middle, x.place(low), x.place(high));
                }
                canvas.marker(style, (x.place(value), middle));
                canvas.text("soft", canvas.width, middle, Anchor::End, &written((value, interval)));
                y += STEP;
            }
            y += 4.0;
        }
        for tick in ticks() {
            canvas.text("soft", x.place(tick), y + LINE * 0.7, Anchor::Middle, &format!("{tick} ×"));
        }
        let middle = f64::midpoint(x.places.0, x.places.1);
        canvas.text("soft", middle, y + LINE * 1.7, Anchor::Middle, &format!("× {reference} (log scale)"));
        y + LINE * 2.4
    }))
}
