//! Operations a second at one job: a bar a target, whiskers for the interval of its median.

use super::axis::Axis;
use super::{Anchor, CHARACTER, Canvas, LINE, Plot, WIDTH};
use crate::outcome::JobInfo;
use crate::render::palette::Palette;
use crate::render::units::{self, count, rate, short};
use crate::summary::Row;

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
    let (mut canvas, top) = Canvas::titled(&title);
    let names: Vec<String> = rows.iter().map(|row| short(&row.target, 21)).collect();
    let longest = names.iter().map(|name| name.chars().count()).max().unwrap_or(0);
    let left = longest as f64 * CHARACTER + 8.0;
    let bottom = top + rows.len() as f64 * STEP;
    // Room at the right for the number behind the longest bar.
    let x = Axis::linear(most, (left, WIDTH - 7.0 * CHARACTER));
    for tick in x.ticks() {
        canvas.line("rule", (x.place(tick), top), (x.place(tick), bottom));
        canvas.text("soft", x.place(tick), bottom + LINE * 0.7, Anchor::Middle, &units::tick(&count(tick)));
    }
    let reference = rows.iter().find(|row| row.target == job.reference).map(|row| x.place(row.iops));
    for (index, (row, name)) in rows.iter().zip(&names).enumerate() {
        let y = top + (index as f64 + 0.5) * STEP;
        canvas.text("", left - 8.0, y, Anchor::End, name);
        canvas.bar(palette.of(&row.target).colour, (left, y - THICK / 2.0), x.place(row.iops) - left, THICK);
        // Over the bars, under their numbers.
        if let Some(place) = reference {
            canvas.line("mark", (place, y - STEP / 2.0), (place, y + STEP / 2.0));
        }
        let mut end = x.place(row.iops);
        if let Some((low, high)) = row.iops_interval {
            canvas.whisker(y, x.place(low), x.place(high));
            end = end.max(x.place(high));
        }
        canvas.text("halo", end + 6.0, y, Anchor::Start, &count(row.iops));
    }
    canvas.line("base", (left, top), (left, bottom));
    let listed: Vec<String> = rows.iter().map(|row| format!("{} {}", row.target, count(row.iops))).collect();
    let about = format!("Median {}: {}. Dashed line: {}.", rate(job), listed.join(", "), job.reference);
    Some(canvas.finish(&format!("iops-{}", job.name), &title, about, bottom + LINE * 1.5))
}
