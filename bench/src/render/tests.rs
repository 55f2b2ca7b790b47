// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Properties of all output formats, for any result.

use std::fs;
use std::path::Path;

use super::doc::{Block, plots};
use super::*;
use crate::outcome::{Cost, Mode, TargetInfo};

/// Text that is markup in every format unless it is escaped.
const HOSTILE: &str = "<script>alert('x')</script> | \"&amp; \x1b[31m\0 *b* `c`";

fn page(outcome: &Outcome) -> String {
    html::html(&report::report(outcome))
}

/// All output parses, contains no NaN or infinity, and loads nothing.
fn sound(outcome: &Outcome) {
    let blocks = report::report(outcome);
    let page = html::html(&blocks);
    let options = roxmltree::ParsingOptions { allow_dtd: true, ..Default::default() };
    let parsed = roxmltree::Document::parse_with_options(&page, options).expect("well-formed HTML");
    let mut ids: Vec<&str> = parsed.descendants().filter_map(|node| node.attribute("id")).collect();
    let all = ids.len();
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len(), all, "every id is there once");
    for node in parsed.descendants().filter(|node| node.is_element()) {
        assert!(!["script", "img", "iframe", "object"].contains(&node.tag_name().name()));
        for attribute in node.attributes().filter(|attribute| ["href", "src"].contains(&attribute.name())) {
            let local = attribute.value().strip_prefix('#');
            assert!(local.is_none_or(|id| ids.contains(&id)), "{attribute:?}");
            assert!(local.is_some() || attribute.value() == "data:,", "{attribute:?}");
        }
        assert!(node.attributes().all(|attribute| !attribute.name().starts_with("on")));
    }
    for plot in plots(&blocks) {
        let svg = plot.standalone();
        let parsed = roxmltree::Document::parse(&svg).expect("well-formed SVG");
        let count = |tag: &str| parsed.descendants().filter(|node| node.has_tag_name((SVG, tag))).count();
        assert_eq!((count("title"), count("desc")), (1, 1));
    }
    for text in [&page, &markdown::markdown(&blocks), &terminal(outcome)] {
        assert!(!text.contains("NaN") && !text.contains("inf"), "a number that is none");
        assert!(!text.chars().any(|c| c.is_control() && c != '\n'), "control character");
    }
}

const SVG: &str = "http://www.w3.org/2000/svg";

