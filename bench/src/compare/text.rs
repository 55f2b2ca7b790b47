// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A comparison as text for a terminal or a log: one line per change, one block per job.

use std::fmt::{Display, Formatter, Result};

use super::{Change, Comparison, THRESHOLD};
use crate::outcome::Mode;
use crate::summary::Verdict;
use crate::units::{NOTHING, change as percent, count, plain, ratio, short};

impl Display for Comparison {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        for warning in &self.warnings {
            writeln!(f, "warning: {warning}")?;
        }
        let counted = self.mode == Mode::Icount;
        let what = if counted { "instructions per operation" } else { "ratio to the reference" };
        let mut job = None;
        for change in &self.changes {
            if job != Some(&change.job) {
                writeln!(f, "\n{}: {what}", plain(&change.job))?;
                writeln!(f, "  {:<22} {:>8} {:>8} {:>8}   95 % interval", "", "before", "now", "change")?;
                job = Some(&change.job);
            }
            line(f, change, if counted { count } else { ratio })?;
        }
        for (pairs, when) in [(&self.only_old, "before"), (&self.only_new, "now")] {
            for (job, target) in pairs {
                writeln!(f, "only {when}: {} at {}", plain(target), plain(job))?;
            }
        }
        let total = self.changes.len();
        let [slower, faster, same, unknown] =
            [Verdict::Slower, Verdict::Faster, Verdict::NoDifference, Verdict::Unknown]
                .map(|of| self.count(of));
        write!(f, "\n{total} compared: {slower} slower, {faster} faster, {same} no difference shown")?;
        if unknown > 0 {
            write!(f, ", {unknown} unknown (an interval needs five rounds on both sides)")?;
        }
        writeln!(f)?;
        match total - unknown {
            _ if counted => repeated(f, self),
            0 => Ok(()),
            told => writeln!(
                f,
                "Where nothing changed, chance alone makes about {:.1} of {told} look slower.",
                told as f64 * 0.025
            ),
        }
    }
}

/// Says how well the second run repeats the first.
fn repeated(f: &mut Formatter<'_>, comparison: &Comparison) -> Result {
    let Some((agree, worst)) = comparison.agreement() else { return Ok(()) };
    let total = comparison.changes.len();
    write!(f, "{agree} of {total} rows agree within {} %", THRESHOLD * 100.0)?;
    if worst.quotient == 1.0 {
        return writeln!(f, ", all of them exactly");
    }
    let (target, job) = (plain(&worst.target), plain(&worst.job));
    writeln!(f, "; farthest apart: {target} at {job}, {:+.2} %", (worst.quotient - 1.0) * 100.0)
}

fn line(f: &mut Formatter<'_>, change: &Change, write: fn(f64) -> String) -> Result {
    let interval =
        change.interval.map_or(NOTHING.into(), |(low, high)| format!("{} … {}", percent(low), percent(high)));
    let verdict = match change.verdict {
        Verdict::Faster => "faster",
        Verdict::Slower => "SLOWER",
        Verdict::NoDifference => "≈",
        Verdict::Unknown => "",
    };
    let (target, before, after) = (short(&change.target, 22), write(change.before), write(change.after));
    let quotient = percent(change.quotient);
    let text = format!("  {target:<22} {before:>8} {after:>8} {quotient:>8}   {interval:<20} {verdict}");
    writeln!(f, "{}", text.trim_end())
}
