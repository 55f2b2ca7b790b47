// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What devices do, for a live view: counts and their times, to subtract two readings.

use serde::{Deserialize, Serialize};
use zlink::introspect::CustomType;

use super::spec::{DeviceState, DeviceStats};
use super::statistics::of_block_layer;
use super::{Engine, Selector};
use crate::error::Result;
use crate::sys::block_stats::BlockStats;

/// A device and its counts.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, CustomType)]
#[serde(rename_all = "camelCase")]
#[zlink(rename_all = "camelCase")]
pub struct DeviceActivity {
    /// Name of its instance, or of its private pool.
    pub owner: String,
    /// N of loopN.
    pub number: u32,
    /// User id that it belongs to: 0 for devices of instances.
    pub uid: u32,
    /// Name of its disk in the kernel, e.g. `ublkb3`. Empty: it is a FUSE file. Counts of another
    /// disk are not comparable.
    pub disk: String,
    /// State; none: not known, for devices of private pools.
    pub state: Option<DeviceState>,
    /// The daemon's workers count and measure. Otherwise the block layer counts, without errors and
    /// percentiles.
    pub has_workers: bool,
    /// Counts; none: the device does not answer.
    pub stats: Option<DeviceStats>,
    /// Times of the block layer; none: it is a FUSE file, or the disk is gone.
    pub times: Option<BlockTimes>,
}

/// Times of a disk, as the block layer sums them up.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, CustomType)]
#[serde(rename_all = "camelCase")]
#[zlink(rename_all = "camelCase")]
pub struct BlockTimes {
    /// Reads and writes completed.
    pub transfers: u64,
    /// Sum of their durations, in milliseconds.
    pub transfer_ms: u64,
    /// Time with at least one request in flight, in milliseconds.
    pub busy_ms: u64,
    /// The same, for each request in flight.
    pub queued_ms: u64,
}

impl From<BlockStats> for BlockTimes {
    fn from(stats: BlockStats) -> BlockTimes {
        let BlockStats { reads, writes, transfer_ms, busy_ms, queued_ms, .. } = stats;
        BlockTimes { transfers: reads.saturating_add(writes), transfer_ms, busy_ms, queued_ms }
    }
}

impl DeviceActivity {
    /// Adds what the block layer counts of a disk. The device has no other counts.
    #[must_use]
    pub fn with_block_layer(self, disk: String, path: String, image: String) -> DeviceActivity {
        let Ok(stats) = BlockStats::of_disk(&disk) else { return DeviceActivity { disk, ..self } };
        let counts = Some(of_block_layer(stats, path, image));
        DeviceActivity { disk, stats: counts, times: Some(stats.into()), ..self }
    }
}

impl Engine {
    /// All devices and their counts. Asks every worker of a device once.
    pub fn activity(&self) -> Result<Vec<DeviceActivity>> {
        let instances = self.select(&Selector::All)?;
        let devices = instances.iter().flat_map(|(instance, _)| instance.live());
        let activity = devices.map(|attached| {
            let spec = &attached.record.spec;
            let number = spec.number.unwrap_or_default();
            let known = DeviceActivity { owner: spec.instance.clone(), number, ..DeviceActivity::default() };
            attached.served.activity(known, attached.node().display().to_string(), spec.path.clone())
        });
        Ok(activity.collect())
    }
}
