//! The end of a pool whose devices are in use.
//!
//! Knows that one device may hang and must hold up no other, and that who loses a device is logged.

use super::{END_PATIENCE, Place, Pool};
use crate::frontend::StopMode;
use crate::sys::usage::{self, Disks};

/// Devices that are ended at a time, where one may hang.
const ENDED_TOGETHER: usize = 64;

impl Pool {
    /// Ends all devices that are left, many at a time.
    pub(super) fn sweep_away_together(&self) {
        for some in self.all().chunks(ENDED_TOGETHER) {
            std::thread::scope(|scope| {
                for (number, place) in some {
                    let end = || {
                        self.warn_lost(*number, place);
                        self.end_one(*number, place, StopMode::Always, END_PATIENCE)
                    };
                    // Without a thread it is left to the reaper.
                    let _ = std::thread::Builder::new().name("end".into()).spawn_scoped(scope, end);
                }
            });
        }
    }

    fn warn_lost(&self, number: u32, place: &Place) {
        let Some((rdev, Some(bound))) = place.shown().map(|entry| (entry.rdev, entry.bound)) else { return };
        let device = format!("loop{number} of pool {} ({})", self.spec.name, bound.backing_file.display());
        usage::warn_lost(&device, &Disks::numbered(rdev));
    }
}
