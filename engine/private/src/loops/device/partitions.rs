// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Adds, changes and removes partitions of a bound device: BLKRRPART and BLKPG.
//!
//! Knows the order of the kernel's checks, and which partitions a rescan keeps. Differs from the
//! kernel in one thing: a partition that is unchanged in the table stays, also while somebody has
//! it open (but not mounted, nor with O_EXCL).

use super::PoolDevice;
use crate::image::partitions;
use crate::loops::disk_allocator::DiskAllocator;
use crate::loops::partition_disk::{self, PartitionDisk};
use crate::loops::{Answer, Errno, LoopCaller, PartitionChange, flag};

/// DISK_MAX_PARTS of the kernel.
const NUMBERS: std::ops::Range<u32> = 1..256;

impl PoolDevice {
    /// BLKRRPART.
    pub fn reread_partitions(&mut self, caller: &dyn LoopCaller, allocator: &DiskAllocator) -> Answer<()> {
        if self.binding.as_ref().is_none_or(|binding| binding.info.flags & flag::PARTSCAN == 0) {
            return Err(Errno::INVAL);
        }
        // The caller may have it open with O_EXCL itself: only mounts and stacked disks prevent
        // this.
        let rdev = self.disk()?.rdev;
        if !self.shadows.is_empty() || caller.has_mounted(rdev) || self.disk()?.has_holders() {
            return Err(Errno::BUSY);
        }
        if !caller.is_waiting() {
            return Err(Errno::INTR);
        }
        self.rescan(allocator)
    }

    /// The same for LOOP_SET_STATUS64 and LOOP_CHANGE_FD, which ignore its failure.
    pub(super) fn try_rescan(&mut self, allocator: &DiskAllocator) {
        if let Err(error) = self.rescan(allocator) {
            tracing::debug!(%error, "cannot rescan the partitions of loop{}", self.number);
        }
    }

    /// BLKPG.
    pub fn change_partition(
        &mut self,
        change: &PartitionChange,
        caller: &dyn LoopCaller,
        allocator: &DiskAllocator,
    ) -> Answer<()> {
        if !caller.is_waiting() {
            return Err(Errno::INTR);
        }
        match *change {
            PartitionChange::Delete(number) => self.delete_partition(number, allocator),
            PartitionChange::Add(part) => self.add_partition(part, allocator),
            PartitionChange::Resize(part) => self.resize_partition(part),
        }
    }

    fn add_partition(&mut self, part: partitions::PartitionRange, allocator: &DiskAllocator) -> Answer<()> {
        self.check_range(&part)?;
        self.check_free(&part)?;
        if !NUMBERS.contains(&part.number) {
            return Err(Errno::INVAL);
        }
        if self.index_of(part.number).is_some() {
            return Err(Errno::BUSY);
        }
        if self.partitions.len() >= partition_disk::MAX {
            return Err(Errno::NOSPC);
        }
        let generation = self.next_part_generation();
        let made =
            PartitionDisk::create(self.bound()?, &part, generation, !self.shadows.is_empty(), allocator)?;
        self.put(made);
        Ok(())
    }

    fn delete_partition(&mut self, number: u32, allocator: &DiskAllocator) -> Answer<()> {
        let at = self.index_of(number).ok_or(Errno::NXIO)?;
        if self.shadows.iter().any(|shadow| shadow.is_of(number)) || self.partitions[at].is_claimed() {
            return Err(Errno::BUSY);
        }
        let part = self.partitions.remove(at);
        part.retire(allocator).map_err(|part| {
            self.put(part);
            Errno::BUSY
        })
    }

    fn resize_partition(&mut self, part: partitions::PartitionRange) -> Answer<()> {
        self.check_range(&part)?;
        let at = self.index_of(part.number).ok_or(Errno::NXIO)?;
        if self.partitions[at].range().start != part.start {
            return Err(Errno::INVAL);
        }
        self.check_free(&part)?;
        let closed = !self.shadows.is_empty();
        let binding = self.binding.as_ref().ok_or(Errno::NXIO)?;
        let mounted = self.shadows.iter().filter(|shadow| shadow.is_of(part.number));
        let resize_mounted = || mounted.clone().try_for_each(|shadow| shadow.show(binding, &part));
        // Whatever fails, the shadow disk is at least as large as its partition.
        if part.size > self.partitions[at].range().size {
            resize_mounted()?;
            self.partitions[at].show(binding, part.size, closed)
        } else {
            self.partitions[at].show(binding, part.size, closed)?;
            resize_mounted()
        }
    }

