// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Finds the device of a pool by device number, also while disks are replaced.
//!
//! Knows device numbers. Does not know who asks, nor how descriptors are examined.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use super::{Pool, SHORT_LOCK_TIMEOUT};
use crate::loops::{Answer, DeviceEntry, Errno, LoopCaller};
use crate::sys;

impl Pool {
    /// The device (not partition) whose disk has or recently had this device number. Waits, with a
    /// timeout, if a disk of the pool has the number and no device has that disk yet.
    pub fn find(&self, rdev: u64) -> Option<u32> {
        let until = Instant::now() + SHORT_LOCK_TIMEOUT;
        loop {
            let all = self.all_slots();
            let leads = all.iter().filter_map(|(number, slot)| Some((slot.match_number(rdev)?, *number)));
            if let Some((_, number)) = leads.min() {
                return Some(number);
            }
            if let Some(number) = self.allocator.last_device(rdev).filter(|number| self.slot(*number).is_ok())
                && !self.is_partition(rdev)
            {
                return Some(number);
            }
            // A partition never becomes a loopN.
            if self.is_partition(rdev) || !self.allocator.has_started(rdev) || Instant::now() >= until {
                return None;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Whether a present or former partition has this device number.
    pub fn is_partition(&self, rdev: u64) -> bool {
        let all = self.all_slots();
        // A device may have the disk of a former partition by now.
        all.iter().any(|(_, slot)| slot.is_partition(rdev)) && !all.iter().any(|(_, slot)| slot.is(rdev))
    }

    /// Whether a disk or partition of a device has or recently had this device number.
    pub(super) fn has_disk(&self, rdev: u64) -> bool {
        self.all_slots().iter().any(|(_, slot)| slot.match_number(rdev).is_some() || slot.is_partition(rdev))
    }

    /// The kernel's disk sequence number of the device whose partition has this device number.
    pub fn disk_sequence(&self, rdev: u64) -> Answer<u64> {
        let has = |entry: &DeviceEntry| entry.partitions.iter().any(|partition| partition.rdev == rdev);
        let number = self.find_entry(has).ok_or(Errno::NXIO)?.number;
        let disk = self.slot(number)?.lock()?.disk()?.open(false)?;
        sys::block::disk_sequence(disk.as_fd())
    }

    /// Replaces a caller's descriptor of a former disk of the device by one of its present disk.
    pub fn refresh_descriptor(&self, number: u32, rdev: u64, caller: &dyn LoopCaller) -> Answer<()> {
        let slot = self.slot(number)?;
        let is_current = |entry: Option<DeviceEntry>| entry.is_some_and(|entry| entry.rdev == rdev);
        if is_current(slot.snapshot()) {
            return Ok(());
        }
        let device = slot.lock()?;
        let disk = device.disk()?;
        if disk.rdev == rdev { Ok(()) } else { caller.replace_descriptor(disk.open(caller.can_write())?) }
    }

    /// The device that satisfies `is_it`. While a disk is being replaced, the published state of
    /// its device is invalid: another device may have the number. So these devices come last, after
    /// they publish.
    pub(in crate::loops) fn find_entry(&self, is_it: impl Fn(&DeviceEntry) -> bool) -> Option<DeviceEntry> {
        let (replacing, published): (Vec<_>, Vec<_>) =
            self.all_slots().into_iter().partition(|(_, slot)| slot.is_replacing());
        let mut all = published.into_iter().chain(replacing);
        all.find_map(|(_, slot)| slot.wait_published().filter(&is_it))
    }
}
