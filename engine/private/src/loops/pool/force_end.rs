// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Ends a pool whose devices are in use.
//!
//! Knows that a hung device must not delay others, and that losses are logged. A disk of the kernel's
//! loop driver cannot be taken away: it ends, and with it the pool, at its last close.

use super::{END_LOCK_TIMEOUT, LoopSlot, Pool};
use crate::frontend::StopMode;
use crate::sys::usage::{self, Disks};

/// Devices that are ended at a time: one may hang.
const ENDED_IN_PARALLEL: usize = 64;

impl Pool {
    /// Ends all remaining devices, many at a time.
    pub(super) fn remove_devices_in_parallel(&self) {
        for some in self.all_slots().chunks(ENDED_IN_PARALLEL) {
            std::thread::scope(|scope| {
                for (number, slot) in some {
                    let end = || {
                        self.warn_lost(*number, slot);
                        self.end_device(*number, slot, StopMode::Always, END_LOCK_TIMEOUT)
                    };
                    // Without a thread the close watcher ends it.
                    let _ = std::thread::Builder::new().name("end".into()).spawn_scoped(scope, end);
                }
            });
        }
    }

    fn warn_lost(&self, number: u32, slot: &LoopSlot) {
        let Some((rdev, Some(bound))) = slot.snapshot().map(|entry| (entry.rdev, entry.bound)) else {
            return;
        };
        let device = format!("loop{number} of pool {} ({})", self.spec.name, bound.backing_file.display());
        let disks = Disks::numbered(rdev);
        match disks.nodes().first().filter(|_| self.allocator.is_kernel_loop()) {
            Some(node) => usage::warn_left(&device, node, &disks),
            None => usage::warn_lost(&device, &disks),
        }
    }
}
