// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Machine, targets and mode of a run, and what they mean for the measurements.

use super::{heading, kind};
use crate::outcome::{Manifest, Mode, Outcome};
use crate::render::doc::{Block, Table};
use crate::units::{NOTHING, plain};

pub(super) fn head(outcome: &Outcome) -> Vec<Block> {
    let manifest = &outcome.manifest;
    let title = format!("Results of {}", or_unknown(&manifest.date));
    let kernel = or_unknown(&manifest.kernel);
    let mut blocks = vec![
        heading(1, "top", &title),
        Block::Text(format!(
            "loopengine beside the kernel's loop driver and others: Linux {kernel}, {}.",
            mode(manifest.mode).0
        )),
    ];
    if !manifest.complete {
        blocks.push(Block::Warning {
            what: "The run was not complete".into(),
            advice: "Some measurements are missing; run it again".into(),
        });
    }
    blocks
}

pub(super) fn setup(outcome: &Outcome) -> Vec<Block> {
    let manifest = &outcome.manifest;
    let mut blocks = vec![heading(2, "setup", "Setup")];
    blocks.push(Block::Text(mode(manifest.mode).1.into()));
    blocks.push(Block::Facts(facts(manifest)));
    if !outcome.warnings.is_empty() {
        blocks.push(heading(2, "warnings", "Warnings"));
        let sentence = |text: &str| {
            let mut letters = text.trim().trim_end_matches('.').chars();
            let first = letters.next().into_iter().flat_map(char::to_uppercase);
            first.chain(letters).collect()
        };
        blocks.extend(outcome.warnings.iter().map(|warning| Block::Warning {
            what: sentence(&warning.what),
            advice: warning.advice.trim().trim_end_matches('.').to_owned(),
        }));
    }
    blocks.push(heading(2, "targets", "Targets"));
    let mut table = Table::new(
        "Measured and unavailable targets",
        &["<target", "<what it is", "<version", "<not measured because"],
    );
    for target in &outcome.targets {
        let references = outcome.jobs.iter().any(|job| job.reference == target.name);
        let reference = if references { target.name.as_str() } else { "" };
        let why = target.unavailable.as_deref().map_or(NOTHING.into(), plain);
        let cells = vec![plain(&target.name), plain(&target.about), known(&target.version), why];
        table.line(kind(&target.name, reference), cells);
    }
    blocks.push(Block::Table(table.condensed()));
    blocks
}

fn facts(manifest: &Manifest) -> Vec<(String, String)> {
    let length = format!(
        "{} {}; {} ms per job, after a ramp of {} ms",
        manifest.rounds,
        if manifest.rounds == 1 { "round" } else { "rounds" },
        manifest.run_ms,
        manifest.ramp_ms
    );
    let fixed = [
        ("kernel", known(&manifest.kernel)),
        ("mode", manifest.mode.name().into()),
        ("CPUs", manifest.cpus.to_string()),
        ("CPU of the host", known(&manifest.host_cpu)),
        ("fio", known(&manifest.fio)),
        ("length", length),
    ];
    let fixed = fixed.into_iter().map(|(name, value)| (name.to_owned(), value));
    fixed.chain(manifest.notes.iter().map(|(name, value)| (plain(name), plain(value)))).collect()
}

/// Describes a mode and the meaning of its measurements.
fn mode(mode: Mode) -> (&'static str, &'static str) {
    match mode {
        Mode::Icount => (
            "one emulated CPU that counts instructions",
            "One emulated CPU on which an instruction takes 1 ns: IOPS = 10⁹ / instructions of the whole \
             system per I/O. In the lab's sealed machine a build repeats exactly. The emulator models neither \
             caches nor the parallelism in a real CPU, so it compares work, not time.",
        ),
        Mode::Smp => (
            "emulated CPUs on a shared machine",
            "Emulated CPUs on a shared machine: only ratios within a round are meaningful. IOPS and \
             latencies depend on the speed of the emulator at that moment.",
        ),
        Mode::Host => (
            "the machine itself",
            "The machine itself: IOPS and latencies are real. Ratios are taken within a round, so that \
             changes between rounds cancel out.",
        ),
    }
}

fn known(text: &str) -> String {
    if text.trim().is_empty() { NOTHING.into() } else { plain(text) }
}

fn or_unknown(text: &str) -> String {
    if text.trim().is_empty() { "unknown".into() } else { plain(text) }
}
