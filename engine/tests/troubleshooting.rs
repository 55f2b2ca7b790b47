// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The page of messages quotes messages that the program has.
//!
//! Knows the page's tables and the sources of all crates. A placeholder splits a message; each part
//! of three words or more must occur in a source.

use std::fs;
use std::path::Path;

const PAGE: &str = include_str!("../doc/troubleshooting.md");
/// The C library's.
const OF_OTHERS: &[&str] = &["Device or resource busy"];
/// Shorter parts occur by chance.
const WORDS_MIN: usize = 3;

/// All sources of the program as one line, without the line breaks inside of strings.
fn sources() -> String {
    fn read(dir: &Path, text: &mut String) {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                read(&path, text);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                text.push_str(&fs::read_to_string(&path).unwrap());
            }
        }
    }
    let mut text = String::new();
    for dir in ["src", "core/src", "private/src"] {
        read(&Path::new(env!("CARGO_MANIFEST_DIR")).join(dir), &mut text);
    }
    text.replace("\\\n", " ").split_whitespace().collect::<Vec<_>>().join(" ")
}

/// The messages of the page: what is in backquotes in a first column.
fn messages() -> impl Iterator<Item = &'static str> {
    let rows = PAGE.lines().filter_map(|line| line.strip_prefix("| ")?.split(" | ").next());
    rows.flat_map(|cell| cell.split('`').skip(1).step_by(2))
}

/// The literal parts of a message: runs of words that are no placeholder.
fn parts(message: &str) -> Vec<String> {
    let is_literal = |word: &&str| {
        let word = word.trim_matches([',', ':', ';', '.', '(', ')']);
        // IMAGE; and loopN, ublkbN.
        let is_name = word.chars().all(|letter| letter.is_ascii_uppercase()) || word.ends_with('N');
        // FUSE is a name of the program's own messages.
        (!is_name || word == "FUSE")
            && !word.contains(['…', '/', '\'', '='])
            && !word.chars().any(|letter| letter.is_ascii_digit())
    };
    let words: Vec<&str> = message.split_whitespace().collect();
    words
        .split(|word| !is_literal(word))
        .filter(|run| run.len() >= WORDS_MIN)
        .map(|run| run.join(" ").trim_end_matches([',', ':', ';']).to_owned())
        .collect()
}

#[test]
fn quoted_messages_exist() {
    let sources = sources();
    let all: Vec<String> = messages().flat_map(parts).collect();
    assert!(all.len() > 50, "only {} parts: the page has another form", all.len());
    let missing: Vec<&String> =
        all.iter().filter(|part| !sources.contains(*part) && !OF_OTHERS.contains(&part.as_str())).collect();
    assert!(missing.is_empty(), "no source has {missing:#?}");
}

#[test]
fn placeholders_split_a_message() {
    assert_eq!(parts("user N has M pools, which is the limit"), ["pools, which is the limit"]);
    assert_eq!(parts("FUSE is unavailable: /dev/fuse is missing"), ["FUSE is unavailable"]);
    assert_eq!(parts("cannot list the disk ublkbN for udev"), ["cannot list the disk"]);
    assert!(parts("IMAGE is …; no").is_empty());
}
