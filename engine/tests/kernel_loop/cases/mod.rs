// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The cases of tests/vm about images, and cases about devices that live without a daemon.

#[path = "../../vm/cases/claims.rs"]
mod claims;
#[path = "../../vm/cases/commands.rs"]
mod commands;
#[path = "../../vm/cases/durability.rs"]
mod durability;
#[path = "../../vm/cases/errors.rs"]
mod errors;
#[path = "../../vm/cases/filesystem.rs"]
mod filesystem;
#[path = "../../vm/cases/geometry.rs"]
mod geometry;
mod lifetime;
#[path = "../../vm/cases/resize.rs"]
mod resize;
#[path = "../../vm/cases/verify.rs"]
mod verify;

use crate::harness::Case;

/// The I/O mode of these devices.
const IO_MODES: [&str; 1] = ["loop"];

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

/// Cases about the daemon's own I/O: its queues, its scheduler, its log, faults of null_blk, its
/// driver.
const OF_UBLK: [&str; 8] = [
    "claims::failing_io_is_logged",
    "commands::list_and_stats",
    "durability::power_cut",
    "errors::no_driver",
    "geometry::scheduler_and_cache",
    "verify::linked",
    "verify::one_queue",
    "verify::polled",
];

/// Every case, in the order in which they run.
pub(crate) fn all() -> Vec<Case> {
    let of_images = [
        commands::cases(),
        filesystem::cases(),
        verify::cases(),
        geometry::cases(),
        resize::cases(),
        durability::cases(),
        errors::cases(),
        claims::cases(),
    ];
    let of_images = of_images.into_iter().flatten();
    let of_images = of_images.filter(|case| !OF_UBLK.iter().any(|name| case.name().starts_with(name)));
    lifetime::cases().into_iter().chain(of_images).collect()
}