#[test]
fn every_file_is_written_and_the_result_comes_back() {
    let dir = tempfile::tempdir().unwrap();
    let outcome = synthetic::outcome(5);
    write(&outcome, dir.path()).unwrap();
    assert_eq!(read(dir.path()).unwrap(), outcome);
    assert_eq!(read(&dir.path().join("result.json")).unwrap(), outcome);
    let mut names: Vec<String> = fs::read_dir(dir.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    assert_eq!(names, ["plots", "report.html", "report.md", "result.csv", "result.json"]);
    let csv = fs::read_to_string(dir.path().join("result.csv")).unwrap();
    assert_eq!(csv.lines().count(), 1 + outcome.samples.len());
    assert!(csv.lines().all(|line| line.split(',').count() == 12));
    let markdown = fs::read_to_string(dir.path().join("report.md")).unwrap();
    for name in ["ratios", "depth", "iops-randread-4k-qd1", "latency-fs-create", "cost-read-128k-qd8"] {
        assert!(dir.path().join(format!("plots/{name}.svg")).exists(), "{name}");
        assert!(markdown.contains(&format!("](plots/{name}.svg)")), "{name}");
    }
}

#[test]
fn rejects_other_files_in_one_line() {
    let dir = tempfile::tempdir().unwrap();
    let refused = |text: &str| {
        let file = dir.path().join("result.json");
        fs::write(&file, text).unwrap();
        let error = format!("{:#}", read(dir.path()).unwrap_err());
        assert!(!error.contains('\n') && error.contains("result.json"), "{error}");
        error
    };
    assert!(refused("{\"schema\": 7, \"other\": {}}").ends_with("has format 7; this program reads format 1"));
    assert!(refused("{\"schema\": 1,\n \"manifest\"").contains("line 2 column"));
    assert!(refused("{\"schema\": 1}").contains("missing field"));
    assert!(refused("{}").contains("missing field `schema`"));
    assert!(refused("").contains("line 1 column 0"));
    assert!(format!("{:#}", read(Path::new("/no/such")).unwrap_err()).starts_with("cannot read /no/such: "));
}

#[test]
fn renders_every_kind_of_result() {
    for mode in [Mode::Icount, Mode::Smp, Mode::Host] {
        for rounds in [0, 1, 5] {
            let mut outcome = synthetic::outcome(rounds);
            outcome.manifest.mode = mode;
            sound(&outcome);
        }
    }
    let empty = Outcome {
        schema: outcome::SCHEMA,
        manifest: outcome::Manifest::default(),
        warnings: Vec::new(),
        targets: Vec::new(),
        jobs: Vec::new(),
        samples: Vec::new(),
        latencies: Vec::new(),
        attach: Vec::new(),
        idle: Vec::new(),
    };
    sound(&empty);
    assert!(terminal(&empty).starts_with("nothing was measured\n"));
    let mut lone = synthetic::outcome(5);
    lone.samples.retain(|sample| sample.target == "raw file");
    sound(&lone);
}

#[test]
fn one_round_has_ratios_but_no_interval() {
    let outcome = synthetic::outcome(1);
    let text = terminal(&outcome);
    assert!(
        !text.contains('▲')
            && !text.contains('≈')
            && text.contains("not measured: qemu nbd: qemu-nbd is not installed")
    );
    let five = terminal(&synthetic::outcome(5));
    assert!(five.contains('▲') && five.contains('≈') && five.contains('▼'), "{five}");
    assert!(five.lines().all(|line| line.chars().count() <= 90), "{five}");
    assert!(page(&outcome).contains("qemu-nbd is not installed"));
}

#[test]
fn the_last_lines_summarise_the_result() {
    let mut outcome = synthetic::outcome(5);
    let text = terminal(&outcome);
    let (_, closing) = text.split_once("\nIn short, beside kernel loop\n").expect("a closing sentence");
    let line = closing.lines().find(|line| line.contains("loopengine fuse")).unwrap();
    assert!(
        line.starts_with("  loopengine fuse ran 0.5") && line.ends_with(" times as fast in 7 jobs (▼ 7)"),
        "{line}"
    );
    assert!(!closing.contains("kernel loop ran"), "{closing}");
    outcome.samples.retain(|sample| sample.target == "raw file");
    assert!(!terminal(&outcome).contains("In short"));
}

#[test]
fn a_larger_median_with_a_smaller_ratio_is_explained() {
    let mut outcome = synthetic::outcome(3);
    outcome.samples.retain(|sample| sample.job == "fs-create");
    let sentence = "ext4 on loopengine has more files/s than ext4 on kernel loop, but a smaller ×";
    assert!(!page(&outcome).contains(sentence));
    for sample in &mut outcome.samples {
        // The machine is twice as fast in the second round.
        let (reference, ours) = [(10.0, 9.0), (20.0, 18.0), (10.0, 60.0)][sample.round as usize];
        sample.iops = if sample.target == "ext4 on kernel loop" { reference } else { ours };
    }
    assert!(page(&outcome).contains(sentence));
    let text = terminal(&outcome);
    assert!(text.contains("ext4 on loopengine has more files/s"), "{text}");
    assert!(text.lines().all(|line| line.chars().count() <= 90), "{text}");
}

#[test]
fn plots_name_their_log_axes_and_whole_targets() {
    let mut outcome = synthetic::outcome(5);
    let long = "loopengine on an encrypted disk";
    outcome.targets[2].name = long.into();
    outcome
        .samples
        .iter_mut()
        .filter(|s| s.target == "loopengine batch")
        .for_each(|s| s.target = long.into());
    outcome
        .latencies
        .iter_mut()
        .filter(|l| l.target == "loopengine batch")
        .for_each(|l| l.target = long.into());
    let blocks = report::report(&outcome);
    let svg = |file: &str| plots(&blocks).find(|plot| plot.file() == file).expect("a plot").standalone();
    for file in ["depth.svg", "iops-randread-4k-qd1.svg", "latency-randread-4k-qd1.svg"] {
        assert!(svg(file).contains(&format!(">{long}<")), "{file}");
    }
    assert!(
        svg("ratios.svg").contains(">× kernel loop (log scale)<")
            && svg("ratios.svg").contains(">kernel loop<")
    );
    assert!(svg("depth.svg").contains(">I/Os in flight (log scale)<"));
    assert!(svg("latency-randread-4k-qd1.svg").contains(">latency (log scale)<"));
}

#[test]
fn renders_zeros_and_invalid_numbers() {
    for value in [0.0, f64::NAN, f64::INFINITY, -1.0, f64::MIN_POSITIVE, f64::MAX] {
        let mut outcome = synthetic::outcome(5);
        for (index, sample) in outcome.samples.iter_mut().enumerate().filter(|(index, _)| index % 3 == 0) {
            sample.iops = value;
            sample.bytes_per_s = if index % 2 == 0 { value } else { 0.0 };
            sample.cost = Cost { submitter_ns: Some(value), engine_ns: Some(value), ..Cost::default() };
        }
        outcome.latencies[0].counts = vec![(0, 0), (u64::MAX, u64::MAX), (0, u64::MAX)];
        outcome.latencies[1].counts = vec![(0, 100)];
        outcome.attach[0].attach_ns.clear();
        outcome.idle[0].over_ns = 0;
        sound(&outcome);
        let dir = tempfile::tempdir().unwrap();
        write(&outcome, dir.path()).unwrap();
        assert!(read(dir.path()).is_ok(), "{value}");
    }
}

#[test]
fn names_from_data_are_text() {
    let mut outcome = synthetic::outcome(5);
    outcome
        .samples
        .iter_mut()
        .filter(|s| s.target == "loopengine batch")
        .for_each(|s| s.target = HOSTILE.into());
    outcome
        .latencies
        .iter_mut()
        .filter(|l| l.target == "loopengine batch")
        .for_each(|l| l.target = HOSTILE.into());
    outcome.targets.push(TargetInfo {
        name: HOSTILE.into(),
        about: HOSTILE.into(),
        version: HOSTILE.into(),
        unavailable: Some(HOSTILE.into()),
    });
    for job in &mut outcome.jobs {
        job.title.push_str(HOSTILE);
        job.question = HOSTILE.into();
        job.unit = Some(HOSTILE.into());
    }
    outcome.manifest.kernel = HOSTILE.into();
    outcome.manifest.notes.insert(HOSTILE.into(), HOSTILE.into());
    outcome.warnings[0].what = HOSTILE.into();
    outcome.attach[0].how = HOSTILE.into();
    sound(&outcome);
    let blocks = report::report(&outcome);
    assert!(!html::html(&blocks).contains("<script") && !markdown::markdown(&blocks).contains("<script"));
    assert!(html::html(&blocks).contains("&lt;script&gt;"));
}

#[test]
fn a_job_of_any_name_stays_in_its_directory() {
    let mut outcome = synthetic::outcome(1);
    outcome.jobs[0].name = "../../x y".into();
    outcome
        .samples
        .iter_mut()
        .filter(|s| s.job == "randread-4k-qd1")
        .for_each(|s| s.job = "../../x y".into());
    let dir = tempfile::tempdir().unwrap();
    write(&outcome, &dir.path().join("a/b")).unwrap();
    assert!(dir.path().join("a/b/plots/iops-------x-y.svg").exists());
    sound(&outcome);
}

#[test]
fn shows_instructions_if_they_were_counted() {
    let mut outcome = synthetic::outcome(1);
    outcome.manifest.mode = Mode::Icount;
    for sample in &mut outcome.samples {
        sample.cost.system_ns = Some(1e9 / sample.iops);
    }
    let headings = |outcome: &Outcome| {
        let tables = report::report(outcome).into_iter().filter_map(|block| match block {
            Block::Table(table) => {
                Some(table.columns.into_iter().map(|column| column.title).collect::<Vec<_>>())
            }
            _ => None,
        });
        tables.flatten().collect::<Vec<_>>()
    };
    let has = |titles: &[String], title: &str| titles.iter().any(|present| present == title);
    let counted = headings(&outcome);
    assert!(
        has(&counted, "above raw file") && has(&counted, "below") && has(&counted, "instructions per file")
    );
    outcome.manifest.mode = Mode::Host;
    outcome.samples.iter_mut().for_each(|sample| sample.cost.system_ns = None);
    let timed = headings(&outcome);
    assert!(!has(&timed, "above raw file") && !has(&timed, "below") && has(&timed, "engine"));
}

#[test]
fn plots_agree_on_colours() {
    let outcome = synthetic::outcome(5);
    let blocks = report::report(&outcome);
    let colour = palette::Palette::new(&outcome).of("loopengine batch").colour;
    let same = |plot: &&svg::Plot| plot.file().starts_with("iops-randread") || plot.file() == "ratios.svg";
    for plot in plots(&blocks).filter(same) {
        assert!(plot.inline().contains(&format!("fill=\"{colour}\"")), "{}", plot.file());
    }
}

#[test]
fn every_field_is_described() {
    fn describes(value: &serde_json::Value, text: &str) {
        match value {
            serde_json::Value::Object(fields) => {
                for (name, value) in fields {
                    assert!(text.contains(&format!("`{name}`")), "{name} is not in RESULT.md");
                    describes(value, text);
                }
            }
            serde_json::Value::Array(values) => values.iter().for_each(|value| describes(value, text)),
            _ => {}
        }
    }
    let mut outcome = synthetic::outcome(1);
    outcome.manifest.notes.clear();
    describes(&serde_json::to_value(outcome).unwrap(), include_str!("../../RESULT.md"));
}
