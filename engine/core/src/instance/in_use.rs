// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Finds the users of a device, for messages and for operations that are rejected while it is in
//! use.
//!
//! Reads mounts, swap, holders and open files from the kernel; changes nothing.

use std::fs;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use crate::frontend::FrontendDevice;
use crate::sys::printable;
use crate::sys::processes::{self, Open, Process};
use crate::sys::usage::{self, Disks};

/// The user of a device: "mounted on DIR", "open in pid 123 (PROGRAM)" and the like.
pub fn user_of(device: &FrontendDevice) -> Option<String> {
    let (node, number) = (device.node(), device.device_number().ok());
    // A FUSE file knows whether it is open.
    if number.is_none() && !device.is_open() {
        return None;
    }
    let disks = Disks::of(&node);
    let mount = || {
        disks
            .mounts()
            .first()
            .map(|directory| format!("mounted on {}", printable(&directory.display().to_string())))
    };
    let swap = || disks.swaps().first().map(|_| "used as swap".to_owned());
    mount()
        .or_else(swap)
        .or_else(|| holder(&node).map(|holder| format!("used by {holder}")))
        .or_else(|| program_with(&node, number).map(|program| format!("open in {program}")))
        .or_else(|| device.is_open().then(|| "open".to_owned()))
        .or_else(|| is_claimed(&node).then(|| "claimed by another program".to_owned()))
}

/// A block device stacked on this one, or on one of its partitions.
fn holder(node: &Path) -> Option<String> {
    let upon = |node: PathBuf| {
        let holders = Path::new("/sys/class/block").join(node.file_name()?).join("holders");
        let first = fs::read_dir(holders).ok()?.flatten().next().map(|upon| upon.file_name());
        first.or_else(|| Disks::backed_by(|file| file == node).first())
    };
    let name = nodes(node).into_iter().find_map(upon)?;
    Some(format!("/dev/{}", name.to_string_lossy()))
}

/// A process that has it or one of its partitions open.
fn program_with(node: &Path, number: Option<u64>) -> Option<Process> {
    let nodes = nodes(node);
    let open = processes::open_devices(|name| nodes.iter().any(|node| node == name));
    let partition = |open: &Open| open.name != node && open.rdev.is_some();
    open.iter().find(|open| open.rdev == number || partition(open)).and_then(|open| Process::of(open.pid))
}

/// The nodes of the disk and of its partitions.
fn nodes(node: &Path) -> Vec<PathBuf> {
    std::iter::once(node.to_owned()).chain(usage::partitions(node).map(|partition| partition.node)).collect()
}

/// Whether it is claimed exclusively. (Shared opens are not detected.)
fn is_claimed(node: &Path) -> bool {
    let opened = fs::File::options().read(true).custom_flags(libc::O_EXCL | libc::O_NONBLOCK).open(node);
    opened.is_err_and(|error| error.raw_os_error() == Some(libc::EBUSY))
}
