// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Ends a pool, also while its devices are in use.
//!
//! Knows that a hung device must not delay others, and that losses are logged. A disk of the kernel's
//! loop driver cannot be taken away: it ends, and with it the pool, at its last close.

use std::sync::atomic::Ordering;
use std::sync::{Condvar, Mutex, PoisonError, TryLockError};
use std::time::Duration;

use super::{END_LOCK_TIMEOUT, LoopSlot, Pool, lock};
use crate::frontend::StopMode;
use crate::parallel::Helpers;
use crate::sys::usage::{self, Disks};

/// Devices that are ended at a time: one may hang.
const ENDED_IN_PARALLEL: usize = 64;

/// A poll starts no threads for devices.
static NO_HELPERS: Helpers = Helpers::new(0);

/// Pools of this process that remove their devices at a time: more would only wait for each other.
const POOLS_AT_A_TIME: usize = 256;
/// How long a pool waits for others: they may hang.
const TURN_TIMEOUT: Duration = Duration::from_secs(10);

static TURNS: Mutex<usize> = Mutex::new(0);
static TURN_ENDED: Condvar = Condvar::new();

/// One of [`POOLS_AT_A_TIME`].
pub(super) struct RemovalTurn;

impl RemovalTurn {
    pub(super) fn take() -> RemovalTurn {
        let is_full = |turns: &mut usize| *turns >= POOLS_AT_A_TIME;
        let waited = TURN_ENDED.wait_timeout_while(lock(&TURNS), TURN_TIMEOUT, is_full);
        *waited.unwrap_or_else(PoisonError::into_inner).0 += 1;
        RemovalTurn
    }
}

impl Drop for RemovalTurn {
    fn drop(&mut self) {
        *lock(&TURNS) -= 1;
        TURN_ENDED.notify_one();
    }
}

impl Pool {
    /// Removes devices of an ending pool that nobody has open any more. True: the pool has ended.
    pub(super) fn poll_end(&self) -> bool {
        self.end_stacks();
        let removing = match self.removing.try_lock() {
            Ok(removing) => removing,
            Err(TryLockError::Poisoned(removing)) => removing.into_inner(),
            // That thread wakes the close watcher afterwards.
            Err(TryLockError::WouldBlock) => return false,
        };
        let forced = self.forced.load(Ordering::Acquire);
        let when = if forced { StopMode::Always } else { StopMode::IfUnusedNow };
        let over = self.remove_devices(when, Duration::ZERO, &NO_HELPERS);
        drop(removing);
        if over {
            let watchers = lock(&self.watchers).0.clone();
            watchers.iter().for_each(|watcher| watcher.ended(self));
        }
        over
    }

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
