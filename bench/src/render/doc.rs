// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A document as blocks, the common source of the HTML page and of Markdown.
//!
//! Knows the kinds of blocks, not their syntax or contents.

use super::svg::Plot;
use crate::summary::Verdict;
use crate::units::NOTHING;

pub(super) enum Block {
    /// Level 1 is the document's title.
    Heading {
        level: usize,
        id: String,
        text: String,
    },
    /// A paragraph.
    Text(String),
    /// Names and their values.
    Facts(Vec<(String, String)>),
    /// A problem and what to do about it.
    Warning {
        what: String,
        advice: String,
    },
    Table(Table),
    Plots(Vec<Plot>),
}

pub(super) struct Table {
    /// What the table shows, for readers who do not see the heading above it.
    pub(super) caption: String,
    pub(super) columns: Vec<Column>,
    pub(super) lines: Vec<Line>,
}

pub(super) struct Column {
    pub(super) title: String,
    pub(super) numeric: bool,
}

#[derive(Default)]
pub(super) struct Line {
    pub(super) cells: Vec<String>,
    pub(super) kind: LineKind,
    /// Verdict, for styling; the cells say it too.
    pub(super) verdict: Option<Verdict>,
}

/// The kind of target in a line of a table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum LineKind {
    #[default]
    Other,
    Ours,
    Reference,
}

impl Table {
    /// Columns whose titles begin with `<` hold text, the others numbers.
    pub(super) fn new(caption: impl Into<String>, titles: &[&str]) -> Table {
        let column = |title: &&str| match title.strip_prefix('<') {
            Some(words) => Column { title: words.to_owned(), numeric: false },
            None => Column { title: (*title).to_owned(), numeric: true },
        };
        Table { caption: caption.into(), columns: titles.iter().map(column).collect(), lines: Vec::new() }
    }

    pub(super) fn line(&mut self, kind: LineKind, cells: Vec<String>) {
        self.lines.push(Line { cells, kind, verdict: None });
    }

    /// Removes columns that are empty in every line.
    pub(super) fn condensed(mut self) -> Table {
        let says = |index: usize| {
            index == 0 || self.lines.iter().any(|line| line.cells.get(index).is_some_and(|c| c != NOTHING))
        };
        let kept: Vec<bool> = (0..self.columns.len()).map(says).collect();
        let mut keep = kept.iter().copied();
        self.columns.retain(|_| keep.next().unwrap_or(true));
        for line in &mut self.lines {
            let mut keep = kept.iter().copied();
            line.cells.retain(|_| keep.next().unwrap_or(true));
        }
        self
    }
}

/// All plots of a document.
pub(super) fn plots<'a>(blocks: &'a [Block]) -> impl Iterator<Item = &'a Plot> {
    let of = |block: &'a Block| match block {
        Block::Plots(plots) => plots.as_slice(),
        _ => &[],
    };
    blocks.iter().flat_map(of)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_column_of_dashes_is_left_out() {
        let mut table = Table::new("t", &["<a", "b", "c"]);
        table.line(LineKind::Other, vec!["x".into(), NOTHING.into(), "1".into()]);
        table.line(LineKind::Other, vec!["y".into(), NOTHING.into(), NOTHING.into()]);
        let table = table.condensed();
        let titles: Vec<&str> = table.columns.iter().map(|column| column.title.as_str()).collect();
        assert_eq!(titles, ["a", "c"]);
        assert_eq!(table.lines[1].cells, ["y", NOTHING]);
        assert!(!table.columns[0].numeric && table.columns[1].numeric);
    }
}
