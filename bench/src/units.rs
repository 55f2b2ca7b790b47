// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Formats numbers and names for readers.
//!
//! Knows units, and which characters must not reach a terminal or a page.

use crate::outcome::JobInfo;
use crate::summary::{self, Row, Verdict};

/// Stands for a missing value.
pub(crate) const NOTHING: &str = "–";

/// Three significant digits.
fn three(value: f64) -> String {
    let digits = match value.abs() {
        size if size >= 99.95 => 0,
        size if size >= 9.995 => 1,
        _ => 2,
    };
    format!("{value:.digits$}")
}

/// Scales to the largest of `units` that gives a number of at least one.
fn scaled(value: f64, units: &[(f64, &str)]) -> String {
    if !value.is_finite() {
        return NOTHING.into();
    }
    // 999.7 becomes 1.00 of the next unit, not 1000.
    let fits = |(size, _): &&(f64, &str)| value.abs() >= size * 0.9995;
    let (size, unit) = units.iter().find(fits).or(units.last()).unwrap_or(&(1.0, ""));
    format!("{}{unit}", three(value / size))
}

/// "76.8K"
pub(crate) fn count(value: f64) -> String {
    if value == 0.0 {
        return "0".into();
    }
    scaled(value, &[(1e9, "G"), (1e6, "M"), (1e3, "K"), (1.0, "")])
}

/// "12.3 µs"
pub(crate) fn time(ns: f64) -> String {
    // 0 means that it was not measured.
    if ns == 0.0 {
        return NOTHING.into();
    }
    if ns.abs() < 0.9995e3 {
        return if ns.is_finite() { format!("{ns:.0} ns") } else { NOTHING.into() };
    }
    scaled(ns, &[(1e9, " s"), (1e6, " ms"), (1e3, " µs")])
}

/// "42.5 KiB"
pub(crate) fn kib(kib: f64) -> String {
    scaled(kib, &[(1024.0 * 1024.0, " GiB"), (1024.0, " MiB"), (1.0, " KiB")])
}

/// Without trailing zeros, for an axis: "75K", "20 µs".
pub(crate) fn tick(text: &str) -> String {
    let digits = |c: char| c.is_ascii_digit() || c == '.';
    let (number, unit) = text.split_at(text.find(|c| !digits(c)).unwrap_or(text.len()));
    let number =
        if number.contains('.') { number.trim_end_matches('0').trim_end_matches('.') } else { number };
    format!("{number}{unit}")
}

/// "1.27", "0.085"
pub(crate) fn ratio(value: f64) -> String {
    match value {
        value if !value.is_finite() => NOTHING.into(),
        value if value.abs() < 0.1 => format!("{value:.3}"),
        value => three(value),
    }
}

/// "0.85 to 1.36", or "0.85". None: there are no ratios.
pub(crate) fn span(ratios: impl Iterator<Item = f64>) -> Option<String> {
    let [least, most] = ratios.fold(None, |span: Option<[f64; 2]>, value| {
        let [least, most] = span.unwrap_or([value; 2]);
        Some([least.min(value), most.max(value)])
    })?;
    let (least, most) = (ratio(least), ratio(most));
    Some(if least == most { least } else { format!("{least} to {most}") })
}

/// "+1.3 %" for 1.013.
pub(crate) fn change(quotient: f64) -> String {
    if quotient.is_finite() { format!("{:+.1} %", (quotient - 1.0) * 100.0) } else { NOTHING.into() }
}

/// Formats the value with `write`; a dash if there is none.
pub(crate) fn known(value: Option<f64>, write: impl Fn(f64) -> String) -> String {
    value.map_or(NOTHING.into(), write)
}

/// "1.36 (1.04 … 1.70) ▲": a ratio, its interval and the verdict.
pub(crate) fn ratio_of(row: &Row) -> String {
    match (row.ratio, row.ratio_interval) {
        (None, _) => NOTHING.into(),
        (Some(value), None) => ratio(value),
        (Some(value), Some((low, high))) => {
            format!("{} ({} … {}) {}", ratio(value), ratio(low), ratio(high), mark(row.verdict()))
        }
    }
}

