// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Cost of an operation by layer: submitter, engine and everything below, as stacked bars.

use super::axis::Axis;
use super::{Anchor, CHARACTER, Plot};
use crate::outcome::{JobInfo, Mode};
use crate::render::palette::Style;
use crate::render::report::cost::{Parts, parts, unit, writer};
use crate::summary::Row;
use crate::units::operation;

const STEP: f64 = 23.0;
const THICK: f64 = 14.0;
/// Colours of layers, different from those of targets.
const LAYERS: [(&str, &str); 3] = [("submitter", "#aab2bd"), ("engine", "#6f58a8"), ("below", "#65707c")];

pub(in crate::render) fn stack(job: &JobInfo, rows: &[Row], mode: Mode) -> Option<Plot> {
    let known = rows.iter().filter_map(|row| Some((row, parts(&row.cost)?)));
    let rows: Vec<(&Row, Parts)> = known.filter(|(_, parts)| parts.sum() > 0.0).collect();
    let most = rows.iter().map(|(_, parts)| parts.sum()).fold(0.0, f64::max);
    if rows.is_empty() {
        return None;
    }
    let write = writer(mode);
    let title = format!("{}: {} per {}", job.title, unit(mode), operation(job));
    let used = |layer: usize| rows.iter().any(|(_, parts)| parts.layers()[layer] > 0.0);
    let shown = LAYERS.iter().enumerate().filter(|(layer, _)| used(*layer));
    let entries: Vec<(String, Style)> = shown
        .map(|(_, (name, colour))| ((*name).to_owned(), Style { colour, dash: "", marker: 1 }))
        .collect();
    let listed: Vec<String> =
        rows.iter().map(|(row, parts)| format!("{} {}", row.target, write(parts.sum()))).collect();
    Some(Plot::new(&format!("cost-{}", job.name), &title, listed.join(", ") + ".", |canvas, top| {
        let top = canvas.legend(&entries, top + 2.0);
        let (names, longest) = canvas.names(rows.iter().map(|(row, _)| row.target.as_str()));
        let left = longest + 8.0;
        let bottom = top + rows.len() as f64 * STEP;
        let x = Axis::linear(most, (left, canvas.width - 9.0 * CHARACTER));
        for (index, ((_, parts), name)) in rows.iter().zip(&names).enumerate() {
            let y = top + (index as f64 + 0.5) * STEP;
            canvas.text("", left - 8.0, y, Anchor::End, name);
            let mut below = 0.0;
            for (value, (_, colour)) in parts.layers().into_iter().zip(LAYERS) {
                let from = x.place(below);
                below += value;
                canvas.bar(colour, (from, y - THICK / 2.0), x.place(below) - from, THICK);
            }
            canvas.text("", x.place(below) + 6.0, y, Anchor::Start, &write(below));
        }
        canvas.line("base", (left, top), (left, bottom));
        bottom + 8.0
    }))
}
