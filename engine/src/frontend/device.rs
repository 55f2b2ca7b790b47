//! One device of either frontend: added, described, started, resized, stopped, deleted.
//!
//! Knows which frontend it is of, and nothing else. Every step has a deadline and undoes nothing:
//! the caller decides what to do about a failure.

use std::path::PathBuf;
use std::sync::Arc;

use super::{Parameters, Queue, Stop, fuse, ublk};
use crate::error::{Error, Kind, Result};
use crate::image::{Geometry, Image};

/// A block device of ublk, or a file of FUSE.
#[derive(Debug)]
pub enum Device {
    /// A block device.
    Ublk(ublk::Device),
    /// A file.
    Fuse(fuse::Device),
}

impl Device {
    /// Its number at the driver; 0 where the driver numbers nothing.
    pub fn id(&self) -> u32 {
        match self {
            Device::Ublk(device) => device.id(),
            Device::Fuse(_) => 0,
        }
    }

    /// What it was made with.
    pub fn parameters(&self) -> Parameters {
        match self {
            Device::Ublk(device) => device.parameters(),
            Device::Fuse(device) => device.parameters(),
        }
    }

    /// What users open.
    pub fn node(&self) -> PathBuf {
        match self {
            Device::Ublk(device) => device.node(),
            Device::Fuse(device) => device.node(),
        }
    }

    /// Tells the driver what the device over this image looks like.
    pub fn describe(&self, image: &Arc<Image>) -> Result<()> {
        match self {
            Device::Ublk(device) => device.describe(&image.geometry()),
            Device::Fuse(device) => device.describe(image),
        }
    }

    /// Makes its queues.
    pub fn queues(&self) -> Result<Vec<Queue>> {
        match self {
            Device::Ublk(device) => device.queues(),
            Device::Fuse(device) => device.queues(),
        }
    }

    /// Makes it appear. All queues must be served: the kernel may read from it.
    pub fn start(&self) -> Result<()> {
        match self {
            Device::Ublk(device) => device.start(),
            Device::Fuse(device) => device.start(),
        }
    }

    /// Begins to take it back from a daemon that is gone.
    pub fn begin_recovery(&self) -> Result<()> {
        match self {
            Device::Ublk(device) => device.begin_recovery(),
            Device::Fuse(_) => Err(not_recovered()),
        }
    }

    /// Has taken it back: all queues are served again.
    pub fn end_recovery(&self) -> Result<()> {
        match self {
            Device::Ublk(device) => device.end_recovery(),
            Device::Fuse(_) => Err(not_recovered()),
        }
    }

    /// Its shape, as the driver has it; `offset` is where it begins in its image.
    pub fn shape(&self, offset: u64) -> Result<Geometry> {
        match self {
            Device::Ublk(device) => device.shape(offset),
            Device::Fuse(_) => Err(not_recovered()),
        }
    }

    /// Somebody has the file open; of a block device nobody can tell.
    pub fn is_open(&self) -> bool {
        match self {
            Device::Ublk(_) => false,
            Device::Fuse(device) => device.is_open(),
        }
    }

    /// Changes its size.
    pub fn resize(&self, bytes: u64) -> Result<()> {
        match self {
            Device::Ublk(device) => device.resize(bytes),
            Device::Fuse(device) => device.resize(bytes),
        }
    }

    /// Makes it go away, after what is in flight.
    pub fn stop(&self, when: Stop) -> Result<()> {
        match self {
            Device::Ublk(device) => device.stop(when),
            Device::Fuse(device) => device.stop(when),
        }
    }

    /// Holds back new requests for the next daemon; false if the end of the process does that.
    pub fn quiesce(&self, limit: std::time::Duration) -> Result<bool> {
        match self {
            Device::Ublk(device) => device.quiesce(limit),
            Device::Fuse(_) => Err(not_recovered()),
        }
    }

    /// Makes it appear while nobody else's does.
    pub fn start_alone(&self, alone: &ublk::Alone) -> Result<()> {
        match self {
            Device::Ublk(device) => device.start_alone(alone),
            Device::Fuse(_) => Err(Error::new(Kind::Unsupported, "files do not make way")),
        }
    }

    /// Takes the scheduler off that the kernel gave it, if it appeared alone. Nothing may be in flight.
    pub fn take_scheduler_off(&self) {
        match self {
            Device::Ublk(device) => device.take_scheduler_off(),
            Device::Fuse(_) => {}
        }
    }

    /// Lets it offer discards or not, whatever it was described with. Nothing may be in flight.
    pub fn offer_discards(&self, offer: bool) -> Result<()> {
        match self {
            Device::Ublk(device) => device.offer_discards(offer),
            Device::Fuse(_) => Ok(()),
        }
    }

    /// Users may see it still.
    pub fn is_shown(&self) -> bool {
        match self {
            Device::Ublk(device) => device.is_shown(),
            Device::Fuse(_) => true,
        }
    }

    /// Its device number, once it has appeared.
    pub fn device_number(&self) -> Result<u64> {
        match self {
            Device::Ublk(device) => device.device_number(),
            Device::Fuse(_) => Err(Error::new(Kind::Unsupported, "files have no device number")),
        }
    }

    /// Gives its number back. Nothing of it may be open here any more.
    pub fn delete(&self) -> Result<()> {
        match self {
            Device::Ublk(device) => device.delete(),
            Device::Fuse(_) => Ok(()),
        }
    }
}

fn not_recovered() -> Error {
    Error::new(Kind::Unsupported, "files end with their daemon")
}