/// Explains a row with a larger median and a smaller ratio, if there is one.
pub(crate) fn contradiction(rows: &[Row], rate: &str) -> Option<String> {
    let (more, less) = summary::contradiction(rows)?;
    Some(format!(
        "{} has more {rate} than {}, but a smaller ×: × is the median of the ratios within each round, not the ratio of \
         the medians.",
        plain(&more.target),
        plain(&less.target)
    ))
}

/// Symbol of a verdict.
pub(crate) fn mark(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Faster => "▲",
        Verdict::Slower => "▼",
        Verdict::NoDifference => "≈",
        Verdict::Unknown => "",
    }
}

/// "IOPS", or "files/s".
pub(crate) fn rate(job: &JobInfo) -> String {
    job.unit.as_ref().map_or("IOPS".into(), |unit| format!("{}s/s", plain(unit)))
}

/// Unit of an operation: "I/O" or "file".
pub(crate) fn operation(job: &JobInfo) -> String {
    job.unit.as_ref().map_or("I/O".into(), |unit| plain(unit))
}

/// One line without control characters, which would control a terminal and are not valid XML.
pub(crate) fn plain(text: &str) -> String {
    let steers = |c: char| c.is_control() || matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    let known = |c: char| match c {
        '\n' | '\t' => ' ',
        c if steers(c) || matches!(c, '\u{fffe}' | '\u{ffff}') => '\u{fffd}',
        c => c,
    };
    text.chars().map(known).collect()
}

/// Truncates to `length` characters.
pub(crate) fn short(text: &str, length: usize) -> String {
    let text = plain(text);
    if text.chars().count() <= length {
        return text;
    }
    text.chars().take(length.saturating_sub(1)).chain(['…']).collect()
}

/// Wraps to lines of at most `length` characters.
pub(crate) fn wrapped(text: &str, length: usize) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in text.split_whitespace() {
        match lines.last_mut() {
            Some(line) if line.chars().count() + 1 + word.chars().count() <= length => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_owned()),
        }
    }
    lines
}

/// Escapes text and attribute values of HTML and SVG.
pub(crate) fn escape(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for c in plain(text).chars() {
        match c {
            '&' => safe.push_str("&amp;"),
            '<' => safe.push_str("&lt;"),
            '>' => safe.push_str("&gt;"),
            '"' => safe.push_str("&quot;"),
            '\'' => safe.push_str("&#39;"),
            c => safe.push(c),
        }
    }
    safe
}

/// A name for a file or an anchor.
pub(crate) fn slug(text: &str) -> String {
    let kept = |c: char| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' };
    text.chars().map(kept).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_three_digits_that_count() {
        let shown = [76_812.0, 7_420.0, 1_250_000.0, 312.4, 0.0, 999.7, 9.999, 0.5].map(count);
        assert_eq!(shown, ["76.8K", "7.42K", "1.25M", "312", "0", "1.00K", "10.0", "0.50"]);
        let shown = [0.0, 640.0, 999.9, 12_345.0, 2_408_400.0, 3e9].map(time);
        assert_eq!(shown, ["–", "640 ns", "1.00 µs", "12.3 µs", "2.41 ms", "3.00 s"]);
        assert_eq!(["75.0K", "2.50 ms", "100", "0", "–"].map(tick), ["75K", "2.5 ms", "100", "0", "–"]);
        assert_eq!([512.0, 42_540.0].map(kib), ["512 KiB", "41.5 MiB"]);
        assert_eq!([1.273, 0.0852, 22.44].map(ratio), ["1.27", "0.085", "22.4"]);
        assert_eq!([1.013, 0.5].map(change), ["+1.3 %", "-50.0 %"]);
    }

    #[test]
    fn invalid_numbers_become_a_dash() {
        for write in [count, time, kib, ratio, change] {
            assert_eq!([f64::NAN, f64::INFINITY, f64::NEG_INFINITY].map(write), [NOTHING; 3]);
        }
    }

    #[test]
    fn names_are_made_harmless() {
        assert_eq!(escape("<b a=\"x\">&'"), "&lt;b a=&quot;x&quot;&gt;&amp;&#39;");
        assert_eq!(plain("a\x1b[31m\nb\0"), "a\u{fffd}[31m b\u{fffd}");
        assert_eq!(slug("../Etc/p wd"), "---etc-p-wd");
        assert_eq!((short("abcdef", 4), short("abcd", 4)), ("abc…".into(), "abcd".into()));
    }
}
