// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Changes the range, the block size or the file of a bound device.
//!
//! Knows which of them need another disk, and that nothing that is cached may survive. Does not
//! know when the driver allows a change (`PoolDisk`).

use std::os::fd::OwnedFd;

use super::{PoolDevice, check_may_change};
use crate::loops::disk_allocator::DiskAllocator;
use crate::loops::file_binding::{FileBinding, check_block_size, check_kind};
use crate::loops::partition_disk::{self, PartitionDisk};
use crate::loops::{Answer, Errno, LoopCaller, LoopConfig, LoopInfo, flag};

impl PoolDevice {
    /// Serves another range of the same file.
    pub(super) fn set_range(&mut self, info: LoopInfo, caller: &dyn LoopCaller) -> Answer<()> {
        let disk = self.disk.as_ref().ok_or(Errno::IO)?;
        let binding = self.binding.as_mut().ok_or(Errno::NXIO)?;
        disk.flush()?;
        let (image, direct) = binding.reopen(&info, disk.block_size())?;
        if !caller.is_waiting() {
            return Err(Errno::INTR);
        }
        disk.set_image(image)?;
        disk.flush()?;
        binding.adopt(info, disk.block_size(), direct);
        self.reopen_partitions();
        Ok(())
    }

    /// LOOP_SET_BLOCK_SIZE.
    pub fn set_block_size(
        &mut self,
        bytes: u64,
        caller: &dyn LoopCaller,
        allocator: &DiskAllocator,
    ) -> Answer<()> {
        check_may_change(caller)?;
        let info = self.bound()?.info;
        let wanted = check_block_size(bytes, allocator.is_kernel_loop())?;
        let old = self.disk()?;
        if wanted == old.block_size() {
            return Ok(());
        }
        let claimed = old.is_claimed() || self.partitions.iter().any(PartitionDisk::is_claimed);
        if claimed || !self.shadows.is_empty() {
            return Err(Errno::BUSY);
        }
        old.flush()?;
        self.partitions.iter().try_for_each(|part| part.disk().flush())?;
        // They stay, whatever the table says with such blocks.
        let ranges: Vec<_> = self.partitions.iter().map(PartitionDisk::range).collect();
        let mut binding = self.binding.take().ok_or(Errno::NXIO)?;
        let replaced = binding.reopen(&info, wanted).and_then(|(image, direct)| {
            let disk = allocator.allocate_bound(image, binding.read_only(), false)?;
            self.exchange_disk(disk, caller, allocator)?;
            Ok(direct)
        });
        if let Ok(direct) = &replaced {
            binding.adopt(info, wanted, *direct);
            self.partitions = partition_disk::create_all(&binding, &ranges, self.generation, allocator);
        }
        self.binding = Some(binding);
        replaced.map(drop)
    }

    /// LOOP_CHANGE_FD.
    pub fn change_fd(
        &mut self,
        file: OwnedFd,
        caller: &dyn LoopCaller,
        allocator: &DiskAllocator,
    ) -> Answer<()> {
        check_kind(&file, &allocator.shared().claims)?;
        let old = self.bound()?;
        if !old.read_only() {
            return Err(Errno::INVAL);
        }
        if !self.shadows.is_empty() {
            return Err(Errno::BUSY);
        }
        let info = LoopInfo { flags: old.info.flags & flag::DIRECT_IO | flag::READ_ONLY, ..old.info };
        let kept = old.info.flags;
        let with = LoopConfig { file, block_size: old.block_size, info };
        let (mut binding, image) = FileBinding::open(with, false, self.number, allocator)?;
        let disk = self.disk()?;
        // Other pools would wait with it for a file that hangs.
        let fits = disk.shape.may_hang || !allocator.shape_for(&image).may_hang;
        if image.geometry().size != disk.size() || !fits {
            return Err(Errno::INVAL);
        }
        if !caller.is_waiting() {
            return Err(Errno::INTR);
        }
        disk.flush()?;
        disk.set_image(image)?;
        disk.flush()?;
        binding.info.flags |= kept & (flag::AUTOCLEAR | flag::PARTSCAN);
        self.binding = Some(binding);
        self.reopen_partitions();
        if kept & flag::PARTSCAN != 0 {
            self.try_rescan(allocator);
        }
        Ok(())
    }
}
