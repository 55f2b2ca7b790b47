// SPDX-License-Identifier: Apache-2.0 OR MIT
//! One device of any frontend: add, configure, start, resize, stop, delete.
//!
//! Dispatches to the frontend. Every step has a deadline. Nothing is undone on failure: the caller
//! decides.

use std::path::PathBuf;
use std::sync::Arc;

use super::{DeviceParameters, FrontendQueue, StopMode, fuse, kernel_loop, ublk};
use crate::error::{Error, Kind, Result};
use crate::image::{Geometry, Image};

/// A block device of ublk or of the kernel's loop driver, or a file of FUSE.
#[derive(Debug)]
pub enum FrontendDevice {
    /// A block device.
    Ublk(ublk::UblkDevice),
    /// A block device of the kernel's loop driver.
    Loop(kernel_loop::KernelLoop),
    /// A file.
    Fuse(fuse::FuseDevice),
}

impl FrontendDevice {
    /// Its id at the driver; 0 for a file.
    pub fn id(&self) -> u32 {
        match self {
            FrontendDevice::Ublk(device) => device.id(),
            FrontendDevice::Loop(device) => device.number(),
            FrontendDevice::Fuse(_) => 0,
        }
    }

    /// Its parameters.
    pub fn parameters(&self) -> DeviceParameters {
        match self {
            FrontendDevice::Ublk(device) => device.parameters(),
            FrontendDevice::Loop(device) => device.parameters(),
            FrontendDevice::Fuse(device) => device.parameters(),
        }
    }

    /// The path that users open.
    pub fn node(&self) -> PathBuf {
        match self {
            FrontendDevice::Ublk(device) => device.node(),
            FrontendDevice::Loop(device) => device.node(),
            FrontendDevice::Fuse(device) => device.node(),
        }
    }

    /// Configures the device for this image.
    pub fn describe(&self, image: &Arc<Image>) -> Result<()> {
        match self {
            FrontendDevice::Ublk(device) => device.describe(&image.geometry()),
            FrontendDevice::Loop(device) => {
                device.describe(image);
                Ok(())
            }
            FrontendDevice::Fuse(device) => device.describe(image),
        }
    }

    /// Creates its queues.
    pub fn queues(&self) -> Result<Vec<FrontendQueue>> {
        match self {
            FrontendDevice::Ublk(device) => device.queues(),
            FrontendDevice::Loop(_) => Ok(Vec::new()),
            FrontendDevice::Fuse(device) => device.queues(),
        }
    }

    /// Starts it. All queues must be served: the kernel may read from it.
    pub fn start(&self) -> Result<()> {
        match self {
            FrontendDevice::Ublk(device) => device.start(),
            FrontendDevice::Loop(device) => device.start(),
            FrontendDevice::Fuse(device) => device.start(),
        }
    }

    /// Begins its recovery from a daemon that is gone.
    pub fn begin_recovery(&self) -> Result<()> {
        match self {
            FrontendDevice::Ublk(device) => device.begin_recovery(),
            FrontendDevice::Loop(_) => Ok(()),
            FrontendDevice::Fuse(_) => Err(not_recovered()),
        }
    }

    /// Ends its recovery: all queues are served again.
    pub fn end_recovery(&self) -> Result<()> {
        match self {
            FrontendDevice::Ublk(device) => device.end_recovery(),
            FrontendDevice::Loop(device) => device.take_over(),
            FrontendDevice::Fuse(_) => Err(not_recovered()),
        }
    }

    /// Its geometry as reported by the driver; `offset` is its first byte in the image.
    pub fn driver_geometry(&self, offset: u64) -> Result<Geometry> {
        match self {
            FrontendDevice::Ublk(device) => device.driver_geometry(offset),
            FrontendDevice::Loop(device) => device.driver_geometry(offset),
            FrontendDevice::Fuse(_) => Err(not_recovered()),
        }
    }

    /// Whether the file is open. Always false for a block device, whose driver does not tell.
    pub fn is_open(&self) -> bool {
        match self {
            FrontendDevice::Ublk(_) | FrontendDevice::Loop(_) => false,
            FrontendDevice::Fuse(device) => device.is_open(),
        }
    }

    /// Changes its size.
    pub fn resize(&self, bytes: u64) -> Result<()> {
        match self {
            FrontendDevice::Ublk(device) => device.resize(bytes),
            FrontendDevice::Loop(device) => device.resize(),
            FrontendDevice::Fuse(device) => device.resize(bytes),
        }
    }

    /// Stops it, after the requests in flight.
    pub fn stop(&self, when: StopMode) -> Result<()> {
        match self {
            FrontendDevice::Ublk(device) => device.stop(when),
            FrontendDevice::Loop(device) => device.stop(when),
            FrontendDevice::Fuse(device) => device.stop(when),
        }
    }

    /// Holds new requests for the next daemon. False: the end of the process does that, or the
    /// kernel serves them.
    pub fn quiesce(&self, limit: std::time::Duration) -> Result<bool> {
        match self {
            FrontendDevice::Ublk(device) => device.quiesce(limit),
            FrontendDevice::Loop(_) => Ok(false),
            FrontendDevice::Fuse(_) => Err(not_recovered()),
        }
    }

    /// Starts it while the caller holds the start lock.
    pub fn start_exclusively(&self, alone: &ublk::StartLock) -> Result<()> {
        match self {
            FrontendDevice::Ublk(device) => device.start_exclusively(alone),
            FrontendDevice::Loop(_) | FrontendDevice::Fuse(_) => {
                Err(Error::new(Kind::Unsupported, "only ublk devices can replace each other"))
            }
        }
    }

    /// Disables the I/O scheduler that the kernel chose. Nothing may be in flight.
    pub fn disable_scheduler(&self) {
        match self {
            FrontendDevice::Ublk(device) => device.disable_scheduler(),
            FrontendDevice::Loop(_) | FrontendDevice::Fuse(_) => {}
        }
    }

    /// Enables or disables discards. Nothing may be in flight.
    pub fn set_discard_support(&self, offer: bool) -> Result<()> {
        match self {
            FrontendDevice::Ublk(device) => device.set_discard_support(offer),
            FrontendDevice::Loop(_) | FrontendDevice::Fuse(_) => Ok(()),
        }
    }

    /// Whether the disk still exists.
    pub fn is_present(&self) -> bool {
        match self {
            FrontendDevice::Ublk(device) => device.is_present(),
            FrontendDevice::Loop(device) => device.is_present(),
            FrontendDevice::Fuse(_) => true,
        }
    }

    /// The disk's device number, once it has started.
    pub fn device_number(&self) -> Result<u64> {
        match self {
            FrontendDevice::Ublk(device) => device.device_number(),
            FrontendDevice::Loop(device) => device.device_number(),
            FrontendDevice::Fuse(_) => Err(Error::new(Kind::Unsupported, "FUSE files have no device number")),
        }
    }

    /// Deletes it and frees its id. It must not be open here any more.
    pub fn delete(&self) -> Result<()> {
        match self {
            FrontendDevice::Ublk(device) => device.delete(),
            FrontendDevice::Loop(device) => device.delete(),
            FrontendDevice::Fuse(_) => Ok(()),
        }
    }
}

fn not_recovered() -> Error {
    Error::new(Kind::Unsupported, "FUSE files do not outlive the daemon")
}
