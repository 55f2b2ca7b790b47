// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Records durations, late calls and failures of the well-behaved clients, and what the hostile
//! clients did meanwhile.

use std::collections::{BTreeMap, VecDeque};
use std::fmt::Write;
use std::time::{Duration, Instant};

/// Limit of a call.
pub(super) const CALL: Duration = Duration::from_secs(2);
/// Limit of work that consists of many calls: mkfs, the start of `loopengine run`.
const WORK: Duration = Duration::from_secs(20);
/// A late call that took at most this many starts of /bin/true at that moment is skipped: the
/// machine is too slow to test the daemon. (If a start takes 1 ms, the limit of a call is 2,000
/// starts.)
const PROGRAMS: u32 = 30;
/// Lines kept per hostile client.
const WORDS: usize = 3;
/// Start times kept, for a few seconds.
const YARDSTICK: usize = 6;
const FINDINGS_SHOWN: usize = 40;

/// The record of a campaign.
#[derive(Default)]
pub(super) struct Ledger {
    calls: BTreeMap<String, Calls>,
    /// The pending call of each client.
    waiting: BTreeMap<&'static str, (String, Instant, Duration)>,
    /// Last lines of the hostile clients of this round.
    actions: BTreeMap<String, VecDeque<String>>,
    /// Name of the round.
    round: String,
    findings: Vec<String>,
    /// Late calls that were skipped because the machine was too slow.
    undecided: Vec<String>,
    /// Recent start times of a trivial program, which tell how slow the machine is.
    yardstick: VecDeque<Duration>,
}

#[derive(Default)]
struct Calls {
    count: u32,
    total: Duration,
    slowest: Duration,
    late: u32,
}

impl Ledger {
    /// Begins a round.
    pub(super) fn round(&mut self, name: String) {
        self.round = name;
        self.actions.clear();
    }

    /// Records a line of a hostile client.
    pub(super) fn action(&mut self, client: &str, what: &str) {
        let words = self.actions.entry(client.to_owned()).or_default();
        words.push_back(what.to_owned());
        if words.len() > WORDS {
            words.pop_front();
        }
    }

    /// Records a line of a well-behaved client.
    pub(super) fn line(&mut self, who: &'static str, line: &str) {
        match line.split_at_checked(2) {
            Some((mark @ ("> " | "~ "), name)) => {
                let bound = if mark == "> " { CALL } else { WORK };
                self.waiting.insert(who, (format!("{who}: {name}"), Instant::now(), bound));
            }
            Some(("< ", micros)) => {
                if let Some((name, _, bound)) = self.waiting.remove(who) {
                    let time = Duration::from_micros(micros.parse().unwrap_or(u64::MAX));
                    self.took(&name, time, bound);
                }
            }
            _ => self.finding(format!("{who}: {}", line.trim_start_matches("! "))),
        }
    }

    /// Records the start time of a trivial program.
    pub(super) fn machine(&mut self, time: Duration) {
        self.yardstick.push_back(time);
        if self.yardstick.len() > YARDSTICK {
            self.yardstick.pop_front();
        }
    }

    fn took(&mut self, name: &str, time: Duration, bound: Duration) {
        let calls = self.calls.entry(name.to_owned()).or_default();
        calls.count += 1;
        calls.total += time;
        calls.slowest = calls.slowest.max(time);
        if time > bound {
            calls.late += 1;
            let machine = self.yardstick.iter().max().copied().unwrap_or_default();
            let (took, slow) = (time.as_secs_f32(), machine.as_secs_f32());
            let text = self.told(&format!("{name}: answered after {took:.1} s, /bin/true after {slow:.1} s"));
            let judged = time > machine * PROGRAMS;
            if judged { &mut self.findings } else { &mut self.undecided }.push(text);
        }
    }

    /// Records that a well-behaved client has ended: its pending call is not answered.
    pub(super) fn ended(&mut self, who: &'static str) {
        if let Some((name, since, _)) = self.waiting.remove(who) {
            self.finding(format!("{name}: not answered after {:.1} s", since.elapsed().as_secs_f32()));
        }
    }

    /// The longest pending call, and its start.
    pub(super) fn longest_wait(&self) -> Option<(&str, Duration)> {
        self.waiting
            .values()
            .map(|(name, since, _)| (name.as_str(), since.elapsed()))
            .max_by_key(|(_, time)| *time)
    }

    /// Records a failure.
    pub(super) fn finding(&mut self, what: String) {
        let text = self.told(&what);
        self.findings.push(text);
    }

    /// `what`, with the round and the last lines of the hostile clients.
    fn told(&self, what: &str) -> String {
        let mut text = format!("[{}] {what}", self.round);
        for (client, words) in &self.actions {
            let words: Vec<&str> = words.iter().map(String::as_str).collect();
            // Writing to a string cannot fail.
            let _ = write!(text, "\n      {client}: {}", words.join("; "));
        }
        text
    }

    /// Number of late calls that were skipped.
    pub(super) fn undecided(&self) -> usize {
        self.undecided.len()
    }

    /// Number of failures.
    pub(super) fn failures(&self) -> usize {
        self.findings.len()
    }

    /// The table of calls, and the failures.
    pub(super) fn report(&self) -> String {
        let mut text =
            format!("{:<28} {:>6} {:>8} {:>8} {:>5}\n", "call", "count", "mean ms", "max ms", "late");
        for (name, calls) in &self.calls {
            let mean = calls.total.as_millis() / u128::from(calls.count.max(1));
            let (count, slowest, late) = (calls.count, calls.slowest.as_millis(), calls.late);
            let _ = writeln!(text, "{name:<28} {count:>6} {mean:>8} {slowest:>8} {late:>5}");
        }
        for (word, all) in [("WRONG", &self.findings), ("UNDECIDED", &self.undecided)] {
            for finding in all.iter().take(FINDINGS_SHOWN) {
                let _ = writeln!(text, "{word} {finding}");
            }
            if all.len() > FINDINGS_SHOWN {
                let _ = writeln!(text, "{word} and {} more", all.len() - FINDINGS_SHOWN);
            }
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reports_late_calls_and_failures_with_concurrent_actions() {
        let mut ledger = Ledger::default();
        ledger.round("round 1: huge".into());
        ledger.action("huge 2000", "sends much");
        for line in ["> List", "< 1000", "> List", "< 2000001"] {
            ledger.line("root", line);
        }
        assert_eq!(ledger.failures(), 1);
        // If a trivial program takes a second, a call of 3 s is skipped, and one of 31 s is not.
        ledger.machine(Duration::from_secs(1));
        for line in ["> Open", "< 3000000", "~ mkfs", "< 3000000"] {
            ledger.line("caller", line);
        }
        assert_eq!((ledger.failures(), ledger.undecided()), (1, 1));
        for line in ["> Open", "< 31000000"] {
            ledger.line("caller", line);
        }
        assert_eq!((ledger.failures(), ledger.undecided()), (2, 1));
        ledger.line("root", "! no such thing");
        ledger.line("caller", "> Open");
        assert!(ledger.longest_wait().is_some_and(|(name, _)| name == "caller: Open"));
        ledger.ended("caller");
        assert!(ledger.longest_wait().is_none());
        let report = ledger.report();
        assert_eq!(ledger.failures(), 4);
        for part in ["root: List", "answered after 2.0 s", "sends much", "no such thing", "round 1: huge"] {
            assert!(report.contains(part), "{report}");
        }
    }
}
