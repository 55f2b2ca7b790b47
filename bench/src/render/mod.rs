// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Output formats of a result: terminal, HTML page, files for other programs.
//!
//! ```text
//!   outcome ─┬─ report: blocks of a document ─┬─ markdown: report.md
//!            │     └ svg: its plots           └─ html: report.html
//!            ├─ terminal, brief
//!            └─ csv, and JSON: result.json
//! ```
//! Measures nothing. `summary` draws the conclusions.

mod brief;
mod csv;
mod doc;
pub mod figures;
mod html;
mod markdown;
mod palette;
mod report;
mod svg;
mod terminal;
#[cfg(test)]
mod tests;

#[cfg(test)]
#[path = "../../tests/data/synthetic.rs"]
pub(crate) mod synthetic;

use std::borrow::Cow;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde::Deserialize;

pub use self::brief::brief;
pub use self::csv::quoted;
pub use self::terminal::terminal;
use crate::outcome::{self, Outcome};

/// Writes `result.json`, `result.csv`, `report.md`, `plots/*.svg` and `report.html` into `dir`.
pub fn write(outcome: &Outcome, dir: &Path) -> Result<()> {
    let outcome = &*usable(outcome);
    let plots = dir.join("plots");
    fs::create_dir_all(&plots).with_context(|| format!("cannot create {}", plots.display()))?;
    // The data first, so that it is saved if rendering fails.
    put(&dir.join(outcome::FILE), &(serde_json::to_string_pretty(outcome)? + "\n"))?;
    put(&dir.join("result.csv"), &csv::csv(outcome))?;
    let blocks = report::report(outcome);
    for plot in doc::plots(&blocks) {
        put(&plots.join(plot.file()), &plot.standalone())?;
    }
    put(&dir.join("report.md"), &markdown::markdown(&blocks))?;
    put(&dir.join("report.html"), &html::html(&blocks))
}

/// Reads a `result.json`, or the one in a directory.
pub fn read(path: &Path) -> Result<Outcome> {
    #[derive(Deserialize)]
    struct SchemaVersion {
        schema: u32,
    }
    let file = if path.is_dir() { path.join(outcome::FILE) } else { path.to_owned() };
    let name = file.display();
    let text = fs::read_to_string(&file).with_context(|| format!("cannot read {name}"))?;
    // The version first: another version may differ in everything else.
    let damaged = || format!("{name} is damaged, or not a result of loopbench");
    match serde_json::from_str(&text).with_context(damaged)? {
        SchemaVersion { schema: outcome::SCHEMA } => serde_json::from_str(&text).with_context(damaged),
        SchemaVersion { schema } => {
            bail!("{name} has format {schema}; this program reads format {}", outcome::SCHEMA)
        }
    }
}

/// Writes atomically: a reader sees the old file or the new one.
fn put(path: &Path, text: &str) -> Result<()> {
    let fresh = path.with_extension("new");
    fs::write(&fresh, text)
        .and_then(|()| fs::rename(&fresh, path))
        .with_context(|| format!("cannot write {}", path.display()))
}

/// Drops samples that are not finite numbers, which JSON cannot represent, and adds a warning.
fn usable(outcome: &Outcome) -> Cow<'_, Outcome> {
    let fine = |sample: &outcome::Sample| sample.iops.is_finite() && sample.bytes_per_s.is_finite();
    let bad = outcome.samples.iter().filter(|sample| !fine(sample)).count();
    if bad == 0 {
        return Cow::Borrowed(outcome);
    }
    let mut outcome = outcome.clone();
    outcome.samples.retain(fine);
    outcome.warnings.push(outcome::Warning {
        what: format!("{bad} samples are not numbers and were left out"),
        advice: "see the reports of fio in raw/ or raw.tar.gz".into(),
    });
    Cow::Owned(outcome)
}
