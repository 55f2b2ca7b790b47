// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `lab ci`: every check that a change must pass, in the order of `.ci/run`.
//!
//! `.ci/run` only builds and calls this command. All steps build with the profile `lab` and the same
//! features of dependencies, so that no step compiles again what another has compiled.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, bail};

use crate::steps::{self, Beside, Steps};
use crate::{cargo_tools, programs, setup, suite};

/// Which checks to run.
#[derive(clap::Args)]
pub(crate) struct CiOptions {
    /// Run only the checks that need neither root nor a VM: format, clippy, rustdoc, unit tests
    #[arg(long)]
    fast: bool,
}

const LIMIT: Duration = Duration::from_secs(3600);

const FORMAT: &[&str] = &["fmt", "--all", "--check"];
const CLIPPY: &[&str] =
    &["clippy", "--profile", "lab", "--workspace", "--all-targets", "--", "--deny", "warnings"];
// Advisories are left out: their database is not on a package registry.
const DENY: &[&str] = &["deny", "--log-level", "error", "check", "licenses", "bans", "sources"];
// "--examples": see PROGRAMS in programs.rs. It excludes the default targets, so they are named.
#[rustfmt::skip]
const RUSTDOC: &[&str] = &[
    "doc", "--profile", "lab", "--workspace", "--no-deps", "--document-private-items",
    "--lib", "--bin", "lab", "--examples",
];
// The workspace, not the package: its features are those of the tests.
const BENCHES: &[&str] = &["bench", "--profile", "lab", "--workspace", "--bench", "engine", "--", "--quick"];
const HOSTILE: &[&str] = &["hostile", "--minutes", "2", "--seed", "7"];
const TESTS: &[&str] = &["test", "--profile", "lab", "--workspace", "--no-run"];
const UNIT_TESTS: &[&str] = &["test", "--profile", "lab", "--workspace", "--lib", "--bins"];

/// Runs the checks and stops at the first that fails.
pub(crate) fn run(options: &CiOptions) -> Result<()> {
    // Before a build replaces the file.
    let lab = std::env::current_exe()?;
    let steps = Steps::start();
    // The totals of the tests are the last lines of a full run.
    if options.fast { fast(&steps) } else { full(&steps, &lab) }
}

fn fast(steps: &Steps) -> Result<()> {
    steps.begin("format");
    cargo(FORMAT)?;
    steps.begin("clippy");
    cargo(CLIPPY)?;
    steps.begin("rustdoc");
    cargo(RUSTDOC)?;
    steps.begin("unit tests");
    cargo(UNIT_TESTS)
}

fn full(steps: &Steps, lab: &Path) -> Result<()> {
    steps.begin("format");
    cargo(FORMAT)?;
    steps.begin("lab setup");
    setup::report(&setup::ensure_all()?)?;
    steps.begin("programs");
    let programs = programs::build()?;
    let beside = |words: &[&str]| Beside::start(programs::built(&programs, Command::new(lab).args(words))?);
    // An emulated machine keeps one CPU busy at most. Compilers use the other.
    let gate = beside(&["gate"])?;
    steps.begin("clippy, beside the instructions per I/O");
    cargo(CLIPPY)?;
    steps.begin("licenses, bans and sources of the dependencies");
    cargo_tools::ensure(&cargo_tools::DENY)?;
    cargo(DENY)?;
    steps.begin("instructions per I/O");
    gate.finish(LIMIT)?;
    // Its calls have time limits, so the compilers beside it have the lowest priority.
    let hostile = beside(HOSTILE)?;
    steps.begin("rustdoc, beside hostile clients");
    cargo_nice(RUSTDOC)?;
    steps.begin("test programs, beside hostile clients");
    cargo_nice(TESTS)?;
    steps.begin("benches, quick mode, beside hostile clients");
    cargo_nice(BENCHES)?;
    steps.begin("hostile clients");
    hostile.finish(LIMIT)?;
    steps.begin("all tests");
    if !suite::run(&suite::SuiteOptions::default())? {
        bail!("lab test failed: see above");
    }
    Ok(())
}

/// Runs a cargo command with the settings of CI.
fn cargo(words: &[&str]) -> Result<()> {
    run_with_settings(programs::cargo(words))
}

/// The same with the lowest priority.
fn cargo_nice(words: &[&str]) -> Result<()> {
    let mut command = programs::cargo_tool(Path::new("nice"));
    command.args(["-n", "19"]).arg(programs::cargo_path()).args(words);
    run_with_settings(command)
}

fn run_with_settings(mut command: Command) -> Result<()> {
    steps::run(command.env("RUSTDOCFLAGS", "--deny warnings"), LIMIT)
}
