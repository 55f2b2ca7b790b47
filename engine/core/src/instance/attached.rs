// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A served device and its record.
//!
//! Provides its description for logs and lists, and logs a forced stop. Does not know its instance.

use std::path::{Path, PathBuf};
use std::time::Instant;

use super::claims::sharing::Hold;
use super::served::Served;
use super::spec::{DeviceInfo, DeviceState};
use super::state::DeviceRecord;
use crate::error::{Kind, Result};
use crate::frontend::{FrontendDevice, StopMode};
use crate::sys::usage::{self, Disks};

/// A served device and its record.
#[derive(Debug)]
pub struct AttachedDevice {
    pub(super) record: DeviceRecord,
    pub(super) served: Served,
    /// Why it is not served.
    pub(super) reason: Option<String>,
    pub(super) hold: Option<Hold>,
}

impl AttachedDevice {
    /// Its name in logs.
    pub fn name(&self) -> String {
        let spec = &self.record.spec;
        let number = spec.number.unwrap_or_default();
        format!("loop{number} of instance {} (image {})", spec.instance, spec.path)
    }

    /// See [`Served::quiesce`].
    pub fn quiesce(&self, until: Instant) -> Result<()> {
        self.served.quiesce(until)
    }

    /// Its description for users, who know it by `path`.
    pub fn info(&self, number: u32, path: &Path) -> DeviceInfo {
        let AttachedDevice { record, served, hold, .. } = self;
        let (geometry, state, identity) = (served.geometry(), served.state(), record.identity);
        let limits = served.io_limits();
        DeviceInfo {
            instance: record.spec.instance.clone(),
            number,
            path: path.display().to_string(),
            node: self.node().display().to_string(),
            image: record.spec.path.clone(),
            reason: self.reason.clone().or_else(|| why_not_live(state, served.device())),
            state,
            size: geometry.size,
            offset: geometry.offset,
            size_limit: record.spec.size_limit,
            block_size: geometry.block_size,
            read_only: geometry.read_only,
            buffered: record.spec.buffered || served.is_buffered(),
            durable: geometry.durable_writes,
            iops: limits.iops,
            bytes_per_second: limits.bytes,
            queues: u32::from(record.queues),
            depth: u32::from(record.depth),
            io_mode: record.io_mode,
            shared_with: hold.iter().flat_map(Hold::others).collect(),
            since_unix_seconds: record.since,
            // At most one of these is not 0.
            image_device: identity.dev | identity.rdev,
            image_inode: identity.ino,
        }
    }

    /// The path that users open.
    pub fn node(&self) -> PathBuf {
        self.served.device().node()
    }

    /// Stops it. A forced stop of a device in use is logged.
    pub fn stop(&self, when: StopMode) -> Result<()> {
        if when == StopMode::Always {
            match self.served.stop(StopMode::IfUnusedNow) {
                Ok(()) => return Ok(()),
                Err(error) if error.kind() == Kind::Busy => {
                    let disks = Disks::of(&self.node());
                    match self.served.device() {
                        FrontendDevice::Loop(_) => usage::warn_left(&self.name(), &self.node(), &disks),
                        FrontendDevice::Ublk(_) | FrontendDevice::Fuse(_) => {
                            usage::warn_lost(&self.name(), &disks);
                        }
                    }
                }
                Err(_) => {}
            }
        }
        self.served.stop(when)
    }
}

fn why_not_live(state: DeviceState, device: &FrontendDevice) -> Option<String> {
    let reason = match state {
        DeviceState::Live => return None,
        DeviceState::Stuck if matches!(device, FrontendDevice::Loop(device) if !device.is_bound()) => {
            "another program has unbound it; detach it, and attach its image again"
        }
        DeviceState::Degraded => "the image is shorter than the device: reads past its end fail",
        DeviceState::Stuck => "the kernel or a worker did not answer in time",
    };
    Some(reason.to_owned())
}
