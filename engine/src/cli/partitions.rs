//! Partitions of a device that was just attached: who attached it wants to find them.
//!
//! The kernel looks for them by itself, at a time of its own, and the daemon names them then. Knows how to
//! wait for both.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::io::Errno;

use crate::instance::spec::DeviceInfo;
use crate::sys::{block, usage};

/// For names to appear, once the partitions are there.
const NAMES: Duration = Duration::from_secs(5);
const PAUSE: Duration = Duration::from_millis(5);

/// Returns when the partitions of a device and their names are there. Says so if they are not: the device is.
pub(super) fn wait(device: &DeviceInfo) {
    if let Err(error) = read(Path::new(&device.node)) {
        eprintln!("loopengine: the partition table of {} was not read: {error}", device.path);
        return;
    }
    let named = || {
        usage::partitions(Path::new(&device.node))
            .all(|partition| Path::new(&format!("{}p{}", device.path, partition.number)).is_symlink())
    };
    let deadline = Instant::now() + NAMES;
    while !named() {
        if Instant::now() > deadline {
            eprintln!("loopengine: partitions of {} have no names yet; see /dev", device.path);
            return;
        }
        std::thread::sleep(PAUSE);
    }
}

/// What the kernel does meanwhile, it does twice.
fn read(node: &Path) -> std::io::Result<()> {
    let disk = File::open(node)?;
    match block::read_partitions(disk.as_fd()) {
        // In use, so they are there.
        Ok(()) | Err(Errno::BUSY) => Ok(()),
        Err(error) => Err(error.into()),
    }
}
