//! A served device and what it was attached with.
//!
//! Knows what logs call it, and what is logged when its users lose it. Does not know its instance.

use std::path::PathBuf;
use std::time::Instant;

use super::claims::sources::Hold;
use super::served::Served;
use super::state::DeviceRecord;
use crate::error::{Kind, Result};
use crate::frontend::Stop;
use crate::sys::usage::{self, Disks};

/// See above.
#[derive(Debug)]
pub struct Attached {
    pub(super) record: DeviceRecord,
    pub(super) served: Served,
    /// Why nobody serves it.
    pub(super) reason: Option<String>,
    pub(super) hold: Option<Hold>,
}

impl Attached {
    /// What logs call it.
    pub fn name(&self) -> String {
        let spec = &self.record.spec;
        let number = spec.number.unwrap_or_default();
        format!("loop{number} of instance {} (image {})", spec.instance, spec.path)
    }

    /// See [`Served::quiesce`].
    pub fn quiesce(&self, until: Instant) -> Result<()> {
        self.served.quiesce(until)
    }

    /// What users open.
    pub fn node(&self) -> PathBuf {
        self.served.device().node()
    }

    /// Stops it. By force also in use, which is logged.
    pub fn stop(&self, when: Stop) -> Result<()> {
        if when == Stop::Always {
            match self.served.stop(Stop::IfUnusedNow) {
                Ok(()) => return Ok(()),
                Err(error) if error.kind() == Kind::Busy => {
                    usage::warn_lost(&self.name(), &Disks::of(&self.served.device().node()));
                }
                Err(_) => {}
            }
        }
        self.served.stop(when)
    }
}
