// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The cases, by theme. Each file covers one theme and returns a list.

mod backends;
mod claims;
mod commands;
mod discard_support;
mod durability;
mod durable_writes;
mod errors;
mod faults;
mod filesystem;
mod geometry;
mod io_limits;
mod many;
mod partscan;
mod private_binding;
mod private_builders;
mod private_bundle;
mod private_claims;
mod private_container_mounts;
mod private_containers;
mod private_driver;
mod private_figures;
mod private_hostile;
mod private_hung;
mod private_images;
mod private_isolation;
mod private_kernel_mounts;
mod private_known;
mod private_lifetime;
mod private_losetup;
mod private_mapped;
mod private_mount;
mod private_mount_command;
mod private_names;
mod private_nspawn;
mod private_partitions;
mod private_podman;
mod private_rounds;
mod private_script;
mod private_socket;
mod private_sysfs;
mod private_users;
mod private_workers;
mod recovery;
mod recovery_image;
mod recovery_state;
mod resize;
mod sandbox;
mod shutdown;
mod stop;
mod udev;
mod verify;
mod zeroes;

use crate::harness::Case;

/// The I/O modes: cases about data run in each of them.
const IO_MODES: [&str; 3] = ["copy", "auto", "batch"];

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

/// Every case, in the order in which they run.
pub(crate) fn all() -> Vec<Case> {
    [
        commands::cases(),
        discard_support::cases(),
        filesystem::cases(),
        verify::cases(),
        zeroes::cases(),
        geometry::cases(),
        io_limits::cases(),
        partscan::cases(),
        resize::cases(),
        faults::cases(),
        durability::cases(),
        durable_writes::cases(),
        recovery::cases(),
        recovery_image::cases(),
        recovery_state::cases(),
        stop::cases(),
        udev::cases(),
        shutdown::cases(),
        errors::cases(),
        claims::cases(),
        backends::cases(),
        many::cases(),
        private_losetup::cases(),
        private_figures::cases(),
        sandbox::cases(),
        private_binding::cases(),
        private_claims::cases(),
        private_driver::cases(),
        private_hostile::cases(),
        private_mapped::cases(),
        private_builders::cases(),
        private_mount::cases(),
        private_names::cases(),
        private_kernel_mounts::cases(),
        private_mount_command::cases(),
        private_users::cases(),
        private_workers::cases(),
        private_socket::cases(),
        private_containers::cases(),
        private_container_mounts::cases(),
        private_hung::cases(),
        private_images::cases(),
        private_isolation::cases(),
        private_lifetime::cases(),
        private_nspawn::cases(),
        private_partitions::cases(),
        private_sysfs::cases(),
        private_podman::cases(),
        private_rounds::cases(),
    ]
    .into_iter()
    .flatten()
    .collect()
}
