//! The cases, by theme. Each file knows one theme and gives a list.

mod commands;
mod durability;
mod errors;
mod faults;
mod filesystem;
mod geometry;
mod many;
mod recovery;
mod resize;
mod verify;
mod zeroes;

use crate::harness::Case;

/// Paths of the feature ladder: every case that is about data runs on each.
const PATHS: [&str; 3] = ["copy", "auto", "batch"];

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

/// Every case, in the order in which they run.
pub(crate) fn all() -> Vec<Case> {
    [
        commands::cases(),
        filesystem::cases(),
        verify::cases(),
        zeroes::cases(),
        geometry::cases(),
        resize::cases(),
        faults::cases(),
        durability::cases(),
        recovery::cases(),
        errors::cases(),
        many::cases(),
    ]
    .into_iter()
    .flatten()
    .collect()
}
