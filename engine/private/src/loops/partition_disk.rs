// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Partitions of a bound device: each is a disk of its own over a range of the same file.
//!
//! The kernel never parses a tenant's partition table: `image::partitions` does. Knows one
//! partition. Does not know when partitions are added, changed and removed.

use std::sync::Arc;

use super::disk_allocator::DiskAllocator;
use super::file_binding::FileBinding;
use super::pool_disk::PoolDisk;
use super::{Answer, Errno, LoopInfo, PartitionEntry};
use crate::image::{Image, Region, partitions};

/// Maximum number of partitions of a device.
pub const MAX: usize = 128;
/// Maximum number of partitions of all devices of a pool.
pub const POOL_MAX: usize = 256;

/// A partition of a device.
#[derive(Debug)]
pub struct PartitionDisk {
    disk: PoolDisk,
    entry: PartitionEntry,
    count_token: Arc<()>,
}

/// Reads the partition table of `image`. None, if it cannot be read.
pub fn read(image: &Image) -> Vec<partitions::PartitionRange> {
    let geometry = image.geometry();
    let mut region = Region::new(image.fd(), geometry.offset, geometry.size);
    let mut found = partitions::read(&mut region, geometry.block_size).unwrap_or_else(|error| {
        tracing::debug!(%error, "a partition table cannot be read");
        Vec::new()
    });
    found.truncate(MAX);
    found
}

/// Creates these partitions. Leaves out those that fail, as the kernel does: the device works
/// without.
pub fn create_all(
    binding: &FileBinding,
    found: &[partitions::PartitionRange],
    generation: u64,
    allocator: &DiskAllocator,
) -> Vec<PartitionDisk> {
    let made = found.iter().map(|part| PartitionDisk::create(binding, part, generation, false, allocator));
    made.filter_map(|part| {
        part.inspect_err(|error| tracing::debug!(%error, "cannot create a partition")).ok()
    })
    .collect()
}

/// The range of the file that the partition covers.
pub fn range_info(binding: &FileBinding, part: &partitions::PartitionRange) -> LoopInfo {
    LoopInfo { offset: binding.info.offset.saturating_add(part.start), size_limit: part.size, ..binding.info }
}

impl PartitionDisk {
    /// Creates a partition. `closed`: read-only for as long as its device is.
    pub fn create(
        binding: &FileBinding,
        part: &partitions::PartitionRange,
        generation: u64,
        closed: bool,
        allocator: &DiskAllocator,
    ) -> Answer<PartitionDisk> {
        let count_token = Arc::clone(&allocator.partitions);
        if Arc::strong_count(&count_token) > POOL_MAX + 1 {
            return Err(Errno::NOSPC);
        }
        let info = range_info(binding, part);
        let image = if closed {
            binding.reopen_read_only(&info, binding.block_size)?
        } else {
            binding.reopen(&info, binding.block_size)?.0
        };
        let disk = allocator.allocate_bound(image, binding.read_only(), closed)?;
        let entry = PartitionEntry {
            number: part.number,
            rdev: disk.rdev,
            generation,
            start: part.start / 512,
            size: part.size,
        };
        Ok(PartitionDisk { disk, entry, count_token })
    }

    /// Reopens the image: with another size, or of another file.
    pub fn show(&mut self, binding: &FileBinding, size: u64, closed: bool) -> Answer<()> {
        let part = partitions::PartitionRange { size, ..self.range() };
        let info = range_info(binding, &part);
        let image = if closed {
            binding.reopen_read_only(&info, self.disk.block_size())?
        } else {
            binding.reopen(&info, self.disk.block_size())?.0
        };
        self.disk.flush()?;
        self.disk.set_image(image)?;
        self.entry.size = size;
        // Pages that were read meanwhile have the old content.
        self.disk.flush()
    }

    /// For listings and sysfs.
    pub fn entry(&self) -> PartitionEntry {
        self.entry.clone()
    }

    /// Its range on the device.
    pub fn range(&self) -> partitions::PartitionRange {
        partitions::PartitionRange {
            number: self.entry.number,
            start: self.entry.start * 512,
            size: self.entry.size,
        }
    }

    /// Whether it is mounted, or open with O_EXCL.
    pub fn is_claimed(&self) -> bool {
        self.disk.is_claimed()
    }

    /// Its disk.
    pub fn disk(&self) -> &PoolDisk {
        &self.disk
    }

    /// Gives it another disk. Returns the old one.
    pub fn exchange(&mut self, disk: PoolDisk, generation: u64) -> PoolDisk {
        (self.entry.rdev, self.entry.generation) = (disk.rdev, generation);
        std::mem::replace(&mut self.disk, disk)
    }

    /// The range of the file that it covers.
    pub fn info(&self, binding: &FileBinding) -> LoopInfo {
        range_info(binding, &self.range())
    }

    /// Turns it into a disk. It counts as a partition until the token is dropped.
    pub fn into_disk(self) -> (PoolDisk, Arc<()>) {
        (self.disk, self.count_token)
    }

    /// Removes it, if nobody has it open.
    pub fn retire(self, allocator: &DiskAllocator) -> Result<(), PartitionDisk> {
        let PartitionDisk { disk, entry, count_token } = self;
        allocator.retire(disk).map_err(|disk| PartitionDisk { disk, entry, count_token })
    }
}
