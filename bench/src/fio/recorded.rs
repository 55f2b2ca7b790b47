// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Tests with recorded reports of fio.
//!
//! How the recordings were made: `bench/tests/data/fio/README.md`.

use super::*;
use crate::job::{QD1, QD32};

macro_rules! recorded {
    ($file:literal) => {
        include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/fio/", $file))
    };
}

const FAILED: &str = recorded!("3.33-failed.txt");

/// The values of a recording with a single section.
fn values(said: &str) -> Values {
    let mut found = parse(said).unwrap();
    assert_eq!(found.len(), 1);
    found.pop().unwrap().outcome.unwrap()
}

/// A section as it was recorded.
fn section(said: &str, index: usize) -> serde_json::Value {
    let report: serde_json::Value = serde_json::from_str(said).unwrap();
    report["jobs"][index].clone()
}

fn close(found: f64, expected: f64) {
    assert!((found / expected - 1.0).abs() < 0.03, "{found} is not {expected}");
}

#[test]
fn reads_match_the_report_of_every_fio_version() {
    for said in [recorded!("3.33-read.json"), recorded!("3.41-read.json")] {
        let found = parse(said).unwrap();
        let targets: Vec<&str> = found.iter().map(|one| one.target.as_str()).collect();
        assert_eq!(targets, ["raw file", "kernel loop"]);
        for (index, one) in found.iter().enumerate() {
            let (values, theirs) = (one.outcome.as_ref().unwrap(), &section(said, index)["read"]);
            assert_eq!(one.job, "randread-4k-qd32");
            assert_eq!(Some(values.iops), theirs["iops"].as_f64());
            assert_eq!(Some(values.total_ios), theirs["total_ios"].as_u64());
            // fio counts requests in flight at the end of the ramp as bytes, but not as I/Os.
            close(values.bytes_per_io, 4096.0);
            close(values.bytes_per_s, values.iops * 4096.0);
            assert_eq!(Some(values.latency.len()), theirs["clat_ns"]["N"].as_u64());
            let percentile = |name: &str| theirs["clat_ns"]["percentile"][name].as_f64().unwrap();
            close(values.p50_ns as f64, percentile("50.000000"));
            close(values.p99_ns as f64, percentile("99.000000"));
            assert!((150..160).contains(&values.runtime_ms), "{} ms", values.runtime_ms);
        }
    }
}

#[test]
fn cpu_time_is_of_all_processes() {
    let said = recorded!("3.33-two-processes.json");
    let (values, theirs) = (values(said), section(said, 0));
    // Two processes ran 150 ms each: fio adds their times, and its percentages refer to the sum.
    assert!(theirs["job_runtime"].as_f64().unwrap() >= 300.0 && values.runtime_ms < 200);
    let percent = theirs["usr_cpu"].as_f64().unwrap() + theirs["sys_cpu"].as_f64().unwrap();
    let cpu_ns = values.submitter_ns * values.total_ios as f64;
    close(cpu_ns, percent / 100.0 * 2.0 * 150e6);
}

#[test]
fn reads_and_writes_are_added_up() {
    let said = recorded!("3.33-mix.json");
    let (values, theirs) = (values(said), section(said, 0));
    let of = |side: &str, field: &str| theirs[side][field].as_f64().unwrap();
    assert_eq!(values.iops, of("read", "iops") + of("write", "iops"));
    assert_eq!(values.total_ios as f64, of("read", "total_ios") + of("write", "total_ios"));
    close(values.latency.len() as f64, values.total_ios as f64);
    close(of("read", "total_ios") / values.total_ios as f64, 0.7);
}

#[test]
fn discards_count_beside_writes() {
    for said in [recorded!("3.33-discard.json"), recorded!("3.41-discard.json")] {
        let (values, theirs) = (values(said), section(said, 0));
        let of = |side: &str| theirs[side]["total_ios"].as_u64().unwrap();
        assert!(of("trim") > 0 && of("trim").abs_diff(of("write")) <= 1);
        assert_eq!(values.total_ios, of("trim") + of("write"));
        assert_eq!(values.latency.len(), values.total_ios);
        assert_eq!(values.bytes_per_io, 65536.0);
    }
}