    /// Refuses a range beyond the device, or not in whole blocks.
    fn check_range(&self, part: &partitions::PartitionRange) -> Answer<()> {
        let disk = self.disk()?;
        let block = u64::from(disk.block_size());
        let is_whole = part.size > 0 && part.start.is_multiple_of(block) && part.size.is_multiple_of(block);
        let end = part.start.checked_add(part.size);
        if is_whole && end.is_some_and(|end| end <= disk.size()) { Ok(()) } else { Err(Errno::INVAL) }
    }

    /// Refuses a range that overlaps another partition.
    fn check_free(&self, part: &partitions::PartitionRange) -> Answer<()> {
        let others =
            self.partitions.iter().map(PartitionDisk::range).filter(|other| other.number != part.number);
        let overlaps = |other: partitions::PartitionRange| {
            part.start < other.start.saturating_add(other.size)
                && other.start < part.start.saturating_add(part.size)
        };
        if others.into_iter().any(overlaps) { Err(Errno::BUSY) } else { Ok(()) }
    }

    fn index_of(&self, number: u32) -> Option<usize> {
        self.partitions.iter().position(|part| part.range().number == number)
    }

    fn put(&mut self, part: PartitionDisk) {
        let number = part.range().number;
        let at = self.partitions.partition_point(|other| other.range().number < number);
        self.partitions.insert(at, part);
    }

    /// A name of an earlier partition must not open a new one.
    fn next_part_generation(&mut self) -> u64 {
        self.last_generation += 1;
        self.last_generation
    }

    /// Applies the partition table. Keeps all partitions if one that is not in the table is in use.
    fn rescan(&mut self, allocator: &DiskAllocator) -> Answer<()> {
        if self.partitions.iter().any(PartitionDisk::is_claimed) {
            return Err(Errno::BUSY);
        }
        // The table is read from the file: write the page cache of the device back first.
        self.disk()?.flush()?;
        let binding = self.bound()?;
        let (image, _) = binding.reopen(&binding.info, binding.block_size)?;
        let wanted = partition_disk::read(&image);
        let (kept, going): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.partitions).into_iter().partition(|part| wanted.contains(&part.range()));
        self.partitions = kept;
        let generation = self.next_part_generation();
        let mut gone = Vec::new();
        let mut in_use = Vec::new();
        for part in going {
            if !in_use.is_empty() {
                in_use.push(part);
                continue;
            }
            let position = part.range();
            match part.retire(allocator) {
                Ok(()) => gone.push(position),
                Err(part) => in_use.push(part),
            }
        }
        let busy = !in_use.is_empty();
        let missing: Vec<_> =
            wanted.into_iter().filter(|part| self.index_of(part.number).is_none()).collect();
        let binding = self.binding.as_ref().ok_or(Errno::NXIO)?;
        let made =
            partition_disk::create_all(binding, if busy { &gone } else { &missing }, generation, allocator);
        in_use.into_iter().chain(made).for_each(|part| self.put(part));
        if busy { Err(Errno::BUSY) } else { Ok(()) }
    }

    /// Reopens the partitions after the device got another range, or another file.
    pub(super) fn reopen_partitions(&mut self) {
        let Some(binding) = &self.binding else { return };
        for mut part in std::mem::take(&mut self.partitions) {
            let position = part.range();
            match part.show(binding, position.size, false) {
                Ok(()) => self.partitions.push(part),
                Err(error) => {
                    let device = self.number;
                    tracing::warn!(%error, "loop{device}p{} is removed: its image cannot be opened", position.number);
                    part.disk().unbind();
                    self.outgoing.push(super::OutgoingDisk::of_partition(part));
                }
            }
        }
    }

    /// Removes the partitions. Open ones serve their holders until the last close.
    pub(super) fn drop_partitions(&mut self) {
        self.outgoing.extend(self.partitions.drain(..).map(super::OutgoingDisk::of_partition));
    }
}
