// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The cases of tests/vm about images, and cases about files.

#[path = "../../vm/cases/backends.rs"]
mod backends;
mod bounds;
#[path = "../../vm/cases/claims.rs"]
mod claims;
#[path = "../../vm/cases/commands.rs"]
mod commands;
mod configured;
#[path = "../../vm/cases/durability.rs"]
mod durability;
#[path = "../../vm/cases/errors.rs"]
mod errors;
#[path = "../../vm/cases/faults.rs"]
mod faults;
mod files;
#[path = "../../vm/cases/filesystem.rs"]
mod filesystem;
#[path = "../../vm/cases/geometry.rs"]
mod geometry;
#[path = "../../vm/cases/io_limits.rs"]
mod io_limits;
mod lifetime;
#[path = "../../vm/cases/resize.rs"]
mod resize;
#[path = "../../vm/cases/sandbox.rs"]
mod sandbox;
#[path = "../../vm/cases/verify.rs"]
mod verify;

use crate::harness::Case;

/// The I/O mode of files.
const IO_MODES: [&str; 1] = ["fuse"];

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

/// Cases that need a block device: attributes in sysfs, ublk's I/O modes, ioctls, faults of
/// null_blk.
const OF_BLOCK_DEVICES: [&str; 13] = [
    "commands::attach_run",
    "commands::numbers_and_names",
    "durability::power_cut",
    "errors::no_driver",
    "faults::bad_sectors_below",
    "geometry::block_sizes",
    "geometry::large_sectors_below",
    "geometry::read_only",
    "geometry::scheduler_and_cache",
    "resize::grow_mounted_file_system",
    "resize::refusals_name_the_reason",
    "resize::shrinking_needs_options",
    "verify::linked",
];

/// Every case, in the order in which they run.
pub(crate) fn all() -> Vec<Case> {
    let of_images = [
        commands::cases(),
        filesystem::cases(),
        verify::cases(),
        geometry::cases(),
        io_limits::cases(),
        resize::cases(),
        faults::cases(),
        durability::cases(),
        errors::cases(),
        claims::cases(),
        backends::cases(),
        sandbox::cases(),
    ];
    let of_images = of_images.into_iter().flatten();
    let of_images =
        of_images.filter(|case| !OF_BLOCK_DEVICES.iter().any(|name| case.name().starts_with(name)));
    let own = files::cases().into_iter().chain(configured::cases());
    own.chain(bounds::cases()).chain(lifetime::cases()).chain(of_images).collect()
}