#[test]
fn an_fsync_after_each_write_is_the_latency_and_a_few_count_beside() {
    for said in [recorded!("3.33-fsync.json"), recorded!("3.41-fsync.json")] {
        let (values, theirs) = (values(said), section(said, 0));
        close(values.p50_ns as f64, theirs["sync"]["lat_ns"]["percentile"]["50.000000"].as_f64().unwrap());
        assert_eq!(values.latency.len(), values.total_ios);
        // At depth 1 an operation takes at least as long as its fsync.
        assert!(values.latency.mean() < 1e9 / values.iops);
    }
    let database = values(recorded!("3.33-database.json"));
    assert!(database.latency.len() > database.total_ios && database.bytes_per_io == 8192.0);
}

#[test]
fn counts_files_as_operations() {
    let values = values(recorded!("3.33-files.json"));
    assert_eq!(values.total_ios, 500);
    close(values.iops, 500e3 / values.runtime_ms as f64);
}

#[test]
fn without_bins_fios_percentiles_are_taken() {
    let said = recorded!("3.33-no-bins.json");
    let (values, theirs) = (values(said), section(said, 0));
    assert!(values.latency.is_empty());
    let percentile = &theirs["read"]["clat_ns"]["percentile"];
    assert_eq!(Some(values.p50_ns), percentile["50.000000"].as_u64());
    assert_eq!(Some(values.p99_ns), percentile["99.000000"].as_u64());
}

#[test]
fn a_failed_section_does_not_affect_the_others() {
    let found = parse(FAILED).unwrap();
    let failed: Vec<bool> = found.iter().map(|one| one.outcome.is_err()).collect();
    assert_eq!(failed, [false, true, false]);
    assert_eq!(found[1].outcome, Err("fio: error 5 (Input/output error)".into()));

    let found = parse(recorded!("3.33-gone.txt")).unwrap();
    assert_eq!(found[0].outcome, Err("fio: error 22 (Invalid argument)".into()));
    assert!(found[1].outcome.is_ok());
}

#[test]
fn a_job_without_io_is_an_error() {
    let idle = r#"{"jobs":[{"jobname":"a @ b","error":0,"read":{"total_ios":0,"iops":0.0}}]}"#;
    assert!(parse(idle).unwrap()[0].outcome.as_ref().is_err_and(|reason| reason.contains("no I/O")));
}

#[test]
fn counts_complete_sections_of_a_truncated_report() {
    let found = parse(recorded!("3.33-cut.txt")).unwrap();
    assert_eq!(found.len(), 1);
    let places = ["raw file", "bad disk", "kernel loop"].map(|name| JobTarget::new(name, "/x"));
    let all = complete(&found, &QD1, &places);
    let names: Vec<&str> = all.iter().map(|one| one.target.as_str()).collect();
    assert_eq!(names, ["raw file", "bad disk", "kernel loop"]);
    assert!(all[0].outcome.is_ok() && all[1].outcome.is_err() && all[2].outcome.is_err());
    // Values of another job do not count.
    assert!(complete(&found, &QD32, &places).iter().all(|one| one.outcome.is_err()));
}

#[test]
fn any_truncation_gives_an_error_or_complete_sections() {
    let whole = parse(FAILED).unwrap();
    for end in (0..FAILED.len()).step_by(97) {
        match parse(&FAILED[..end]) {
            Ok(found) => assert_eq!(found, whole[..found.len()], "cut at {end}"),
            Err(error) => {
                let error = format!("{error:#}");
                assert!(error.contains("ends in the middle") || error.contains("no report"), "{error}");
            }
        }
    }
}

#[test]
fn skips_text_around_a_report_and_rejects_other_formats() {
    let noisy =
        format!("fio: {{a}} warning\n{}fio: file hash not empty on exit\n", recorded!("3.41-fsync.json"));
    assert_eq!(parse(&noisy).unwrap(), parse(recorded!("3.41-fsync.json")).unwrap());
    let error = |said| format!("{:#}", parse(said).unwrap_err());
    assert!(error("fio: no\n").contains("no report"));
    assert!(error(r#"{"jobs":[{"jobname":7}]}"#).contains("unknown format"));
    assert!(error(r#"{"jobs":[{"jobname":"by hand"}]}"#).contains("unknown section"));
}
