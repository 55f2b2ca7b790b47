// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Shares of the kernel cases, and verdicts from exit statuses and printed results.

use super::*;

fn tally(passed: u64, failed: u64, skipped: u64) -> Tally {
    Tally { passed, failed, skipped, messages: Vec::new() }
}

#[test]
fn every_case_is_in_one_share() {
    let private = &Cases::Private.commands(None)[0];
    assert_eq!(private[2], PRIVATE);
    let others = Cases::Others.commands(None);
    assert_eq!(others[0], ["vm", "--test-threads=1", "--skip", PRIVATE]);
    for (command, name) in std::iter::zip(&others[1..], WITH_OTHERS) {
        assert_eq!(command, &["vm", "--test-threads=1", name]);
    }
    assert_eq!(others[1 + WITH_OTHERS.len()..], [[KERNEL_LOOP, "--test-threads=1", LIFETIME]]);
    let skipped = |name| private.windows(2).any(|pair| pair == ["--skip", name]);
    assert!(WITH_OTHERS.into_iter().all(skipped), "{private:?}");
    let of = |program| [program, "--test-threads=1", "x"];
    assert_eq!(Cases::All.commands(Some("x")), [of(VM), of(KERNEL_LOOP)]);
    let options = |kernel, filter| SuiteOptions { kernel, filter, host: false, quick: false, full: false };
    let names = |options| {
        let (first, others) = shares(&options);
        let all: Vec<_> = [first].into_iter().chain(others).collect();
        all.iter().map(|share| format!("{}{}", share.line.name(), share.cases.name())).collect::<Vec<_>>()
    };
    let all = ["7, all others", "7, private loop devices", "7, instructions counted", "6.12"];
    assert_eq!(names(options(None, None)), all);
    assert_eq!(names(options(Some(Line::Seven), None)), all[..3]);
    assert_eq!(names(options(Some(Line::SixTwelve), None)), all[3..]);
    assert_eq!(names(options(None, Some("x".into()))), ["7", "6.12"]);
}

#[test]
fn the_worst_exit_status_counts() {
    let command = Cases::Others.shell_command(None);
    for (first, others) in [(134, 0), (0, 101), (0, 0)] {
        let vm = format!("vm() {{ case $2 in --skip) return {first} ;; esac; return {others}; }}");
        let script = format!("{vm}; kernel_loop() {{ vm; }}; {command}");
        let status = Command::new("sh").args(["-c", &script]).status().unwrap();
        assert_eq!(status.code(), Some(std::cmp::max(first, others)));
    }
}

#[test]
fn a_bad_exit_status_never_passes() {
    let said = vec!["x ended with an error that no test reports: see above".to_owned()];
    let failed = Tally { messages: said, ..tally(3, 1, 0) };
    assert_eq!(reconcile("x", false, Some(tally(3, 0, 0))).unwrap(), failed);
    assert_eq!(reconcile("x", true, Some(tally(3, 0, 1))).unwrap(), tally(3, 0, 1));
    assert!(reconcile("x", false, None).is_err());
}

#[test]
fn all_cases_skipped_is_a_failure() {
    let said = "test result: ok. 0 passed; 0 failed; 9 ignored; 0 measured; 0 filtered out\n";
    let messages = vec!["all kernel cases were skipped, for the reasons above".to_owned()];
    assert_eq!(cases("x", true, said).unwrap(), Tally { messages, ..tally(0, 1, 9) });
}
