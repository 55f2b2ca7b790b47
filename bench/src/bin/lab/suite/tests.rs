// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Jobs of a run, and verdicts from exit statuses and printed results.

use super::*;

fn tally(passed: u64, failed: u64, skipped: u64) -> Tally {
    Tally { passed, failed, skipped, messages: Vec::new() }
}

#[test]
fn a_run_has_one_power_cut_per_kernel_with_ublk() {
    let both = [Job::PowerCut(Line::Seven), Job::PowerCut(Line::SixTwelve)];
    let cuts = |options, any_case| {
        let mut jobs = jobs(&options, any_case);
        jobs.retain(|job| matches!(job, Job::PowerCut(_)));
        jobs
    };
    assert_eq!(cuts(SuiteOptions::default(), true), both);
    let filtered = || SuiteOptions { filter: Some("power_cut".into()), ..SuiteOptions::default() };
    assert_eq!(cuts(filtered(), false), both);
    let of = |kernel| SuiteOptions { kernel: Some(kernel), ..filtered() };
    assert_eq!(cuts(of(Line::SixTwelve), false), both[1..]);
    assert_eq!(cuts(of(Line::SixOne), true), []);
    assert_eq!(jobs(&of(Line::SixOne), false), [Job::Host, Job::Docs]);
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
