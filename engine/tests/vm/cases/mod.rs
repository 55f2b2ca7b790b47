//! The cases, by theme. Each file knows one theme and gives a list.

mod filesystem;
mod many;
mod recovery;
mod verify;

use crate::harness::Case;

/// Paths of the feature ladder: every case that is about data runs on each.
const PATHS: [&str; 3] = ["copy", "auto", "batch"];

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

/// Every case, in the order in which they run.
pub(crate) fn all() -> Vec<Case> {
    [
        filesystem::cases(),
        verify::cases(),
        recovery::cases(),
        many::cases(),
    ]
    .into_iter()
    .flatten()
    .collect()
}
