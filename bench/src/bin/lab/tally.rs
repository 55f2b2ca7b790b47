// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Counts passed, failed and skipped tests in the output of test programs; collects the messages of
//! those that failed.
//!
//! Knows the output of libtest, libtest-mimic and nextest.

use std::fmt;
use std::ops::AddAssign;

/// Numbers of passed, failed and skipped tests.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    pub(crate) passed: u64,
    pub(crate) failed: u64,
    pub(crate) skipped: u64,
    /// Messages of failed tests, each at most `MESSAGE_MAX` bytes.
    pub(crate) messages: Vec<String>,
}

/// A longer message is cut: what CI shows of a run is limited, too.
const MESSAGE_MAX: usize = 2000;

impl Tally {
    pub(crate) fn fail(&mut self, message: &str) {
        self.failed += 1;
        self.messages.push(cut(message));
    }
}

impl AddAssign for Tally {
    fn add_assign(&mut self, other: Tally) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
        self.messages.extend(other.messages);
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} passed, {} failed, {} skipped", self.passed, self.failed, self.skipped)
    }
}

/// Names below the last "failures:" of each run.
pub(crate) fn failed_names(said: &str) -> Vec<String> {
    let mut names = Vec::new();
    let mut listing = false;
    for line in said.lines() {
        match line.strip_prefix("    ") {
            _ if line == "failures:" => listing = true,
            Some(name) if listing && name.contains("::") && !name.contains(' ') => {
                names.push(name.to_owned())
            }
            _ if line.starts_with("test result: ") => listing = false,
            _ => {}
        }
    }
    names
}

/// Sum of lines such as "test result: ok. 3 passed; 0 failed; 1 ignored; …".
pub(crate) fn libtest(said: &str) -> Option<Tally> {
    let results: Vec<&str> =
        said.lines().filter_map(|line| line.trim().strip_prefix("test result: ")).collect();
    let mut total = Tally::default();
    for result in &results {
        total += Tally {
            passed: before(result, "passed"),
            failed: before(result, "failed"),
            skipped: before(result, "ignored"),
            messages: Vec::new(),
        };
    }
    total.messages = libtest_messages(said);
    (!results.is_empty()).then_some(total)
}

/// Each block that starts with "---- NAME ----" (libtest-mimic) or "---- NAME stdout ----".
fn libtest_messages(said: &str) -> Vec<String> {
    let mut messages: Vec<String> = Vec::new();
    let mut inside = false;
    for line in said.lines() {
        if line.starts_with("---- ") && line.ends_with(" ----") {
            inside = true;
            messages.push(String::new());
        } else if line == "failures:" || line.starts_with("test result: ") {
            inside = false;
        }
        if let Some(message) = messages.last_mut().filter(|_| inside) {
            message.push_str(line);
            message.push('\n');
        }
    }
    messages.iter().map(|message| cut(message)).collect()
}

fn cut(message: &str) -> String {
    let message = message.trim_end();
    if message.len() <= MESSAGE_MAX {
        return message.to_owned();
    }
    format!("{}\n[…]", &message[..message.floor_char_boundary(MESSAGE_MAX)])
}

/// Parses nextest's "Summary [ 0.1s] 12 tests run: 11 passed (1 slow), 1 failed, 2 skipped".
/// nextest counts tests that the filter excludes as skipped.
pub(crate) fn nextest(said: &str, filtered: bool) -> Option<Tally> {
    let (_, end) = said.rsplit_once("     Summary [")?;
    let (line, after) = end.split_once('\n').unwrap_or((end, ""));
    let failed = before(line, "failed") + before(line, "timed out");
    Some(Tally {
        passed: before(line, "passed"),
        failed,
        skipped: if filtered { 0 } else { before(line, "skipped") },
        // The names; the messages come where the tests failed.
        messages: if failed > 0 { vec![cut(after)] } else { Vec::new() },
    })
}

/// Counts the lines "test NAME ... ok" of a run that did not finish; if a case printed something,
/// its verdict is on its own line.
pub(crate) fn seen(said: &str) -> Tally {
    let verdict = |line: &str| {
        let line = line.trim_end();
        let last = line.rsplit("... ").next().unwrap_or(line).trim();
        (line.starts_with("test ") || line == last).then(|| last.to_owned())
    };
    let verdicts: Vec<String> = said.lines().filter_map(verdict).collect();
    let count =
        |word: &str| verdicts.iter().filter(|verdict| verdict.split(' ').next() == Some(word)).count() as u64;
    Tally {
        passed: count("ok"),
        failed: count("FAILED"),
        skipped: count("ignored"),
        messages: libtest_messages(said),
    }
}

/// The number before `word` in `text`; 0 if there is none.
fn before(text: &str, word: &str) -> u64 {
    let Some((head, _)) = text.split_once(&format!(" {word}")) else {
        return 0;
    };
    head.rsplit(' ').next().and_then(|number| number.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tally(passed: u64, failed: u64, skipped: u64) -> Tally {
        Tally { passed, failed, skipped, messages: Vec::new() }
    }

    #[test]
    fn totals_are_read_from_every_kind_of_program() {
        let said = "running 3 tests\ntest result: ok. 2 passed; 0 failed; 1 ignored; 0 measured; 4 filtered out; x\n\
            test result: FAILED. 5 passed; 1 failed; 0 ignored; 0 measured\n";
        assert_eq!(libtest(said), Some(tally(7, 1, 1)));
        assert_eq!(libtest("error: no such thing"), None);
        let summary = "     Summary [   0.093s] 12 tests run: 11 passed (1 slow), 1 failed, 3 skipped\n";
        let failed = format!("{summary}        FAIL [   0.012s] a b::c\n");
        let messages = vec!["        FAIL [   0.012s] a b::c".to_owned()];
        assert_eq!(nextest(&failed, false), Some(Tally { messages: messages.clone(), ..tally(11, 1, 3) }));
        assert_eq!(nextest(&failed, true), Some(Tally { messages, ..tally(11, 1, 0) }));
        assert_eq!(nextest("", false), None);
        let cut = "test a ... ok\ntest b ... FAILED\ntest c ...   c: skipped: x\nignored (x)\n\
            test e ...   e: 1.2 s\nok\ntest d ...";
        assert_eq!(seen(cut), tally(2, 1, 1));
    }

    #[test]
    fn failed_cases_are_known_by_name() {
        let said = "test a::b ... FAILED\n\nfailures:\n\n---- a::b ----\n    no::name of a case\n\nfailures:\n    a::b\n\
            \ntest result: FAILED. 0 passed; 1 failed\n    not::one\n";
        assert_eq!(failed_names(said), ["a::b"]);
    }

    #[test]
    fn messages_of_failed_cases_are_kept() {
        let said = "test a::b ... FAILED\n\nfailures:\n\n---- a::b ----\nit is 3\n\n---- a::c ----\nno\n\n\
            failures:\n    a::b\n    a::c\n\ntest result: FAILED. 0 passed; 2 failed\n";
        let messages = vec!["---- a::b ----\nit is 3".to_owned(), "---- a::c ----\nno".to_owned()];
        assert_eq!(libtest(said), Some(Tally { messages, ..tally(0, 2, 0) }));
        let long = format!("{}ä{}", "x".repeat(MESSAGE_MAX - 1), "y".repeat(9));
        assert_eq!(cut(&long), format!("{}\n[…]", "x".repeat(MESSAGE_MAX - 1)));
    }

    #[test]
    fn takes_the_last_result_line() {
        assert_eq!(tally(3, 0, 1).to_string(), "3 passed, 0 failed, 1 skipped");
    }
}
