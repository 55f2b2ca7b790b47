//! A pool whose devices are all there from the start, under device numbers that stay, and that is used by
//! one after the other: a container's, and its next start's.
//!
//! Knows how many disks that takes, and how a pool becomes as new. Does not know who uses it.

use std::time::{Duration, Instant};

use super::{Pool, SHORT_PATIENCE};
use crate::error::{Error, Kind, Result};
use crate::loops::{Answer, Errno};

/// Disks beside two for each device.
const SPARES: usize = 4;
/// Between two looks at devices whose last user has gone.
const PAUSE: Duration = Duration::from_millis(20);

impl Pool {
    /// Makes all devices of a pool that is to have them from the start, and as many disks again and
    /// some more: for partitions, other block sizes, and devices that somebody holds.
    pub fn fill(&self) -> Result<()> {
        self.maker.fix(2 * self.spec.max as usize + SPARES)?;
        match self.restore() {
            Ok(()) => Ok(()),
            Err(Errno::NOSPC) => Err(Error::new(
                Kind::Quota,
                format!("user {} may not have {} devices", self.spec.uid, self.spec.max),
            )),
            Err(error) => Err(Error::os(error, "cannot make the devices of a pool")),
        }
    }

    /// Adds what is missing of them.
    fn restore(&self) -> Answer<()> {
        for number in self.spec.numbers().take(self.spec.max as usize) {
            match self.create(Some(number)) {
                Ok(_) | Err(Errno::EXIST) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Device numbers of all disks that it will ever have, if they must not change.
    pub fn device_numbers(&self) -> &[u64] {
        self.maker.fixed().unwrap_or_default()
    }

    /// Makes it as new for the next user. Whoever holds a device after `patience` is cut off from its file.
    pub fn reset(&self, patience: Duration) {
        let until = Instant::now() + patience;
        loop {
            let by_force = Instant::now() >= until;
            let mut clean = true;
            for (number, place) in self.all() {
                // An operation of the last user that does not end holds up its own device.
                let Ok(mut device) = place.lock_within(SHORT_PATIENCE) else {
                    clean = false;
                    continue;
                };
                if self.is_ending() {
                    return;
                }
                place.begin_replacing();
                clean &= device.reset(&self.maker, by_force);
                self.settle(number, &place, device);
            }
            if by_force && !clean {
                tracing::warn!(pool = self.spec.name, "a device is still its last user's");
            }
            if clean || by_force {
                break;
            }
            std::thread::sleep(PAUSE);
        }
        if let Err(error) = self.restore()
            && !self.is_ending()
        {
            tracing::warn!(%error, pool = self.spec.name, "a pool has not all of its devices");
        }
    }
}
