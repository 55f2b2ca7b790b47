// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The figures in documents are those of the results that they link. `loopbench figures` rewrites
//! them.

use std::path::Path;

use loopbench::render::figures::{DOCUMENTS, refreshed};

#[test]
fn documents_have_the_figures_of_the_results() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    for document in DOCUMENTS {
        let text = std::fs::read_to_string(root.join(document)).unwrap();
        let wanted = refreshed(&text, root).unwrap();
        for (line, wanted) in text.lines().zip(wanted.lines()) {
            assert_eq!(line, wanted, "{document}: run 'cargo run --bin loopbench -- figures'");
        }
    }
}

/// Figures, names and links that are wrong are noticed.
#[test]
fn rejects_unknown_jobs_and_targets() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let result = "[report](results/2026-11-30-lab-icount-7/report.md)";
    let table = |header: &str, row: &str| format!("## A\n\n{header}\n|---|---:|\n{row}\n\n{result}\n");
    let refreshed = |text: &str| refreshed(text, root);
    let good = table("| IOPS | QD 1 |", "| kernel loop | 1 |");
    let text = refreshed(&good).unwrap();
    assert_eq!(refreshed(&text).unwrap(), text);
    assert_ne!(text, good);
    for (header, row, error) in [
        ("| IOPS | QD 2 |", "| kernel loop | 1 |", "names no job"),
        ("| IOPS | QD 1 |", "| another | 1 |", "names no target"),
    ] {
        let found = format!("{:#}", refreshed(&table(header, row)).unwrap_err());
        assert!(found.contains(error), "{found}");
    }
    assert!(refreshed(&good.replace(result, "")).is_err());
    let other = "| name | value |\n|---|---|\n| kernel loop | 1 |\n";
    assert_eq!(refreshed(other).unwrap(), other);
}
