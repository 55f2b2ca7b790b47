// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The geometry of a device, computed from the properties of its file.
//!
//! Pure: knows neither files nor ublk.

use super::ImageSpec;
use crate::error::{Error, Kind, Result};
use crate::request::SECTOR;

/// Largest logical block and memory alignment: ublk supports it on every machine.
pub const BLOCK_MAX: u32 = 4096;
/// Largest logical block that the kernel's loop driver supports on any kernel.
pub const KERNEL_LOOP_BLOCK_MAX: u32 = 65536;

/// The properties of a file. All alignments are in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileProperties {
    /// Bytes.
    pub size: u64,
    /// It is a block device.
    pub block_device: bool,
    /// Alignment of offset and length of direct I/O; 1 if buffered.
    pub offset_align: u32,
    /// Alignment of memory for direct I/O; 1 if buffered.
    pub mem_align: u32,
    /// Allocation unit of the file system, or write unit of the device, in bytes.
    pub physical_block_size: u32,
    /// Unit of deallocation in bytes; smaller punches free nothing.
    pub discard_granularity: u32,
    /// fallocate can punch holes.
    pub can_punch: bool,
}

/// The geometry of a device on a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Size of the device in bytes: a multiple of the logical block size, never 0 (with loop
    /// semantics: of 512, or 0).
    pub size: u64,
    /// First byte of the device in the file; `offset + size` does not overflow.
    pub offset: u64,
    /// Logical block size in bytes: a power of two, 512 to 4096.
    pub block_size: u32,
    /// Physical block size in bytes: a power of two, at least the logical one, and aligned with the
    /// offset.
    pub physical_block_size: u32,
    /// Alignment of a request's memory in bytes: a power of two, 512 to 4096.
    pub dma_align: u32,
    /// Discard granularity in bytes of the file, not of the device: a power of two, at least the
    /// logical block size.
    pub discard_granularity: u32,
    /// Writes are rejected.
    pub read_only: bool,
    /// Discards free blocks.
    pub can_discard: bool,
    /// fallocate can zero ranges; otherwise the block layer should write zeroes.
    pub can_write_zeroes: bool,
    /// Every write is durable when it completes. The device has no volatile cache, so nobody flushes
    /// it. It never changes.
    pub durable_writes: bool,
}

impl Geometry {
    /// The geometry that `spec` requests for a file with these `properties`; `name` is for
    /// messages.
    ///
    /// Errors are [`Kind::Invalid`] if another `spec` or a larger file would help, and
    /// [`Kind::Unsupported`] if only buffered I/O would.
    pub fn compute(properties: &FileProperties, spec: &ImageSpec, name: &str) -> Result<Geometry> {
        let block_size = block_size(properties, spec, name)?;
        let offset = spec.offset;
        let size = match spec.loop_semantics {
            false => size(properties, spec, block_size, name)?,
            true => size_as_loop(properties, spec, block_size, name)?,
        };
        Ok(Geometry {
            size,
            offset,
            block_size,
            physical_block_size: physical_block_size(properties, offset, block_size),
            dma_align: properties.mem_align.max(SECTOR as u32),
            discard_granularity: Some(properties.discard_granularity)
                .filter(|granularity| granularity.is_power_of_two())
                .map_or(block_size, |granularity| granularity.max(block_size)),
            read_only: spec.read_only,
            // Later writes to a hole would wait for the file system's journal.
            can_discard: properties.can_punch && !spec.read_only && !spec.durable,
            // A block device zeroes ranges in software if its hardware cannot.
            can_write_zeroes: (properties.can_punch || properties.block_device)
                && !spec.read_only
                && !spec.durable,
            durable_writes: spec.durable,
        })
    }
}

impl Geometry {
    /// Checks that an existing device of this geometry can use direct I/O on a file with these
    /// `properties`.
    pub fn check(&self, properties: &FileProperties, name: &str) -> Result<()> {
        let FileProperties { offset_align, mem_align, .. } = *properties;
        let fits = offset_align <= self.block_size
            && mem_align <= self.dma_align
            && self.offset.is_multiple_of(offset_align.max(1).into());
        if fits {
            return Ok(());
        }
        let least = offset_align.max(mem_align);
        Err(unsupported_alignment(name, least))
    }
}

