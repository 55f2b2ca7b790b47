// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The cases of tests/vm about images, and cases about devices that live without a daemon.

#[path = "../../vm/cases/backends.rs"]
mod backends;
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
mod pools;
mod pools_end;
#[path = "../../vm/cases/private_binding.rs"]
mod private_binding;
#[path = "../../vm/cases/private_builders.rs"]
mod private_builders;
#[path = "../../vm/cases/private_bundle.rs"]
mod private_bundle;
#[path = "../../vm/cases/private_claims.rs"]
mod private_claims;
#[path = "../../vm/cases/private_container_mounts.rs"]
mod private_container_mounts;
#[path = "../../vm/cases/private_containers.rs"]
mod private_containers;
#[path = "../../vm/cases/private_driver.rs"]
mod private_driver;
#[path = "../../vm/cases/private_figures.rs"]
mod private_figures;
#[path = "../../vm/cases/private_hostile.rs"]
mod private_hostile;
#[path = "../../vm/cases/private_hung.rs"]
mod private_hung;
#[path = "../../vm/cases/private_images.rs"]
mod private_images;
#[path = "../../vm/cases/private_isolation.rs"]
mod private_isolation;
#[path = "../../vm/cases/private_kernel_mounts.rs"]
mod private_kernel_mounts;
#[path = "../../vm/cases/private_known.rs"]
mod private_known;
#[path = "../../vm/cases/private_lifetime.rs"]
mod private_lifetime;
#[path = "../../vm/cases/private_losetup.rs"]
mod private_losetup;
#[path = "../../vm/cases/private_mapped.rs"]
mod private_mapped;
#[path = "../../vm/cases/private_mount.rs"]
mod private_mount;
#[path = "../../vm/cases/private_mount_command.rs"]
mod private_mount_command;
#[path = "../../vm/cases/private_names.rs"]
mod private_names;
#[path = "../../vm/cases/private_nspawn.rs"]
mod private_nspawn;
#[path = "../../vm/cases/private_partitions.rs"]
mod private_partitions;
#[path = "../../vm/cases/private_podman.rs"]
mod private_podman;
#[path = "../../vm/cases/private_rounds.rs"]
mod private_rounds;
#[path = "../../vm/cases/private_script.rs"]
mod private_script;
#[path = "../../vm/cases/private_socket.rs"]
mod private_socket;
#[path = "../../vm/cases/private_sysfs.rs"]
mod private_sysfs;
#[path = "../../vm/cases/private_users.rs"]
mod private_users;
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
const OF_UBLK: [&str; 7] = [
    "claims::failing_io_is_logged",
    "commands::list_and_stats",
    "durability::power_cut",
    "errors::no_driver",
    "geometry::scheduler_and_cache",
    "verify::linked",
    "verify::one_queue",
];

/// Cases about private pools that the kernel's driver answers differently (`pools` has those), that
/// need its module unloaded, or that look at ublk itself.
const OF_UBLK_POOLS: [&str; 8] = [
    "private::figures::calls",
    "private::figures::last_close",
    "private::without_interception",
    "private_claims::pools_share_with_a_warning",
    "private_hung::",
    "private_isolation::stale_references_fail",
    "private_lifetime::leaked_namespace",
    "private::sysfs::dissect",
];

/// Cases that a machine may not be able to run, and what they need.
const NEEDS_VM: [(&str, &str); 10] = [
    ("private::driver", "unloads the kernel's loop driver"),
    ("private_containers::", "container runtimes need cgroup v2 alone"),
    ("private_lifetime::oom", "needs cgroup v2 alone"),
    ("private_lifetime::cgroup_kill", "needs cgroup v2 alone"),
    ("private_lifetime::fuse_killed", "needs cgroup v2 alone"),
    ("private::builders", "needs vfat in the kernel"),
    ("private::kernel_mount_file_systems", "needs vfat, squashfs and erofs in the kernel"),
    ("private::mapped", "needs device mapper and md in the kernel"),
    ("private_nspawn", "needs a machine without another init"),
    ("private_images::sizes", "needs a file system with files of 2^63 bytes"),
];

/// The others about private pools, unless LOOPENGINE_VM_CASES=1: their limits of time and their
/// counts of descriptors assume that nothing else runs.
const NEEDS_IDLE_MACHINE: (&str, &str) =
    ("private", "needs a machine without other load: LOOPENGINE_VM_CASES=1 runs it");

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
        backends::cases(),
    ];
    let of_pools = [
        private_binding::cases(),
        private_builders::cases(),
        private_claims::cases(),
        private_container_mounts::cases(),
        private_containers::cases(),
        private_driver::cases(),
        private_figures::cases(),
        private_hostile::cases(),
        private_hung::cases(),
        private_images::cases(),
        private_isolation::cases(),
        private_kernel_mounts::cases(),
        private_lifetime::cases(),
        private_losetup::cases(),
        private_mapped::cases(),
        private_mount::cases(),
        private_mount_command::cases(),
        private_names::cases(),
        private_nspawn::cases(),
        private_partitions::cases(),
        private_podman::cases(),
        private_rounds::cases(),
        private_socket::cases(),
        private_sysfs::cases(),
        private_users::cases(),
    ];
    let of_images = of_images.into_iter().chain(of_pools).flatten();
    let not_here = OF_UBLK.iter().chain(&OF_UBLK_POOLS);
    let of_images = of_images.filter(|case| !not_here.clone().any(|name| case.name().starts_with(name)));
    let all = lifetime::cases().into_iter().chain(pools::cases()).chain(pools_end::cases()).chain(of_images);
    let not_asked_for = std::env::var_os("LOOPENGINE_VM_CASES").is_none();
    let idle = not_asked_for.then_some(&NEEDS_IDLE_MACHINE);
    let needs = |case: &Case| NEEDS_VM.iter().chain(idle).find(|(name, _)| case.name().starts_with(name));
    let here = |case: Case| match needs(&case) {
        Some((_, why)) => case.in_vm(why),
        None => case,
    };
    all.map(here).collect()
}
