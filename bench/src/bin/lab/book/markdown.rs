// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Markdown as text: its links, its includes and its title.
//!
//! Knows where code begins and ends, since a link in code is none. Reads no file.

use std::ops::Range;

use anyhow::Result;

/// Rewrites the address of each link and image in `text`.
pub(super) fn rewrite(text: &str, mut address: impl FnMut(&str) -> Result<String>) -> Result<String> {
    let mut out = String::with_capacity(text.len());
    let mut end = 0;
    for range in addresses(text) {
        out.push_str(&text[end..range.start]);
        out.push_str(&address(&text[range.clone()])?);
        end = range.end;
    }
    out.push_str(&text[end..]);
    Ok(out)
}

/// Replaces each line `{{#include FILE}}` by what `read` returns for it.
pub(super) fn include(text: &str, read: impl Fn(&str) -> Result<String>) -> Result<String> {
    let mut out = String::with_capacity(text.len());
    for line in text.split_inclusive('\n') {
        let file = line.trim().strip_prefix("{{#include ").and_then(|rest| rest.strip_suffix("}}"));
        match file {
            Some(file) => out.push_str(&read(file.trim())?),
            None => out.push_str(line),
        }
    }
    Ok(out)
}

/// The first heading.
pub(super) fn title(text: &str) -> Option<String> {
    let heading = text.lines().find_map(|line| line.strip_prefix("# "))?;
    Some(heading.trim().replace('`', ""))
}

/// Places of the addresses of links and images.
fn addresses(text: &str) -> Vec<Range<usize>> {
    let mut found = Vec::new();
    let mut fence: Option<&str> = None;
    let mut offset = 0;
    // A paragraph at a time: a code span and a link may go over lines, but not over a blank one.
    let mut paragraph = String::new();
    let mut paragraph_at = 0;
    for line in text.split_inclusive('\n') {
        let trimmed = line.trim_start();
        let mark = ["```", "~~~"].into_iter().find(|mark| trimmed.starts_with(mark));
        let ends = fence.is_some() || mark.is_some() || trimmed.is_empty();
        if ends {
            found.extend(
                in_paragraph(&paragraph).into_iter().map(|r| r.start + paragraph_at..r.end + paragraph_at),
            );
            paragraph.clear();
        } else {
            if paragraph.is_empty() {
                paragraph_at = offset;
            }
            paragraph.push_str(line);
        }
        match (fence, mark) {
            (None, Some(mark)) => fence = Some(mark),
            (Some(open), Some(mark)) if open == mark => fence = None,
            _ => {}
        }
        offset += line.len();
    }
    found.extend(in_paragraph(&paragraph).into_iter().map(|r| r.start + paragraph_at..r.end + paragraph_at));
    found
}

fn in_paragraph(text: &str) -> Vec<Range<usize>> {
    let bytes = text.as_bytes();
    let mut found = Vec::new();
    let mut at = 0;
    while at < bytes.len() {
        match bytes[at] {
            b'\\' => at += 2,
            b'`' => at = after_code(text, at),
            b']' if bytes.get(at + 1) == Some(&b'(') => {
                let start = at + 2;
                let Some(length) = text[start..].find([')', ' ', '\n']) else { break };
                found.push(start..start + length);
                at = start + length;
            }
            b']' if text[at..].starts_with("]: ")
                && text[..at].rfind('\n').map_or(0, |n| n + 1) == open(text, at) =>
            {
                let start = at + 3;
                let length = text[start..].find([' ', '\n']).unwrap_or(text.len() - start);
                found.push(start..start + length);
                at = start + length;
            }
            _ => at += 1,
        }
    }
    found
}

/// Place of the bracket that the one at `at` closes.
fn open(text: &str, at: usize) -> usize {
    text[..at].rfind('[').unwrap_or(usize::MAX)
}

/// The end of the code span that begins at `at`, or of its backticks if nothing closes it.
fn after_code(text: &str, at: usize) -> usize {
    let ticks = text[at..].len() - text[at..].trim_start_matches('`').len();
    let begin = at + ticks;
    let mut search = begin;
    while let Some(next) = text[search..].find('`').map(|next| search + next) {
        let length = text[next..].len() - text[next..].trim_start_matches('`').len();
        if length == ticks {
            return next + length;
        }
        search = next + length;
    }
    begin
}

#[cfg(test)]
mod tests {
    use super::*;

    fn links(text: &str) -> Vec<&str> {
        addresses(text).into_iter().map(|range| &text[range]).collect()
    }

    #[test]
    fn finds_links_images_and_definitions() {
        let text = "a [b](c.md) ![d](e.svg \"title\")\n[two\nlines](f.md#g)\n\n[h]: i.md\n";
        assert_eq!(links(text), ["c.md", "e.svg", "f.md#g", "i.md"]);
    }

    #[test]
    fn ignores_links_in_code() {
        let text = "`[a](b)` ``[a`](b)`` [c](d)\n\n```\n[e](f)\n\n[g](h)\n```\n[i](j)\n";
        assert_eq!(links(text), ["d", "j"]);
    }

    #[test]
    fn rewrites_addresses_only() {
        let text = rewrite("x [c.md](c.md) y", |address| Ok(format!("../{address}"))).unwrap();
        assert_eq!(text, "x [c.md](../c.md) y");
    }

    #[test]
    fn replaces_includes_and_finds_titles() {
        let text = include("# A `b`\n{{#include x}}\nend\n", |file| Ok(format!("<{file}>\n"))).unwrap();
        assert_eq!(text, "# A `b`\n<x>\nend\n");
        assert_eq!(title(&text).as_deref(), Some("A b"));
        assert_eq!(title("no heading"), None);
    }
}
