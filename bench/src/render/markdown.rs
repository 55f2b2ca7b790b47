// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The document as `report.md`.
//!
//! All data is escaped: it is text, never markup.

use std::fmt::Write;

use super::doc::{Block, Table};
use crate::units::plain;

pub(super) fn markdown(blocks: &[Block]) -> String {
    let mut text = String::new();
    for block in blocks {
        match block {
            Block::Heading { level, text: heading, .. } => {
                let _ = writeln!(text, "{} {}\n", "#".repeat(*level), escape(heading));
            }
            Block::Text(paragraph) => {
                let _ = writeln!(text, "{}\n", escape(paragraph));
            }
            Block::Facts(facts) => {
                for (name, value) in facts {
                    let _ = writeln!(text, "- {}: {}", escape(name), escape(value));
                }
                text.push('\n');
            }
            Block::Warning { what, advice } => {
                let _ = writeln!(text, "> **Warning:** {}. {}.\n", escape(what), escape(advice));
            }
            Block::Table(table) => write_table(&mut text, table),
            Block::Plots(plots) => {
                for plot in plots {
                    let _ = writeln!(text, "![{}](plots/{})\n", escape(&plot.title), plot.file());
                }
            }
        }
    }
    text
}

fn write_table(text: &mut String, table: &Table) {
    let _ = writeln!(text, "*{}*\n", escape(&table.caption));
    let mut line = |cells: Vec<String>| {
        let _ = writeln!(text, "| {} |", cells.join(" | "));
    };
    line(table.columns.iter().map(|column| escape(&column.title)).collect());
    line(table.columns.iter().map(|column| if column.numeric { "---:" } else { "---" }.into()).collect());
    for row in &table.lines {
        line(row.cells.iter().map(|cell| escape(cell)).collect());
    }
    text.push('\n');
}

/// Escapes what Markdown would take for markup.
fn escape(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for (index, c) in plain(text).chars().enumerate() {
        match c {
            '<' => safe.push_str("&lt;"),
            '>' => safe.push_str("&gt;"),
            '&' => safe.push_str("&amp;"),
            '\\' | '`' | '*' | '_' | '[' | ']' | '|' | '~' => safe.extend(['\\', c]),
            '#' | '-' | '+' if index == 0 => safe.extend(['\\', c]),
            c => safe.push(c),
        }
    }
    safe
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn markup_in_data_is_text() {
        assert_eq!(escape("# a|b <script> *x*\n"), "\\# a\\|b &lt;script&gt; \\*x\\* ");
        assert_eq!(escape("4K – null_blk"), "4K – null\\_blk");
    }
}
