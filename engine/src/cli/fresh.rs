// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Manual pages and completions in the repository are up to date.
//!
//! `UPDATE=1 cargo test --bin loopengine --test fresh` regenerates them.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use super::generate;
use super::pages::{PAGES, man};

fn kept(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

fn files(dir: &Path) -> BTreeMap<String, String> {
    let read = fs::read_dir(dir).into_iter().flatten().map(|entry| {
        let entry = entry.unwrap();
        let text = fs::read_to_string(entry.path()).unwrap();
        (entry.file_name().into_string().unwrap(), text)
    });
    read.collect()
}

fn updating() -> bool {
    std::env::var_os("UPDATE").is_some()
}

fn compare(name: &str, generated: &Path) {
    let kept = kept(name);
    if updating() {
        let _ = fs::remove_dir_all(&kept);
        fs::create_dir_all(&kept).unwrap();
        for (name, text) in files(generated) {
            fs::write(kept.join(name), text).unwrap();
        }
    }
    let (want, have) = (files(generated), files(&kept));
    assert!(!want.is_empty());
    let names = |files: &BTreeMap<String, String>| files.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(&want), names(&have), "{name}: run 'UPDATE=1 cargo test --bin loopengine --test fresh'");
    for (file, text) in want {
        assert!(
            text == have[&file],
            "{name}/{file} is stale: run 'UPDATE=1 cargo test --bin loopengine --test fresh'"
        );
    }
}

#[test]
fn manual_pages_are_up_to_date() {
    let dir = tempfile::tempdir().unwrap();
    for (name, text) in man::generate().unwrap() {
        fs::write(dir.path().join(name), text).unwrap();
    }
    compare("share/man", dir.path());
    let embedded: BTreeMap<String, String> =
        PAGES.iter().map(|(name, text)| ((*name).to_owned(), (*text).to_owned())).collect();
    let message = "update PAGES in src/cli/pages.rs, and build again";
    assert!(updating() || embedded == files(dir.path()), "{message}");
}

#[test]
fn completions_are_up_to_date() {
    let dir = tempfile::tempdir().unwrap();
    generate::completions(dir.path()).unwrap();
    compare("share/completions", dir.path());
}
