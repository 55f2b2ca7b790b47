//! Partitions of a bound device: each is a disk of its own over a part of the same file.
//!
//! The kernel is never asked to look at a tenant's table: `image::partitions` reads it. Knows how
//! partitions come and when they may go; the device they belong to decides.

use super::binding::Binding;
use super::maker::{Disk, Maker};
use super::{Answer, Info, Partition, errno};
use crate::image::{Image, Region, partitions};

/// Partitions of one device at the most: each is a disk of its own.
const MAX: usize = 32;

/// A partition that is there.
#[derive(Debug)]
pub struct Part {
    disk: Disk,
    shown: Partition,
    /// What of the file it shows.
    info: Info,
}

/// Makes the partitions that the table in `image` tells of. What cannot be made is left out, as a
/// kernel would; the device itself works without.
pub fn scan(binding: &Binding, image: &Image, generation: u64, room: &Maker) -> Vec<Part> {
    let geometry = image.geometry();
    let mut region = Region::new(image.fd(), geometry.offset, geometry.size);
    let found = match partitions::read(&mut region, geometry.block_size) {
        Ok(found) => found,
        Err(error) => {
            tracing::debug!(%error, "a partition table cannot be read");
            return Vec::new();
        }
    };
    let made = found.into_iter().take(MAX).map(|part| make(binding, &part, generation, room));
    made.filter_map(|part| part.inspect_err(|error| tracing::debug!(%error, "no partition")).ok()).collect()
}

fn make(binding: &Binding, part: &partitions::Part, generation: u64, room: &Maker) -> Answer<Part> {
    let info = Info {
        offset: binding.info.offset.saturating_add(part.start),
        size_limit: part.size,
        ..binding.info
    };
    let (image, _) = binding.reopen(&info, binding.block_size)?;
    let disk = room.make(binding.block_size).map_err(|error| errno(&error))?;
    if let Err(error) = disk.present(image, binding.read_only()) {
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
    Ok(Part { disk, shown, info })
}

impl Part {
    /// For directories and sysfs.
    pub fn shown(&self) -> Partition {
        self.shown.clone()
    }

    /// Somebody has mounted it, or opened it with O_EXCL.
    pub fn is_claimed(&self) -> bool {
        self.disk.is_claimed()
    }

    /// Its disk, and what of the file that shows.
    pub fn disk(&self) -> (&Disk, &Info) {
        (&self.disk, &self.info)
    }

    /// It is a partition no more.
    pub fn into_disk(self) -> Disk {
        self.disk
    }
}
