//! Ratios to a reference with their intervals: a group a job, a line a contender.

use super::axis::Axis;
use super::{Anchor, Canvas, LINE, Plot, WIDTH};
use crate::render::palette::Style;
use crate::render::units::ratio;
use crate::summary::Interval;

/// A job and, a contender, what it reached there.
pub(in crate::render) struct Group {
    pub(in crate::render) title: String,
    pub(in crate::render) points: Vec<Option<(f64, Interval)>>,
}

const STEP: f64 = 15.0;
/// Quotient of the ends from which on ticks are few.
const WIDE: f64 = 6.0;

pub(in crate::render) fn forest(
    title: &str,
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
    let (mut canvas, top) = Canvas::titled(title);
    let seen = |index: usize| groups.iter().any(|group| group.points.get(index).is_some_and(Option::is_some));
    let shown = contenders.iter().enumerate().filter(|(index, _)| seen(*index));
    let shown: Vec<(String, Style)> = shown.map(|(_, contender)| contender.clone()).collect();
    let top = canvas.legend(&shown, top + 2.0);
    let x = Axis::log((least, most), (8.0, WIDTH - 44.0));
    let height = |group: &Group| LINE + group.points.iter().flatten().count() as f64 * STEP + 8.0;
    let bottom = top + groups.iter().map(height).sum::<f64>();
    // Where much is to be shown there is room for few.
    let ticks: &[f64] = if most / least > WIDE {
        &[0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0]
    } else {
        &[0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0]
    };
    for &tick in ticks.iter().filter(|tick| (least..=most).contains(*tick)) {
        let class = if tick == 1.0 { "mark" } else { "rule" };
        canvas.line(class, (x.place(tick), top), (x.place(tick), bottom));
        canvas.text("soft", x.place(tick), bottom + LINE * 0.7, Anchor::Middle, &format!("{tick} ×"));
    }
    let mut y = top;
    for group in groups {
        canvas.text("halo", 0.0, y + LINE * 0.6, Anchor::Start, &group.title);
        y += LINE + 4.0;
        for (point, (_, style)) in group.points.iter().zip(contenders) {
            let Some((value, interval)) = point.filter(|(value, _)| fine(value)) else { continue };
            let middle = y + STEP * 0.5;
            let mut end = x.place(value);
            if let Some((low, high)) = interval {
                canvas.whisker(middle, x.place(low), x.place(high));
                end = end.max(x.place(high));
            }
            canvas.marker(*style, (x.place(value), middle));
            canvas.text("soft halo", end + 9.0, middle, Anchor::Start, &ratio(value));
            y += STEP;
        }
        y += 4.0;
    }
    Some(canvas.finish("ratios", title, about, bottom + LINE * 1.6))
}
