// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The main question: how loopengine and FUSE servers compare with the kernel's loop driver.

use super::{heading, kind};
use crate::job::LOOP;
use crate::outcome::{JobInfo, Outcome};
use crate::render::doc::{Block, LineKind, Table};
use crate::render::palette::{Palette, Style, ours};
use crate::render::svg::forest::{Group, forest};
use crate::summary::{Row, rows};
use crate::units::{self, NOTHING, plain, ratio_of};

/// Representative jobs; if none of them was run, the first few are used.
const CORE: [&str; 7] = [
    "randread-4k-qd1",
    "randread-4k-qd32",
    "randread-4k-qd32x2",
    "randwrite-4k-qd32",
    "read-128k-qd8",
    "write-128k-qd8",
    "fsync-4k-qd1",
];

/// A group of targets that the question is about.
struct Contender {
    name: &'static str,
    /// Whether a target belongs to the group.
    means: fn(&str) -> bool,
}

/// The row of each contender.
type ContenderRows = [Option<Row>; CONTENDERS.len()];

const CONTENDERS: [Contender; 4] = [
    Contender { name: "loopengine", means: |target| ours(target) && !target.contains("fuse") },
    Contender { name: "loopengine behind FUSE", means: |target| ours(target) && target.contains("fuse") },
    Contender {
        name: "QEMU's FUSE export",
        means: |target| target.contains("qemu") && target.contains("fuse"),
    },
    Contender { name: "FUSE passthrough", means: |target| target == "fuse passthrough" },
];

pub(super) fn answer(outcome: &Outcome, palette: &Palette) -> Vec<Block> {
    let jobs = summary_jobs(outcome);
    let results: Vec<(&JobInfo, ContenderRows)> = jobs
        .iter()
        .map(|job| {
            let rows = rows(outcome, job);
            (*job, CONTENDERS.map(|contender| first(&rows, job, contender.means)))
        })
        .collect();
    let mut blocks = vec![heading(2, "answer", "In short")];
    let reached: Vec<(String, String)> =
        (0..CONTENDERS.len()).filter_map(|index| span(&results, index)).collect();
    if reached.is_empty() {
        blocks.push(Block::Text(format!("No target was measured beside {LOOP}: there is no ratio.")));
        return blocks;
    }
    blocks.push(Block::Text(format!(
        "Operations per second as a multiple of the kernel's loop driver in the same round, over {}. \
         loopengine runs in its default I/O mode, the best that the kernel supports.",
        if results.len() == 1 { "one job".into() } else { format!("{} jobs", results.len()) },
    )));
    let said: Vec<String> = reached.iter().map(|(name, span)| format!("{name} {span}")).collect();
    blocks.push(Block::Facts(reached));
    let point = |row: &Row| Some((row.ratio?, row.ratio_interval));
    let groups: Vec<Group> = results
        .iter()
        .map(|(job, rows)| Group {
            title: plain(&job.title),
            points: rows.each_ref().map(|row| row.as_ref().and_then(point)).into(),
        })
        .collect();
    // A group has the colour of its representative.
    let style = |index: usize| {
        let row = results.iter().find_map(|(_, rows)| rows[index].as_ref());
        palette.of(row.map_or("", |row| &row.target))
    };
    let legend: Vec<(String, Style)> =
        CONTENDERS.iter().enumerate().map(|(index, it)| (it.name.to_owned(), style(index))).collect();
    let about = format!("{}. Whiskers: 95 % intervals.", said.join("; "));
    blocks.extend(forest(LOOP, about, &legend, &groups).map(|plot| Block::Plots(vec![plot])));
    blocks.push(Block::Table(table(&results)));
    blocks
}

fn table(results: &[(&JobInfo, ContenderRows)]) -> Table {
    let titles: Vec<String> = CONTENDERS.iter().map(|contender| format!("× {}", contender.name)).collect();
    let mut table = Table::new(
        format!("Throughput × {LOOP}"),
        &["<job", &titles[0], "<I/O mode", &titles[1], &titles[2], &titles[3]],
    );
    for (job, rows) in results {
        let cell = |index: usize| rows[index].as_ref().map_or(NOTHING.into(), ratio_of);
        let path = rows[0].as_ref().map_or(NOTHING.into(), |row| plain(&row.target));
        table.line(LineKind::Other, vec![plain(&job.title), cell(0), path, cell(1), cell(2), cell(3)]);
    }
    table.condensed()
}

/// The representative jobs of this result.
pub fn summary_jobs(outcome: &Outcome) -> Vec<&JobInfo> {
    let against_loop = || outcome.jobs.iter().filter(|job| job.reference == LOOP);
    let core: Vec<&JobInfo> = against_loop().filter(|job| CORE.contains(&job.name.as_str())).collect();
    if core.is_empty() { against_loop().take(CORE.len()).collect() } else { core }
}

/// The first target of the group, which is the default. The fastest per job would flatter.
fn first(rows: &[Row], job: &JobInfo, means: fn(&str) -> bool) -> Option<Row> {
    let known = |row: &&Row| {
        kind(&row.target, &job.reference) != LineKind::Reference
            && means(&row.target)
            && row.ratio.is_some_and(f64::is_finite)
    };
    rows.iter().find(known).cloned()
}

/// A name and the range of its ratios: "0.85 to 1.36 ×".
fn span(results: &[(&JobInfo, ContenderRows)], index: usize) -> Option<(String, String)> {
    let reached = units::span(results.iter().filter_map(|(_, rows)| rows[index].as_ref()?.ratio))?;
    Some((CONTENDERS[index].name.to_owned(), format!("{reached} ×")))
}
