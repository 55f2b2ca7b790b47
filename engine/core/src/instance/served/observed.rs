// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The state and the statistics of a served device.
//!
//! Asks the workers, or the block layer where the kernel serves the device. Changes nothing.

use std::sync::TryLockError;

use super::{Lifecycle, Served};
use crate::error::Result;
use crate::frontend::FrontendDevice;
use crate::instance::activity::DeviceActivity;
use crate::instance::spec::{DeviceState, DeviceStats};
use crate::instance::statistics::{of_block_layer, of_queues};
use crate::sys::block_stats::BlockStats;
use crate::worker::QueueStats;

/// Request counts of one device.
#[derive(Clone, Copy, Debug, Default)]
pub struct Traffic {
    /// In flight.
    pub in_flight: u64,
    /// Completed since its start.
    pub ended: u64,
}

impl Served {
    /// Its state, without blocking for long.
    pub fn state(&self) -> DeviceState {
        self.state_with(|| state_of(&self.queue_stats()))
    }

    fn state_with(&self, workers_state: impl FnOnce() -> DeviceState) -> DeviceState {
        let lifecycle = match self.lifecycle.try_lock() {
            Ok(lifecycle) => *lifecycle,
            Err(TryLockError::Poisoned(lifecycle)) => *lifecycle.into_inner(),
            // It is being changed; the workers report its state.
            Err(TryLockError::WouldBlock) => Lifecycle::Serving,
        };
        if lifecycle != Lifecycle::Serving {
            return DeviceState::Stuck;
        }
        if matches!(&self.device, FrontendDevice::Loop(device) if !device.is_bound()) {
            return DeviceState::Stuck;
        }
        workers_state()
    }

    fn queue_stats(&self) -> Result<Vec<QueueStats>> {
        let queues = usize::from(self.device.parameters().queues);
        self.workers.iter().take(queues).map(|worker| worker.stats(self.slot)).collect()
    }

    /// Request counts over all queues.
    pub fn traffic(&self) -> Result<Traffic> {
        let queues = self.queue_stats()?;
        let ended = |q: &QueueStats| q.reads + q.writes + q.flushes + q.discards + q.errors;
        let in_flight = queues.iter().map(|queue| queue.in_flight).sum();
        Ok(Traffic { in_flight, ended: queues.iter().map(ended).sum() })
    }

    /// Statistics over all queues, or those of the block layer where the kernel serves the device.
    pub fn stats(&self, path: String, image: String) -> Result<DeviceStats> {
        match &self.device {
            FrontendDevice::Loop(device) => device.stats().map(|counts| of_block_layer(counts, path, image)),
            FrontendDevice::Ublk(_) | FrontendDevice::Fuse(_) => {
                self.queue_stats().map(|queues| of_queues(&queues, path, image))
            }
        }
    }

    /// Its state, counts and times, of a device that is `known` so far.
    pub fn activity(&self, known: DeviceActivity, path: String, image: String) -> DeviceActivity {
        let node = self.device.node();
        let disk = || node.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if let FrontendDevice::Loop(_) = &self.device {
            let state = Some(self.state_with(|| DeviceState::Live));
            return DeviceActivity { state, ..known }.with_block_layer(disk(), path, image);
        }
        let queues = self.queue_stats();
        let state = Some(self.state_with(|| state_of(&queues)));
        let stats = queues.ok().map(|queues| of_queues(&queues, path, image));
        let known = DeviceActivity { state, has_workers: true, stats, ..known };
        let FrontendDevice::Ublk(_) = &self.device else { return known };
        let times = BlockStats::of_disk(&disk()).ok().map(Into::into);
        DeviceActivity { disk: disk(), times, ..known }
    }
}

/// What the workers of a device say of its state.
fn state_of(queues: &Result<Vec<QueueStats>>) -> DeviceState {
    match queues {
        Ok(queues) if queues.iter().any(|queue| queue.failed) => DeviceState::Stuck,
        Ok(queues) if queues.iter().any(|queue| queue.degraded) => DeviceState::Degraded,
        Ok(_) => DeviceState::Live,
        Err(_) => DeviceState::Stuck,
    }
}
