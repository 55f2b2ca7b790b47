// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Plots as SVG: for a phone and for a desktop, light or dark, with a title and a description for
//! screen readers.
//!
//! This file has the drawing functions, the others one kind of plot each. None knows the page.

mod axis;
pub(super) mod bars;
pub(super) mod curves;
pub(super) mod depth;
pub(super) mod forest;
pub(super) mod stack;

use std::fmt::Write;

use super::palette::Style;
use crate::units::{escape, short, slug, wrapped};

/// Widths of a plot. On 358 of a phone's 390 pixels, text of `SIZE` is 11 pixels high.
const NARROW: f64 = 420.0;
const WIDE: f64 = 880.0;
const SIZE: f64 = 13.0;
/// Average width of a character in DejaVu, the widest font that `plot.css` names.
const CHARACTER: f64 = 7.9;
/// Distance between lines of text.
const LINE: f64 = 17.0;
/// Style of all plots, for single files and for the page.
pub(super) const CSS: &str = include_str!("plot.css");

/// A finished plot.
pub(super) struct Plot {
    name: String,
    pub(super) title: String,
    /// Description in words.
    pub(super) about: String,
    narrow: Canvas,
    wide: Canvas,
}

impl Plot {
    /// Draws for both widths; `draw` starts below the title and returns its height.
    fn new(name: &str, title: &str, about: String, draw: impl Fn(&mut Canvas, f64) -> f64) -> Plot {
        let on = |width| {
            let (mut canvas, top) = Canvas::titled(width, title);
            canvas.height = draw(&mut canvas, top);
            canvas
        };
        Plot { name: slug(name), title: title.to_owned(), about, narrow: on(NARROW), wide: on(WIDE) }
    }

    /// Name of the file in `plots/`.
    pub(super) fn file(&self) -> String {
        format!("{}.svg", self.name)
    }

    /// As a stand-alone file.
    pub(super) fn standalone(&self) -> String {
        let paper = "<rect class=\"paper\" width=\"100%\" height=\"100%\"/>";
        self.element("wide", &self.wide, &format!("<style>{}</style>{paper}", CSS.trim())) + "\n"
    }

    /// As part of a page that has `CSS` and shows the variant for its width.
    pub(super) fn inline(&self) -> String {
        self.element("narrow", &self.narrow, "") + &self.element("wide", &self.wide, "")
    }

    fn element(&self, class: &str, Canvas { width, height, body }: &Canvas, before: &str) -> String {
        let (id, height) = (format!("{}-{class}", self.name), n(*height));
        let (title, about) = (escape(&self.title), escape(&self.about));
        format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" class=\"plot {class}\" viewBox=\"0 0 {width} {height}\" \
             role=\"img\" aria-labelledby=\"{id}-title {id}-about\"><title id=\"{id}-title\">{title}</title>\
             <desc id=\"{id}-about\">{about}</desc>{before}{body}</svg>"
        )
    }
}

/// A plot being drawn.
struct Canvas {
    width: f64,
    height: f64,
    body: String,
}

/// Which point of a text its position refers to.
#[derive(Clone, Copy)]
enum Anchor {
    Start,
    Middle,
    End,
}

impl Canvas {
    /// An empty plot with its title, and the position below the title.
    fn titled(width: f64, title: &str) -> (Canvas, f64) {
        let mut canvas = Canvas { width, height: 0.0, body: String::new() };
        let mut y = LINE;
        for line in wrapped(title, (width / (CHARACTER * 1.1)) as usize) {
            canvas.text("title", 0.0, y, Anchor::Start, &line);
            y += LINE + 1.0;
        }
        (canvas, y)
    }

