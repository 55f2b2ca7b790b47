// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The document as `report.html`: one file that loads nothing from the network.
//!
//! No script. All data is escaped. The page is well-formed XML, so that a test can parse it.

use std::fmt::Write;

use super::doc::{Block, Line, LineKind, Table};
use super::svg;
use crate::summary::Verdict;
use crate::units::escape;

const CSS: &str = include_str!("page.css");

pub(super) fn html(blocks: &[Block]) -> String {
    let title = blocks.iter().find_map(|block| match block {
        Block::Heading { level: 1, text, .. } => Some(escape(text)),
        _ => None,
    });
    let mut page = format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\"/>\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"/>\n\
         <meta name=\"color-scheme\" content=\"light dark\"/>\n<link rel=\"icon\" href=\"data:,\"/>\n\
         <title>{}: loopbench</title>\n\
         <style>\n{CSS}{}</style>\n</head>\n<body>\n<main>\n",
        title.unwrap_or_default(),
        svg::CSS
    );
    let mut second = 0;
    for block in blocks {
        if let Block::Heading { level: 2, .. } = block {
            second += 1;
            // After the first section, which is the answer.
            if second == 2 {
                contents(&mut page, blocks);
            }
        }
        write_block(&mut page, block);
    }
    page.push_str("</main>\n</body>\n</html>\n");
    page
}

fn contents(page: &mut String, blocks: &[Block]) {
    page.push_str("<nav aria-label=\"Contents\"><ul>\n");
    for block in blocks {
        if let Block::Heading { level: level @ 2.., id, text } = block {
            let _ = writeln!(
                page,
                "<li class=\"l{level}\"><a href=\"#{}\">{}</a></li>",
                escape(id),
                escape(text)
            );
        }
    }
    page.push_str("</ul></nav>\n");
}

fn write_block(page: &mut String, block: &Block) {
    match block {
        Block::Heading { level, id, text } => {
            let _ = writeln!(page, "<h{level} id=\"{}\">{}</h{level}>", escape(id), escape(text));
        }
        Block::Text(text) => {
            let _ = writeln!(page, "<p>{}</p>", escape(text));
        }
        Block::Facts(facts) => {
            page.push_str("<dl>\n");
            for (name, value) in facts {
                let _ = writeln!(page, "<div><dt>{}</dt><dd>{}</dd></div>", escape(name), escape(value));
            }
            page.push_str("</dl>\n");
        }
        Block::Warning { what, advice } => {
            let (what, advice) = (escape(what), escape(advice));
            let _ = writeln!(page, "<p class=\"warning\"><strong>{what}.</strong> {advice}.</p>");
        }
        Block::Table(table) => write_table(page, table),
        Block::Plots(plots) => {
            page.push_str("<div class=\"plots\">\n");
            for plot in plots {
                let _ = writeln!(page, "<figure>{}</figure>", plot.inline());
            }
            page.push_str("</div>\n");
        }
    }
}

fn write_table(page: &mut String, table: &Table) {
    let caption = escape(&table.caption);
    let _ = write!(
        page,
        "<div class=\"scroll\" role=\"region\" tabindex=\"0\" aria-label=\"{caption}\"><table>\n\
         <caption>{caption}</caption>\n<thead><tr>"
    );
    for column in &table.columns {
        let class = if column.numeric { " class=\"number\"" } else { "" };
        let _ = write!(page, "<th scope=\"col\"{class}>{}</th>", escape(&column.title));
    }
    page.push_str("</tr></thead>\n<tbody>\n");
    for line in &table.lines {
        let _ = write!(page, "<tr class=\"{}\">", class(line));
        for (index, (cell, column)) in line.cells.iter().zip(&table.columns).enumerate() {
            let cell = escape(cell);
            let _ = match (index, column.numeric) {
                (0, _) => write!(page, "<th scope=\"row\">{cell}</th>"),
                (_, true) => write!(page, "<td class=\"number\">{cell}</td>"),
                (_, false) => write!(page, "<td>{cell}</td>"),
            };
        }
        page.push_str("</tr>\n");
    }
    page.push_str("</tbody></table></div>\n");
}

fn class(line: &Line) -> String {
    let kind = match line.kind {
        LineKind::Other => "other",
        LineKind::Ours => "ours",
        LineKind::Reference => "reference",
    };
    let verdict = match line.verdict {
        Some(Verdict::NoDifference) => " same",
        _ => "",
    };
    format!("{kind}{verdict}")
}
