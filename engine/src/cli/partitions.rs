// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Waits for the partitions of a device that was just attached.
//!
//! The kernel scans the partition table asynchronously, and the daemon then creates the names. This
//! module waits for both.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::io::Errno;

use super::out;
use crate::instance::spec::DeviceInfo;
use crate::sys::{block, usage};

/// Time for the names to appear after the partitions.
const NAMES: Duration = Duration::from_secs(5);
const PAUSE: Duration = Duration::from_millis(5);

/// Waits until the partitions of a device and their names exist. Prints a warning if they do not;
/// the device itself works.
pub(super) fn wait(device: &DeviceInfo) {
    if let Err(error) = read(Path::new(&device.node)) {
        out::message(format_args!("cannot read the partition table of {}: {error}", device.path));
        return;
    }
    let named = || {
        usage::partitions(Path::new(&device.node))
            .all(|partition| Path::new(&format!("{}p{}", device.path, partition.number)).is_symlink())
    };
    let deadline = Instant::now() + NAMES;
    while !named() {
        if Instant::now() > deadline {
            out::message(format_args!("the partitions of {} have no names yet; see /dev", device.path));
            return;
        }
        std::thread::sleep(PAUSE);
    }
}

/// The kernel may scan the table at the same time; a second scan is harmless.
fn read(node: &Path) -> std::io::Result<()> {
    let disk = File::open(node)?;
    match block::read_partitions(disk.as_fd()) {
        // In use: the partitions exist.
        Ok(()) | Err(Errno::BUSY) => Ok(()),
        Err(error) => Err(error.into()),
    }
}
