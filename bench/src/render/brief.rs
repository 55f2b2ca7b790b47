// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A short comparison for a terminal: ratios to the reference, and whether a difference is shown.
//!
//! Shows the rate of the reference only. A rate beside each ratio could contradict it: the ratio is
//! the median of the ratios within the rounds, not the ratio of the medians.

use std::fmt::Write;

use crate::outcome::Outcome;
use crate::summary::{Row, Verdict, rows};
use crate::units::{count, plain, rate, ratio, short};

/// Longer names are truncated.
const NAME: usize = 24;

/// A block per job: the reference with its rate, all others with their ratio and a verdict.
pub fn brief(outcome: &Outcome) -> String {
    let mut text = String::new();
    for job in &outcome.jobs {
        let rows = rows(outcome, job);
        let width = rows.iter().map(|row| row.target.chars().count().min(NAME)).max().unwrap_or(0);
        let (reference, others): (Vec<&Row>, Vec<&Row>) =
            rows.iter().partition(|row| row.target == job.reference);
        let _ = writeln!(text, "{}", plain(&job.title));
        for row in &reference {
            let (low, high) = row.range;
            let _ = writeln!(
                text,
                "  {:<width$}  {} {} (rounds: {} … {})",
                short(&row.target, NAME),
                count(row.iops),
                rate(job),
                count(low),
                count(high)
            );
        }
        for row in others {
            let _ =
                writeln!(text, "  {:<width$}  {}", short(&row.target, NAME), compared(row, &job.reference));
        }
        text.push('\n');
    }
    if text.is_empty() {
        return "nothing was measured\n".into();
    }
    text.push_str(&format!(
        "×: median of the ratios within {} interleaved rounds, with its 95 % interval. An interval\n\
         that includes 1 shows no difference.\n",
        outcome.manifest.rounds
    ));
    for target in &outcome.targets {
        if let Some(why) = &target.unavailable {
            let _ = writeln!(text, "not measured: {}: {}", plain(&target.name), plain(why));
        }
    }
    if !outcome.manifest.complete {
        text.push_str("warning: the run was not complete\n");
    }
    text
}

/// "1.27 × kernel loop (1.22 … 1.41)  faster"
fn compared(row: &Row, reference: &str) -> String {
    let Some(value) = row.ratio else { return format!("{} was not measured", plain(reference)) };
    let verdict = match row.verdict() {
        Verdict::Faster => "faster",
        Verdict::Slower => "slower",
        Verdict::NoDifference => "no difference shown",
        Verdict::Unknown => "too few rounds for a verdict",
    };
    let interval = row
        .ratio_interval
        .map(|(low, high)| format!(" ({} … {})", ratio(low), ratio(high)))
        .unwrap_or_default();
    format!("{:>4} × {}{interval:<16}  {verdict}", ratio(value), plain(reference))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::render::synthetic;

    fn lines(rounds: u32, target: &str) -> Vec<String> {
        let mut outcome = synthetic::outcome(rounds);
        outcome.manifest.rounds = rounds;
        let text = brief(&outcome);
        text.lines().filter(|line| line.trim_start().starts_with(target)).map(str::to_owned).collect()
    }

    #[test]
    fn only_the_reference_has_a_rate() {
        assert!(lines(7, "kernel loop").iter().all(|line| line.contains("IOPS")));
        let others = lines(7, "loopengine copy");
        assert!(!others.is_empty() && others.iter().all(|line| !line.contains("IOPS")), "{others:?}");
    }

    #[test]
    fn a_verdict_needs_an_interval_without_one() {
        assert!(lines(7, "loopengine fuse").iter().all(|line| line.ends_with("  slower")));
        assert!(lines(7, "raw file").iter().all(|line| line.ends_with("  faster")));
        assert!(lines(3, "raw file").iter().all(|line| line.ends_with("too few rounds for a verdict")));
        let mut outcome = synthetic::outcome(7);
        for sample in outcome.samples.iter_mut().filter(|sample| sample.target == "raw file") {
            let base = if sample.round % 2 == 0 { 0.5 } else { 2.0 };
            sample.iops *= base;
        }
        assert!(brief(&outcome).contains("no difference shown"));
    }

    #[test]
    fn fits_into_a_terminal() {
        let text = brief(&synthetic::outcome(7));
        assert!(text.lines().all(|line| line.chars().count() <= 100), "{text}");
    }
}
