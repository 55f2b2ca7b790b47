// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Resets a device between two containers.

use super::outgoing::OutgoingDisk;
use super::{PoolDevice, flag};
use crate::loops::disk_allocator::DiskAllocator;

impl PoolDevice {
    /// Unbinds it. Its holders keep the disk until their last close. With force, another disk
    /// replaces it at once, and the old one has no file any more. True: the device is free.
    pub fn reset(&mut self, allocator: &DiskAllocator, by_force: bool) -> bool {
        if let Some(binding) = &mut self.binding {
            // The close watcher continues.
            binding.info.flags |= flag::AUTOCLEAR;
        }
        self.apply_autoclear();
        self.release_unused(allocator);
        if self.is_autoclear() {
            self.unbind(allocator);
        }
        if by_force {
            let mounted = self.take_shadow_disks();
            self.outgoing.extend(mounted.map(OutgoingDisk::unbound));
            self.outgoing.extend(self.cleared.take());
            if self.binding.is_some() {
                match allocator.allocate() {
                    Ok(disk) => {
                        self.drop_partitions();
                        let old = self.swap_disk(disk);
                        self.outgoing.extend(old);
                    }
                    Err(error) => {
                        tracing::warn!(%error, number = self.number, "cannot unbind a loop device: there is no free disk")
                    }
                }
            }
            self.split_outgoing();
            for outgoing in &mut self.outgoing {
                outgoing.disk.unbind();
                allocator.close(outgoing.binding.take());
            }
        }
        if self.disk.is_none() {
            self.disk = allocator.allocate().ok();
            self.bump_generation();
        }
        self.is_free()
    }
}
