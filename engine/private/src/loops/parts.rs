//! Partitions of a bound device: each is a disk of its own over a part of the same file.
//!
//! The kernel is never asked to look at a tenant's table: `image::partitions` reads it. Knows what one
//! partition is; when they come, change and go is the business of the device they belong to.

use std::sync::Arc;

use super::binding::Binding;
use super::disk::Disk;
use super::maker::Maker;
use super::{Answer, Errno, Info, Partition, errno};
use crate::image::{Image, Region, partitions};

/// Partitions of one device at the most: each is a disk of its own.
pub const MAX: usize = 128;
/// Partitions of all devices of a pool at the most.
pub const POOL_MAX: usize = 256;

/// A partition that is there.
#[derive(Debug)]
pub struct Part {
    disk: Disk,
    shown: Partition,
    counted: Arc<()>,
}

/// Partitions that the table in `image` tells of. A table that cannot be read tells of none.
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

/// Makes these partitions. What cannot be made is left out, as a kernel would; the device itself works without.
pub fn make_all(
    binding: &Binding,
    found: &[partitions::PartitionRange],
    generation: u64,
    room: &Maker,
) -> Vec<Part> {
    let made = found.iter().map(|part| Part::make(binding, part, generation, false, room));
    made.filter_map(|part| part.inspect_err(|error| tracing::debug!(%error, "no partition")).ok()).collect()
}

/// What of the file the partition shows.
pub fn info(binding: &Binding, part: &partitions::PartitionRange) -> Info {
    Info { offset: binding.info.offset.saturating_add(part.start), size_limit: part.size, ..binding.info }
}

impl Part {
    /// A new one; `closed`: to be read only, while its device is.
    pub fn make(
        binding: &Binding,
        part: &partitions::PartitionRange,
        generation: u64,
        closed: bool,
        room: &Maker,
    ) -> Answer<Part> {
        let counted = Arc::clone(&room.partitions);
        if Arc::strong_count(&counted) > POOL_MAX + 1 {
            return Err(Errno::NOSPC);
        }
        let info = info(binding, part);
        let image = if closed {
            binding.reopen_to_read(&info, binding.block_size)?
        } else {
            binding.reopen(&info, binding.block_size)?.0
        };
        let disk = room.make(binding.block_size).map_err(|error| errno(&error))?;
        if let Err(error) = disk.present(image, binding.read_only(), closed) {
            if let Err(disk) = room.give_back(disk) {
                tracing::error!(rdev = disk.rdev, "the disk of a partition cannot be taken away");
            }
            return Err(error);
        }
        let shown = Partition {
            number: part.number,
            rdev: disk.rdev,
            generation,
            start: part.start / 512,
            size: part.size,
        };
        Ok(Part { disk, shown, counted })
    }

    /// Shows what the partition is now: another size, or the same of another file.
    pub fn show(&mut self, binding: &Binding, size: u64, closed: bool) -> Answer<()> {
        let part = partitions::PartitionRange { size, ..self.position() };
        let info = info(binding, &part);
        let image = if closed {
            binding.reopen_to_read(&info, self.disk.block_size)?
        } else {
            binding.reopen(&info, self.disk.block_size)?.0
        };
        self.disk.flush()?;
        self.disk.show(image)?;
        self.shown.size = size;
        // Read in between, of what it was before.
        self.disk.flush()
    }

    /// For directories and sysfs.
    pub fn shown(&self) -> Partition {
        self.shown.clone()
    }

    /// Where it is on the device.
    pub fn position(&self) -> partitions::PartitionRange {
        partitions::PartitionRange {
            number: self.shown.number,
            start: self.shown.start * 512,
            size: self.shown.size,
        }
    }

    /// Somebody has mounted it, or opened it with O_EXCL.
    pub fn is_claimed(&self) -> bool {
        self.disk.is_claimed()
    }

    /// Its disk.
    pub fn disk(&self) -> &Disk {
        &self.disk
    }

    /// What of the file it shows.
    pub fn info(&self, binding: &Binding) -> Info {
        info(binding, &self.position())
    }

    /// It is a partition no more. It counts until the other is dropped.
    pub fn into_disk(self) -> (Disk, Arc<()>) {
        (self.disk, self.counted)
    }

    /// Takes its disk away, if nobody has it open.
    pub fn retire(self, room: &Maker) -> Result<(), Part> {
        let Part { disk, shown, counted } = self;
        room.retire(disk).map_err(|disk| Part { disk, shown, counted })
    }
}
