//! Which device of a pool a descriptor is of, also while disks are replaced.
//!
//! Knows device numbers; does not know who asks, nor how descriptors are looked at.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use super::{Pool, SHORT_PATIENCE};
use crate::loops::{Answer, Caller, Entry, Errno};
use crate::sys;

impl Pool {
    /// Which device (not partition) is the block device with this number, or was it until a moment ago.
    /// Waits, not long, where the number is that of a disk of the pool and no device has it yet.
    pub fn find(&self, rdev: u64) -> Option<u32> {
        let until = Instant::now() + SHORT_PATIENCE;
        loop {
            let all = self.all();
            let leads = all.iter().filter_map(|(number, place)| Some((place.lead(rdev)?, *number)));
            if let Some((_, number)) = leads.min() {
                return Some(number);
            }
            // A partition is no loopN, and is not to become one.
            if self.has_part(rdev) || !self.maker.has(rdev) || Instant::now() >= until {
                return None;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// A block device with this number is, or was until a moment ago, a partition of a device.
    pub fn has_part(&self, rdev: u64) -> bool {
        let all = self.all();
        // The disk of a partition that went may be a device's by now.
        all.iter().any(|(_, place)| place.has_part(rdev)) && !all.iter().any(|(_, place)| place.is(rdev))
    }

    /// A disk or partition of a device has this device number, or had it until a moment ago.
    pub(super) fn has_disk(&self, rdev: u64) -> bool {
        self.all().iter().any(|(_, place)| place.lead(rdev).is_some() || place.has_part(rdev))
    }

    /// Number of the disk, in the order of all that the kernel has had, of the device whose partition has this
    /// device number.
    pub fn sequence(&self, rdev: u64) -> Answer<u64> {
        let has = |entry: &Entry| entry.partitions.iter().any(|partition| partition.rdev == rdev);
        let number = self.find_entry(has).ok_or(Errno::NXIO)?.number;
        let disk = self.place(number)?.lock()?.disk()?.open(false)?;
        sys::block::disk_sequence(disk.as_fd())
    }

    /// Gives a caller whose descriptor is of a disk that the device no longer is one of its disk now.
    pub fn refresh_descriptor(&self, number: u32, rdev: u64, caller: &dyn Caller) -> Answer<()> {
        let place = self.place(number)?;
        let is_current = |entry: Option<Entry>| entry.is_some_and(|entry| entry.rdev == rdev);
        if is_current(place.shown()) {
            return Ok(());
        }
        let device = place.lock()?;
        let disk = device.disk()?;
        if disk.rdev == rdev { Ok(()) } else { caller.replace(disk.open(caller.writes())?) }
    }

    /// The device that is like this. What is shown of one whose disk is being replaced is not true for the
    /// moment: the number may be another's by now. So that is looked at last, when it is published.
    pub(in crate::loops) fn find_entry(&self, is_it: impl Fn(&Entry) -> bool) -> Option<Entry> {
        let (replacing, published): (Vec<_>, Vec<_>) =
            self.all().into_iter().partition(|(_, place)| place.is_replacing());
        let mut all = published.into_iter().chain(replacing);
        all.find_map(|(_, place)| place.published().filter(&is_it))
    }
}
