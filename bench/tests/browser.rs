// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The report, read by a real browser as wide as a phone and as wide as a desk.
//!
//! Knows what must hold of any report: nothing wider than the screen, no text too small to read or
//! on top of another or struck through, nothing asked of the network. Needs chromium; says so where
//! there is none. `LOOPBENCH_KEEP=DIR` leaves the report in DIR, to look at.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

use libtest_mimic::{Completion, Failed, Trial};
use loopbench::{outcome, render, sh};
use serde::Deserialize;

#[path = "data/synthetic.rs"]
mod synthetic;

const LIMIT: Duration = Duration::from_secs(60);

/// What `measure.js` finds.
#[derive(Debug, Deserialize)]
struct Found {
    title: String,
    width: u32,
    scroll_width: u32,
    /// Elements beyond the right edge.
    wide: Vec<String>,
    tables: usize,
    plots: usize,
    hidden_plots: Vec<String>,
    /// Plots that leave part of the width to nothing.
    slim_plots: Vec<String>,
    /// Texts of plots that the line of the reference goes through.
    struck: Vec<String>,
    /// Tables that scroll and do not show it.
    unmarked: Vec<String>,
    smallest: Text,
    /// Texts of plots beyond the paper, and on top of each other.
    outside: Vec<String>,
    overlapping: Vec<String>,
    resources: Vec<String>,
    dark: bool,
    scripts: usize,
    /// Where the first plot begins.
    first_screen: f64,
}

/// A text and how large it appears.
#[derive(Debug, Deserialize)]
struct Text {
    size: f64,
    text: String,
}

fn main() -> ExitCode {
    let args = libtest_mimic::Arguments::from_args();
    let trial = |name: &'static str, width, rounds, mode| {
        Trial::ignorable_test(name, move || readable(name, width, rounds, mode))
    };
    let trials = vec![
        trial("report::on_a_phone", 390, 5, outcome::Mode::Smp),
        trial("report::on_a_desk", 1200, 5, outcome::Mode::Smp),
        trial("report::of_instructions_on_a_phone", 390, 1, outcome::Mode::Icount),
    ];
    libtest_mimic::run(&args, trials).exit_code()
}

fn readable(name: &str, width: u32, rounds: u32, mode: outcome::Mode) -> Result<Completion, Failed> {
    let Some(browser) = browser() else {
        let why = "chromium is not installed";
        eprintln!("  {name}: skipped: {why}");
        return Ok(Completion::ignored_with(why));
    };
    let temporary = tempfile::tempdir()?;
    let kept =
        std::env::var_os("LOOPBENCH_KEEP").map(|kept| PathBuf::from(kept).join(name.replace("::", "-")));
    let dir = kept.as_deref().unwrap_or(temporary.path());
    let outcome = result(rounds, mode);
    render::write(&outcome, dir)?;
    let found = measure(&browser, &dir.join("report.html"), temporary.path(), width)?;
    let mut wrong = Vec::new();
    let mut expect = |fine: bool, what: String| {
        if !fine {
            wrong.push(what);
        }
    };
    // A job: throughput, percentiles, costs. The others: in short, targets, attaching, idle.
    let (jobs, plots) = (outcome.jobs.len(), std::fs::read_dir(dir.join("plots"))?.count());
    expect(found.title == "Results of 2026-11-22: loopbench", format!("title {:?}", found.title));
    expect(found.width == width, format!("{} wide, not {width}", found.width));
    expect(
        found.scroll_width <= found.width,
        format!("{} wide on {width}: {:?}", found.scroll_width, found.wide),
    );
    expect(found.wide.is_empty(), format!("beyond the edge: {:?}", found.wide));
    expect(found.tables == 3 * jobs + 4, format!("{} tables", found.tables));
    expect(
        found.plots == 3 * jobs + 2 && plots == found.plots,
        format!("{} plots, {plots} files", found.plots),
    );
    expect(found.hidden_plots.is_empty(), format!("not to be seen: {:?}", found.hidden_plots));
    expect(found.slim_plots.is_empty(), format!("not as wide as the page: {:?}", found.slim_plots));
    expect(found.struck.is_empty(), format!("struck through: {:?}", found.struck));
    expect(found.unmarked.is_empty(), format!("scrolls unseen: {:?}", found.unmarked));
    expect(found.smallest.size >= 11.0, format!("too small: {:?}", found.smallest));
    for (what, texts) in [("beyond the paper", &found.outside), ("on top of each other", &found.overlapping)]
    {
        let some = &texts[..texts.len().min(5)];
        expect(texts.is_empty(), format!("{} texts {what}: {some:#?}", texts.len()));
    }
    expect(found.resources.is_empty(), format!("asked for {:?}", found.resources));
    expect(found.dark, "no dark colours".into());
    expect(found.scripts == 0, format!("{} scripts", found.scripts));
    expect(found.first_screen < 700.0, format!("the answer is {} down", found.first_screen));
    let smallest = &found.smallest;
    eprintln!("  {name}: smallest text {:.1} px ({:?})", smallest.size, smallest.text);
    if wrong.is_empty() { Ok(Completion::Completed) } else { Err(wrong.join("\n").into()) }
}

fn result(rounds: u32, mode: outcome::Mode) -> outcome::Outcome {
    let mut outcome = synthetic::outcome(rounds);
    outcome.manifest.mode = mode;
    if mode == outcome::Mode::Icount {
        for sample in &mut outcome.samples {
            sample.cost.system_ns = Some((1e9 / sample.iops).round());
        }
    }
    outcome
}

/// Debian's name for it, and others'.
fn browser() -> Option<PathBuf> {
    ["chromium", "chromium-browser", "google-chrome"].iter().find_map(|name| sh::which(name).ok())
}

/// Puts the report into a frame of that width and lets a script measure it.
fn measure(browser: &Path, report: &Path, dir: &Path, width: u32) -> Result<Found, Failed> {
    // As a string of JavaScript, in which no tag ends.
    let report = serde_json::to_string(&std::fs::read_to_string(report)?)?.replace('<', "\\u003c");
    let script = include_str!("data/measure.js");
    let harness = dir.join("harness.html");
    std::fs::write(
        &harness,
        format!(
            "<!DOCTYPE html><meta charset=\"utf-8\"><body style=\"margin:0\"><pre id=\"found\"></pre>\
             <script>const width = {width}, report = {report};\n{script}</script>"
        ),
    )?;
    let mut command = Command::new(browser);
    // As root there is no sandbox; what it reads is this test's own.
    command.args(["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--dump-dom"]);
    command.args([
        "--disable-dev-shm-usage",
        "--hide-scrollbars",
        "--virtual-time-budget=20000",
        "--window-size=1400,1000",
    ]);
    command.arg(format!("--user-data-dir={}", dir.join("profile").display())).arg(&harness);
    let page = sh::capture(&mut command, LIMIT)?;
    let found = page.split_once("<pre id=\"found\">").and_then(|(_, rest)| rest.split_once("</pre>"));
    let found = found.map(|(found, _)| found.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"));
    let found = found.filter(|found| !found.is_empty()).ok_or("the browser measured nothing")?;
    Ok(serde_json::from_str(&found)?)
}
