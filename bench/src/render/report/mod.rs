// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Contents of a report, most important first.
//!
//! Knows the text, not the syntax of HTML or Markdown.

mod answer;

pub(super) mod cost;
mod job;
mod service;
mod setup;

pub(super) use self::answer::summary_jobs;
use super::doc::{Block, LineKind};
use super::palette::{Palette, ours};
use super::svg;
use crate::outcome::Outcome;

pub(super) fn report(outcome: &Outcome) -> Vec<Block> {
    let palette = Palette::new(outcome);
    let mut blocks = setup::head(outcome);
    blocks.extend(answer::answer(outcome, &palette));
    blocks.extend(setup::setup(outcome));
    if let Some(plot) = svg::depth::depth(outcome, &palette) {
        blocks.push(heading(2, "depth", "Throughput against depth"));
        blocks.push(Block::Text(
            "The gain from more I/Os in flight. Where a line is flat, a resource is saturated.".into(),
        ));
        blocks.push(Block::Plots(vec![plot]));
    }
    blocks.push(heading(2, "jobs", "Jobs"));
    blocks.push(job::legend(outcome));
    blocks.extend(outcome.jobs.iter().flat_map(|job| job::job(outcome, job, &palette)));
    blocks.extend(service::attach(outcome));
    blocks.extend(service::idle(outcome));
    blocks
}

fn heading(level: usize, id: &str, text: &str) -> Block {
    Block::Heading { level, id: id.to_owned(), text: text.to_owned() }
}

fn kind(target: &str, reference: &str) -> LineKind {
    match target {
        target if target == reference => LineKind::Reference,
        target if ours(target) => LineKind::Ours,
        _ => LineKind::Other,
    }
}
