// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Pools for containers: all devices exist from the start, under device numbers that stay, and one
//! container after the other uses them.
//!
//! Knows how many disks that takes, and how to reset a pool. Does not know who uses it.

use std::time::{Duration, Instant};

use super::{Pool, SHORT_LOCK_TIMEOUT};
use crate::error::{Error, Kind, Result};
use crate::loops::{Answer, Errno};

/// Disks beside two per device.
const EXTRA_DISKS: usize = 4;
/// Interval between two attempts to reset devices.
const INTERVAL: Duration = Duration::from_millis(20);

impl Pool {
    /// Creates all devices. Allocates as many disks again and some more: for partitions, other
    /// block sizes, and outgoing disks.
    pub fn create_all(&self) -> Result<()> {
        self.allocator.preallocate(2 * self.spec.max as usize + EXTRA_DISKS)?;
        match self.create_missing() {
            Ok(()) => Ok(()),
            Err(Errno::NOSPC) => Err(Error::new(
                Kind::Quota,
                format!("user {} may not have {} devices", self.spec.uid, self.spec.max),
            )),
            Err(error) => Err(Error::os(error, "cannot create the devices of a pool")),
        }
    }

    /// Creates the missing devices.
    fn create_missing(&self) -> Answer<()> {
        for number in self.spec.numbers().take(self.spec.max as usize) {
            match self.create(Some(number)) {
                Ok(_) | Err(Errno::EXIST) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Device numbers of all its disks, if they must not change.
    pub fn device_numbers(&self) -> &[u64] {
        self.allocator.fixed().unwrap_or_default()
    }

    /// Resets the pool for the next container. A holder of a device after `timeout` loses its file.
    pub fn reset(&self, timeout: Duration) {
        let until = Instant::now() + timeout;
        loop {
            let by_force = Instant::now() >= until;
            let mut held = Vec::new();
            for (number, slot) in self.all_slots() {
                // An operation that does not end blocks only its own device.
                let Ok(mut device) = slot.lock_within(SHORT_LOCK_TIMEOUT) else {
                    held.push(number);
                    continue;
                };
                if self.is_ending() {
                    return;
                }
                slot.begin_replacing();
                if !device.reset(&self.allocator, by_force) {
                    held.push(number);
                }
                self.publish(number, &slot, device);
            }
            if by_force {
                for number in &held {
                    let pool = &self.spec.name;
                    tracing::warn!("loop{number} of pool {pool} is still in use by the previous container");
                }
            }
            if held.is_empty() || by_force {
                break;
            }
            std::thread::sleep(INTERVAL);
        }
        if let Err(error) = self.create_missing()
            && !self.is_ending()
        {
            tracing::warn!(%error, pool = self.spec.name, "cannot recreate the missing devices of a pool");
        }
    }
}
