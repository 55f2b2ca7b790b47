// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The shadow disks of one device: created for a mount by the kernel, freed after its end.
//!
//! Knows when the device is read-only. `shadow_disk` says why.

use super::PoolDevice;
use super::outgoing::OutgoingDisk;
use crate::frontend::StopMode;
use crate::loops::disk_allocator::{DiskAllocator, NotReplaced};
use crate::loops::pool_disk::PoolDisk;
use crate::loops::shadow_disk::{MountSource, ShadowDisk};
use crate::loops::{Answer, Errno, LoopInfo};

impl PoolDevice {
    /// Gives the shadow disk of the device, or of a partition, for the kernel to mount. A mounted
    /// device has one already.
    pub fn mount_source(&mut self, part: Option<u32>, allocator: &DiskAllocator) -> Answer<MountSource> {
        self.bound()?;
        // The end of its mount has unbound it; the close watcher has not noticed that yet.
        if self.shadows.iter().any(|shadow| !shadow.disk.is_intact()) {
            self.release_shadows(allocator);
        }
        if let Some(shadow) = self.shadows.iter().find(|shadow| shadow.part == part) {
            return shadow.mount_source(self.number);
        }
        if self.shadows.is_empty() {
            // As in the kernel: not a device that is mounted elsewhere, or open with O_EXCL.
            if self.is_claimed()? {
                return Err(Errno::BUSY);
            }
            if let Err(error) = self.set_write_protection(true, allocator) {
                self.remove_write_protection(allocator);
                return Err(error);
            }
        }
        let source = self.create_shadow(part, allocator).and_then(|shadow| {
            let source = shadow.mount_source(self.number);
            self.shadows.push(shadow);
            self.apply_autoclear();
            source
        });
        if source.is_err() {
            self.release_shadows(allocator);
            if self.shadows.is_empty() {
                self.remove_write_protection(allocator);
            }
        }
        source
    }

    fn create_shadow(&self, part: Option<u32>, allocator: &DiskAllocator) -> Answer<ShadowDisk> {
        let binding = self.bound()?;
        let of_part = |number| self.partitions.iter().find(|part| part.entry().number == number);
        let info = match part {
            None => binding.info,
            Some(number) => of_part(number).ok_or(Errno::NXIO)?.info(binding),
        };
        let (image, _) = binding.reopen(&info, binding.block_size)?;
        let disk = allocator.allocate_bound(image, binding.read_only(), false)?;
        Ok(ShadowDisk { part, disk })
    }

    /// Makes the device and its partitions read-only, or what they were before.
    fn set_write_protection(&mut self, close: bool, allocator: &DiskAllocator) -> Answer<()> {
        let binding = self.binding.as_ref().ok_or(Errno::NXIO)?;
        if binding.read_only() {
            return Ok(());
        }
        if allocator.is_kernel_loop() {
            return self.exchange_all(close, allocator);
        }
        let parts = self.partitions.iter().map(|part| (part.disk(), part.info(binding)));
        let all: Vec<(_, LoopInfo)> = std::iter::once((self.disk()?, binding.info)).chain(parts).collect();
        for (disk, info) in &all {
            // Write back before the shadow disk reads the file; drop the cache before the device is
            // written again.
            if close {
                disk.flush()?;
                disk.set_read_only(true)?;
                disk.flush()?;
                disk.set_image(binding.reopen_read_only(info, disk.block_size())?)?;
            } else {
                disk.flush()?;
                disk.set_image(binding.reopen(info, disk.block_size())?.0)?;
                disk.set_read_only(false)?;
            }
        }
        Ok(())
    }

    /// The same for the kernel's loop driver, which makes no bound disk read-only: the device and
    /// its partitions get other disks, and who has the old ones open loses the file.
    fn exchange_all(&mut self, close: bool, allocator: &DiskAllocator) -> Answer<()> {
        let binding = self.binding.as_ref().ok_or(Errno::NXIO)?;
        let other = |old: &PoolDisk, info: &LoopInfo| {
            let image = match close {
                true => {
                    old.flush()?;
                    // Somebody has it mapped: EBUSY, as for one that is open with O_EXCL.
                    old.withdraw_file().map_err(|_| Errno::BUSY)?;
                    binding.reopen_read_only(info, old.block_size())?
                }
                false => binding.reopen(info, old.block_size())?.0,
            };
            allocator.allocate_bound(image, close, close)
        };
        self.last_generation += 1;
        self.generation = self.last_generation;
        // What one failure leaves is exchanged again.
        for part in &mut self.partitions {
            let next = other(part.disk(), &part.info(binding))?;
            self.outgoing.push(OutgoingDisk::unbound(part.exchange(next, self.last_generation)));
        }
        let next = other(self.disk.as_ref().ok_or(Errno::IO)?, &binding.info)?;
        self.outgoing.extend(self.disk.replace(next).map(OutgoingDisk::unbound));
        Ok(())
    }

    fn remove_write_protection(&mut self, allocator: &DiskAllocator) {
        if let Err(error) = self.set_write_protection(false, allocator) {
            tracing::error!(%error, number = self.number, "a loop device stays read-only after a mount");
        }
        self.apply_autoclear();
    }

    /// Frees the shadow disks that are not mounted any more. With the last one the device is
    /// writable.
    pub fn release_shadows(&mut self, allocator: &DiskAllocator) {
        if self.shadows.is_empty() {
            return;
        }
        for ShadowDisk { part, disk } in std::mem::take(&mut self.shadows) {
            match allocator.replace(disk) {
                Ok(free) => allocator.keep(free),
                Err(NotReplaced::InUse(disk)) => {
                    disk.set_autoclear(true);
                    self.shadows.push(ShadowDisk { part, disk });
                }
                Err(NotReplaced::Lost(error)) => tracing::error!(%error, "cannot replace a disk: it is lost"),
            }
        }
        if !self.shadows.is_empty() {
            return;
        }
        match allocator.is_kernel_loop() && self.is_autoclear() {
            // The end of the mount was the last close.
            true => self.apply_autoclear(),
            false => self.remove_write_protection(allocator),
        }
    }

    /// Returns the disks of its shadow disks, which stay mounted.
    pub fn take_shadow_disks(&mut self) -> impl Iterator<Item = PoolDisk> + use<> {
        std::mem::take(&mut self.shadows).into_iter().map(|shadow| shadow.disk)
    }

    /// Removes the shadow disks.
    pub fn remove_shadows(&mut self, when: StopMode, allocator: &DiskAllocator) {
        for ShadowDisk { part, disk } in std::mem::take(&mut self.shadows) {
            if let Err(disk) = allocator.remove(disk, when) {
                self.shadows.push(ShadowDisk { part, disk });
            }
        }
    }
}