/// Whether `bytes` is a logical block size that devices of some backend support.
pub fn is_block_size(bytes: u32) -> bool {
    bytes.is_power_of_two() && (SECTOR as u32..=KERNEL_LOOP_BLOCK_MAX).contains(&bytes)
}

fn unsupported_alignment(name: &str, align: u32) -> Error {
    Error::new(Kind::Unsupported, format!("direct I/O on {name} needs an alignment of {align} bytes"))
}

/// The logical block size: the requested one if possible, else the smallest for direct I/O.
fn block_size(properties: &FileProperties, spec: &ImageSpec, name: &str) -> Result<u32> {
    for align in [properties.offset_align, properties.mem_align] {
        if !align.is_power_of_two() || align > BLOCK_MAX {
            return Err(unsupported_alignment(name, align).hint("attach with --buffered"));
        }
    }
    let least = properties.offset_align.max(SECTOR as u32);
    match spec.block_size {
        0 => Ok(least),
        wanted if !is_block_size(wanted) => {
            let context = format!("block size {wanted} is not a power of two from 512 to 65536");
            Err(Error::new(Kind::Invalid, context).hint("choose one of these with --block-size"))
        }
        wanted if wanted < least => Err(Error::new(
            if spec.loop_semantics { Kind::Unsupported } else { Kind::Invalid },
            format!("block size {wanted} is less than the {least} bytes that direct I/O on {name} needs"),
        )
        .hint(format!("attach with --block-size {least} or with --buffered"))),
        wanted => Ok(wanted),
    }
}

/// The device size: from the offset to the end, limited, and in whole blocks.
fn size(properties: &FileProperties, spec: &ImageSpec, block_size: u32, name: &str) -> Result<u64> {
    let (offset, block) = (spec.offset, u64::from(block_size));
    if properties.size == 0 {
        return Err(Error::new(Kind::Invalid, format!("{name} is empty"))
            .hint("give it a size, as in 'truncate --size 1G FILE'"));
    }
    if !offset.is_multiple_of(block) {
        let context = format!("offset {offset} is not a multiple of the block size, {block} bytes");
        let hint = match (spec.block_size, properties.offset_align) {
            (0, align) if align > SECTOR as u32 => "choose a multiple, or attach with --buffered",
            (0 | 512, _) => "choose a multiple",
            _ => "choose a multiple, or a smaller --block-size",
        };
        return Err(Error::new(Kind::Invalid, context).hint(hint));
    }
    let available = properties.size.checked_sub(offset).filter(|remaining| *remaining > 0);
    let Some(available) = available else {
        let end = properties.size;
        let context = format!("offset {offset} is not within {name}, which has {end} bytes");
        return Err(Error::new(Kind::Invalid, context).hint("choose a smaller --offset"));
    };
    let mapped = match spec.size_limit {
        0 => available,
        limit => available.min(limit),
    };
    match mapped - mapped % block {
        0 => Err(Error::new(
            Kind::Invalid,
            format!("{mapped} bytes of {name} are less than one block of {block} bytes"),
        )
        .hint("enlarge the image, or choose another --offset or --size-limit")),
        size => Ok(size),
    }
}

/// The device size by the rules of loop(4): no range is too small or out of bounds.
fn size_as_loop(properties: &FileProperties, spec: &ImageSpec, block_size: u32, name: &str) -> Result<u64> {
    let least = properties.offset_align.max(properties.mem_align);
    if least > block_size || properties.mem_align > SECTOR as u32 || !spec.offset.is_multiple_of(least.into())
    {
        return Err(unsupported_alignment(name, least));
    }
    let available = properties.size.saturating_sub(spec.offset);
    let mapped = if spec.size_limit == 0 { available } else { available.min(spec.size_limit) };
    Ok(mapped - mapped % SECTOR)
}

/// The physical block size: the file's, unless the offset misaligns it.
fn physical_block_size(properties: &FileProperties, offset: u64, block_size: u32) -> u32 {
    let mut physical = properties.physical_block_size;
    if !physical.is_power_of_two() {
        return block_size;
    }
    while physical > block_size && !offset.is_multiple_of(physical.into()) {
        physical /= 2;
    }
    physical.max(block_size)
}
