// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the clients who mean well met with: how long each of their calls took, which were late, which failed;
//! and what the hostile clients did then.

use std::collections::{BTreeMap, VecDeque};
use std::fmt::Write;
use std::time::{Duration, Instant};

/// Within this each call is answered.
pub(super) const CALL: Duration = Duration::from_secs(2);
/// Within this, work that is many calls (mkfs, the start of `loopengine run`) is done.
const WORK: Duration = Duration::from_secs(20);
/// A call that took no longer than so many starts of /bin/true at that moment says nothing about the daemon: the
/// machine is too slow to judge. (Where a start takes a millisecond, the bound above is two thousand of them.)
const PROGRAMS: u32 = 30;
/// Last words kept of each hostile client.
const WORDS: usize = 3;
/// Times of the yardstick that are kept, a few seconds' worth.
const YARDSTICK: usize = 6;
const FINDINGS_SHOWN: usize = 40;

/// All of it.
#[derive(Default)]
pub(super) struct Ledger {
    calls: BTreeMap<String, Calls>,
    /// The call that each client waits for.
    waiting: BTreeMap<&'static str, (String, Instant, Duration)>,
    /// What the hostile clients of this round do, by client.
    actions: BTreeMap<String, VecDeque<String>>,
    /// The round, for a reader.
    round: String,
    findings: Vec<String>,
    /// Late calls on a machine that was too slow to judge.
    undecided: Vec<String>,
    /// What a program that does nothing took, the last few times: how slow the machine is by itself.
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
    /// A round begins.
    pub(super) fn round(&mut self, name: String) {
        self.round = name;
        self.actions.clear();
    }

    /// A hostile client says what it does.
    pub(super) fn action(&mut self, client: &str, what: &str) {
        let words = self.actions.entry(client.to_owned()).or_default();
        words.push_back(what.to_owned());
        if words.len() > WORDS {
            words.pop_front();
        }
    }

    /// A line of a client who means well.
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

    /// A program that does nothing took this long.
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

    /// A client who means well has ended: what it waited for is not answered.
    pub(super) fn ended(&mut self, who: &'static str) {
        if let Some((name, since, _)) = self.waiting.remove(who) {
            self.finding(format!(
                "{name}: not answered, given up after {:.1} s",
                since.elapsed().as_secs_f32()
            ));
        }
    }

    /// The call that is waited for longest, and since when.
    pub(super) fn longest_wait(&self) -> Option<(&str, Duration)> {
        self.waiting
            .values()
            .map(|(name, since, _)| (name.as_str(), since.elapsed()))
            .max_by_key(|(_, time)| *time)
    }

    /// Something is wrong.
    pub(super) fn finding(&mut self, what: String) {
        let text = self.told(&what);
        self.findings.push(text);
    }

    /// `what`, with the round and what the hostile clients do.
    fn told(&self, what: &str) -> String {
        let mut text = format!("[{}] {what}", self.round);
        for (client, words) in &self.actions {
            let words: Vec<&str> = words.iter().map(String::as_str).collect();
            // Writing to a string does not fail.
            let _ = write!(text, "\n      {client}: {}", words.join("; "));
        }
        text
    }

    /// How many calls were late on a machine that was too slow to judge.
    pub(super) fn undecided(&self) -> usize {
        self.undecided.len()
    }

    /// How many things are wrong.
    pub(super) fn failures(&self) -> usize {
        self.findings.len()
    }

    /// The table of calls, and what is wrong.
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
    fn late_calls_and_failures_are_found_with_what_was_done_then() {
        let mut ledger = Ledger::default();
        ledger.round("round 1: huge".into());
        ledger.action("huge 2000", "sends much");
        for line in ["> List", "< 1000", "> List", "< 2000001"] {
            ledger.line("root", line);
        }
        assert_eq!(ledger.failures(), 1);
        // A machine on which a program that does nothing takes a second cannot judge three seconds, but 31.
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
