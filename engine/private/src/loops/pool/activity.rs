// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the devices of a pool do, as the block layer counts it.
//!
//! Asks no worker, which other tenants share, and waits for no lock that an operation holds.

use super::{DeviceEntry, Pool};
use crate::instance::activity::DeviceActivity;
use crate::sys::usage::Disks;

impl Pool {
    /// Its bound devices and their counts.
    pub fn activity(&self) -> Vec<DeviceActivity> {
        self.entries().into_iter().filter_map(|entry| self.activity_of(entry)).collect()
    }

    fn activity_of(&self, entry: DeviceEntry) -> Option<DeviceActivity> {
        let image = entry.bound?.backing_file.display().to_string();
        let (owner, uid) = (self.spec.name.clone(), self.spec.uid);
        let known = DeviceActivity { owner, uid, number: entry.number, ..DeviceActivity::default() };
        Some(match Disks::numbered(entry.rdev).name() {
            Some(disk) => known.with_block_layer(disk, format!("loop{}", entry.number), image),
            None => known,
        })
    }
}