    /// Names of targets, truncated to leave room for the plot, and the width of the longest.
    fn names<'a>(&self, targets: impl Iterator<Item = &'a str>) -> (Vec<String>, f64) {
        let room = (0.4 * self.width / CHARACTER) as usize;
        let names: Vec<String> = targets.map(|target| short(target, room)).collect();
        let longest = names.iter().map(|name| name.chars().count()).max().unwrap_or(0);
        (names, longest as f64 * CHARACTER)
    }

    /// Height of a line plot: enough for the names of its lines.
    fn tall(&self, least: f64, lines: usize) -> f64 {
        least.max(0.36 * self.width).max(lines as f64 * (LINE - 2.0))
    }

    /// The name of a vertical line at `x`, above the line and within the plot.
    fn line_name(&mut self, x: f64, y: f64, name: &str) {
        let half = (name.chars().count() as f64 * CHARACTER / 2.0).min(self.width / 2.0);
        self.text("soft", x.clamp(half, self.width - half), y, Anchor::Middle, name);
    }

    fn line(&mut self, class: &str, from: (f64, f64), to: (f64, f64)) {
        let (x1, y1, x2, y2) = (n(from.0), n(from.1), n(to.0), n(to.1));
        self.add(format_args!("<line class=\"{class}\" x1=\"{x1}\" y1=\"{y1}\" x2=\"{x2}\" y2=\"{y2}\"/>"));
    }

    fn bar(&mut self, colour: &str, (x, y): (f64, f64), width: f64, height: f64) {
        let (x, y, width, height) = (n(x), n(y), n(width.max(0.0)), n(height));
        self.add(format_args!(
            "<rect x=\"{x}\" y=\"{y}\" width=\"{width}\" height=\"{height}\" fill=\"{colour}\"/>"
        ));
    }

    /// `y` is the vertical centre.
    fn text(&mut self, class: &str, x: f64, y: f64, anchor: Anchor, text: &str) {
        let anchor = match anchor {
            Anchor::Start => "start",
            Anchor::Middle => "middle",
            Anchor::End => "end",
        };
        // Some viewers do not support `dominant-baseline`.
        let (x, y, text) = (n(x), n(y + SIZE * 0.35), escape(text));
        self.add(format_args!(
            "<text class=\"{class}\" x=\"{x}\" y=\"{y}\" text-anchor=\"{anchor}\">{text}</text>"
        ));
    }

    fn path(&mut self, style: Style, points: &[(f64, f64)]) {
        let mut d = String::new();
        for (index, (x, y)) in points.iter().enumerate() {
            let _ = write!(d, "{}{} {}", if index == 0 { 'M' } else { 'L' }, n(*x), n(*y));
        }
        let dash = if style.dash.is_empty() {
            String::new()
        } else {
            format!(" stroke-dasharray=\"{}\"", style.dash)
        };
        self.add(format_args!("<path class=\"curve\" d=\"{d}\" stroke=\"{}\"{dash}/>", style.colour));
    }

    /// A marker of the given shape.
    fn marker(&mut self, style: Style, (x, y): (f64, f64)) {
        let path = match style.marker % 4 {
            0 => {
                let (x, y, colour) = (n(x), n(y), style.colour);
                return self.add(format_args!("<circle cx=\"{x}\" cy=\"{y}\" r=\"4\" fill=\"{colour}\"/>"));
            }
            1 => [(-3.5, -3.5), (3.5, -3.5), (3.5, 3.5), (-3.5, 3.5)],
            2 => [(0.0, -5.0), (5.0, 0.0), (0.0, 5.0), (-5.0, 0.0)],
            _ => [(0.0, -4.5), (4.5, 3.5), (-4.5, 3.5), (0.0, -4.5)],
        };
        let points: Vec<String> =
            path.iter().map(|(dx, dy)| format!("{},{}", n(x + dx), n(y + dy))).collect();
        self.add(format_args!("<polygon points=\"{}\" fill=\"{}\"/>", points.join(" "), style.colour));
    }

    /// A value with its interval, at height `y`.
    fn whisker(&mut self, y: f64, from: f64, to: f64) {
        self.line("whisker", (from, y), (to, y));
        for x in [from, to] {
            self.line("whisker", (x, y - 3.5), (x, y + 3.5));
        }
    }

    /// A legend in rows that fit; returns the position below it.
    fn legend(&mut self, entries: &[(String, Style)], mut y: f64) -> f64 {
        let mut x = 0.0;
        for (name, style) in entries {
            let width = name.chars().count() as f64 * CHARACTER + 30.0;
            if x > 0.0 && x + width > self.width {
                (x, y) = (0.0, y + LINE);
            }
            self.marker(*style, (x + 6.0, y));
            self.text("", x + 15.0, y, Anchor::Start, name);
            x += width;
        }
        if entries.is_empty() { y } else { y + LINE }
    }

    /// Names at the right ends of lines, moved apart so that they do not overlap.
    fn ends(&mut self, mut ends: Vec<(String, Style, (f64, f64))>, x: f64, (top, bottom): (f64, f64)) {
        ends.sort_by(|a, b| a.2.1.total_cmp(&b.2.1));
        let wanted: Vec<f64> = ends.iter().map(|end| end.2.1).collect();
        for ((name, style, end), y) in ends.into_iter().zip(apart(&wanted, LINE - 2.0, top, bottom)) {
            self.path(Style { dash: "1 2", ..style }, &[end, (x - 8.0, y)]);
            self.marker(style, (x, y));
            self.text("", x + 9.0, y, Anchor::Start, &name);
        }
    }

    fn add(&mut self, element: std::fmt::Arguments) {
        let _ = self.body.write_fmt(element);
    }
}

/// Ascending positions at least `gap` apart, close to the wanted ones. If there are too many, the
/// last ones are below the room.
fn apart(wanted: &[f64], gap: f64, top: f64, bottom: f64) -> Vec<f64> {
    let mut placed = wanted.to_vec();
    let mut next = top;
    for y in &mut placed {
        *y = y.max(next);
        next = *y + gap;
    }
    let mut last = bottom.max(top + gap * (wanted.len().max(1) - 1) as f64);
    for y in placed.iter_mut().rev() {
        *y = y.min(last);
        last = *y - gap;
    }
    placed
}

/// A short coordinate that is always a number.
fn n(value: f64) -> String {
    let rounded = (value * 10.0).round() / 10.0;
    if rounded.is_finite() { rounded.to_string() } else { "0".into() }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn labels_are_apart_in_order_and_inside(
            mut wanted in prop::collection::vec(0.0f64..300.0, 0..15)
        ) {
            wanted.sort_by(f64::total_cmp);
            let placed = apart(&wanted, 15.0, 10.0, 290.0);
            prop_assert!(placed.windows(2).all(|pair| pair[1] - pair[0] >= 15.0 - 1e-9));
            prop_assert!(placed.iter().all(|y| (10.0 - 1e-9..=290.0 + 1e-9).contains(y)));
        }

        #[test]
        fn a_wrapped_text_loses_no_word(text in "[a-z ]{0,80}") {
            let lines = wrapped(&text, 20);
            let words: Vec<&str> = text.split_whitespace().collect();
            prop_assert_eq!(lines.join(" "), words.join(" "));
        }
    }

    #[test]
    fn a_coordinate_is_a_number() {
        assert_eq!([f64::NAN, f64::INFINITY, 1.25, -0.04].map(n), ["0", "0", "1.3", "-0"]);
    }
}
