// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `lab ci`: every check that a change must pass, in the order of `.ci/run`.
//!
//! `.ci/run` only calls this command. All steps build with the profile `lab`, so that no step
//! compiles again what another has compiled.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, bail};

use crate::steps::{self, Beside, Steps};
use crate::{cargo_tools, hostile, programs, setup, suite};

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
const RUSTDOC: &[&str] = &["doc", "--profile", "lab", "--workspace", "--no-deps", "--document-private-items"];
const BENCHES: &[&str] =
    &["bench", "--profile", "lab", "--package", "loopengine", "--bench", "*", "--", "--quick"];
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
    // What counts instructions is one emulated CPU, whatever else runs; compilers use the other.
    steps.begin("programs");
    programs::build()?;
    let gate = Beside::start(Command::new(lab).arg("gate"))?;
    steps.begin("clippy, beside the instructions per I/O");
    cargo(CLIPPY)?;
    steps.begin("licenses, bans and sources of the dependencies");
    cargo_tools::ensure(&cargo_tools::DENY)?;
    cargo(DENY)?;
    steps.begin("rustdoc");
    cargo(RUSTDOC)?;
    steps.begin("benches, quick mode");
    cargo(BENCHES)?;
    steps.begin("instructions per I/O");
    gate.finish(LIMIT)?;
    steps.begin("hostile clients");
    let campaign = hostile::HostileOptions { minutes: 2, seed: Some(7), only: None };
    passed("lab hostile", hostile::run(&campaign)?)?;
    steps.begin("all tests");
    passed("lab test", suite::run(&suite::SuiteOptions::default())?)
}

/// Runs a cargo command with the settings of CI.
fn cargo(words: &[&str]) -> Result<()> {
    let mut command = programs::cargo(words);
    command.env("RUSTDOCFLAGS", "--deny warnings");
    steps::run(&mut command, LIMIT)
}

fn passed(command: &str, success: bool) -> Result<()> {
    if !success {
        bail!("{command} failed: see above");
    }
    Ok(())
}
