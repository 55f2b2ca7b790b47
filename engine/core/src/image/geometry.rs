//! Sizes and alignments of a device, computed from those of its file.
//!
//! Pure: knows neither files nor ublk. The file's side comes in as [`Facts`].

use super::Source;
use crate::error::{Error, Kind, Result};
use crate::request::SECTOR;

/// Largest logical block and largest memory alignment: what ublk takes on every machine.
const BLOCK_MAX: u32 = 4096;

/// What there is to know about a file. All alignments in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Facts {
    /// Bytes.
    pub size: u64,
    /// It is a block device.
    pub block_device: bool,
    /// Direct I/O starts and ends at multiples of this; 1 when buffered.
    pub offset_align: u32,
    /// Memory of direct I/O starts at multiples of this; 1 when buffered.
    pub mem_align: u32,
    /// Bytes that the file system allocates, or the device writes, as one.
    pub physical_block_size: u32,
    /// Bytes that can be freed; punches that fill none free nothing.
    pub discard_granularity: u32,
    /// fallocate can punch holes.
    pub can_punch: bool,
}

/// The shape of a device over a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Bytes of the device; a multiple of the logical block size, never 0 (as a loop device: of 512, or 0).
    pub size: u64,
    /// First byte of the device in the file; `offset + size` does not overflow.
    pub offset: u64,
    /// Logical block size in bytes: a power of two, 512 to 4096.
    pub block_size: u32,
    /// Physical block size in bytes: a power of two, at least the logical one, and one that the
    /// offset does not misalign.
    pub physical_block_size: u32,
    /// Alignment of a request's memory in bytes: a power of two, 512 to 4096.
    pub dma_align: u32,
    /// What a discard must fill, counted in bytes of the file, not of the device: a power of
    /// two, at least the logical block size.
    pub discard_granularity: u32,
    /// Writes must be refused.
    pub read_only: bool,
    /// Discards free blocks.
    pub can_discard: bool,
    /// fallocate zeroes ranges; where not, it is better that the block layer writes zeroes.
    pub can_write_zeroes: bool,
}

impl Geometry {
    /// The geometry that `source` asks for over a file with these `facts`; `name` is for messages.
    ///
    /// Errors are [`Kind::Invalid`] where another `source` or a larger file would do, and
    /// [`Kind::Unsupported`] where only buffered I/O would.
    pub fn compute(facts: &Facts, source: &Source, name: &str) -> Result<Geometry> {
        let block_size = block_size(facts, source, name)?;
        let offset = source.offset;
        let size = match source.as_loop {
            false => size(facts, source, block_size, name)?,
            true => size_as_loop(facts, source, block_size, name)?,
        };
        Ok(Geometry {
            size,
            offset,
            block_size,
            physical_block_size: physical_block_size(facts, offset, block_size),
            dma_align: facts.mem_align.max(SECTOR as u32),
            discard_granularity: Some(facts.discard_granularity)
                .filter(|granularity| granularity.is_power_of_two())
                .map_or(block_size, |granularity| granularity.max(block_size)),
            read_only: source.read_only,
            can_discard: facts.can_punch && !source.read_only,
            // A block device zeroes ranges by itself where its hardware cannot.
            can_write_zeroes: (facts.can_punch || facts.block_device) && !source.read_only,
        })
    }
}

impl Geometry {
    /// Whether a device of this shape, which exists, can be served by direct I/O on a file with these `facts`.
    pub fn check(&self, facts: &Facts, name: &str) -> Result<()> {
        let Facts { offset_align, mem_align, .. } = *facts;
        let fits = offset_align <= self.block_size
            && mem_align <= self.dma_align
            && self.offset.is_multiple_of(offset_align.max(1).into());
        if fits {
            return Ok(());
        }
        let least = offset_align.max(mem_align);
        let context = format!(
            "direct I/O on {name} needs an alignment of {least} bytes now, the device has {}",
            self.block_size
        );
        Err(Error::new(Kind::Unsupported, context))
    }
}

/// The logical block size: the wish if it can be had, else the least that direct I/O allows.
fn block_size(facts: &Facts, source: &Source, name: &str) -> Result<u32> {
    for align in [facts.offset_align, facts.mem_align] {
        if !align.is_power_of_two() || align > BLOCK_MAX {
            let context = format!("direct I/O on {name} needs an alignment of {align} bytes");
            return Err(Error::new(Kind::Unsupported, context).hint("attach with --buffered"));
        }
    }
    let least = facts.offset_align.max(SECTOR as u32);
    match source.block_size {
        0 => Ok(least),
        wish if !wish.is_power_of_two() || !(SECTOR as u32..=BLOCK_MAX).contains(&wish) => {
            let context = format!("block size {wish} is not one of 512, 1024, 2048, 4096");
            Err(Error::new(Kind::Invalid, context).hint("choose one of these with --block-size"))
        }
        wish if wish < least => Err(Error::new(
            if source.as_loop { Kind::Unsupported } else { Kind::Invalid },
            format!("block size {wish} is less than the {least} bytes that direct I/O on {name} needs"),
        )
        .hint(format!("attach with --block-size {least} or with --buffered"))),
        wish => Ok(wish),
    }
}

/// Bytes of the device: what lies behind the offset, cut to the limit and to whole blocks.
fn size(facts: &Facts, source: &Source, block_size: u32, name: &str) -> Result<u64> {
    let (offset, block) = (source.offset, u64::from(block_size));
    if facts.size == 0 {
        return Err(Error::new(Kind::Invalid, format!("{name} is empty"))
            .hint("give it a size, as in 'truncate --size 1G FILE'"));
    }
    if !offset.is_multiple_of(block) {
        let context = format!("offset {offset} is not a multiple of the block size, {block} bytes");
        let hint = match (source.block_size, facts.offset_align) {
            (0, align) if align > SECTOR as u32 => "choose a multiple, or attach with --buffered",
            (0 | 512, _) => "choose a multiple",
            _ => "choose a multiple, or a smaller --block-size",
        };
        return Err(Error::new(Kind::Invalid, context).hint(hint));
    }
    let behind = facts.size.checked_sub(offset).filter(|left| *left > 0);
    let Some(behind) = behind else {
        let end = facts.size;
        let context = format!("offset {offset} is not within {name}, which has {end} bytes");
        return Err(Error::new(Kind::Invalid, context).hint("choose a smaller --offset"));
    };
    let shown = match source.size_limit {
        0 => behind,
        limit => behind.min(limit),
    };
    match shown - shown % block {
        0 => Err(Error::new(
            Kind::Invalid,
            format!("{shown} bytes of {name} are less than one block of {block} bytes"),
        )
        .hint("enlarge the image, or choose another --offset or --size-limit")),
        size => Ok(size),
    }
}

/// Bytes of the device as loop(4) counts them; nothing is too small or too far out.
fn size_as_loop(facts: &Facts, source: &Source, block_size: u32, name: &str) -> Result<u64> {
    let least = facts.offset_align.max(facts.mem_align);
    if least > block_size || facts.mem_align > SECTOR as u32 || !source.offset.is_multiple_of(least.into()) {
        let context = format!("direct I/O on {name} needs an alignment of {least} bytes");
        return Err(Error::new(Kind::Unsupported, context));
    }
    let behind = facts.size.saturating_sub(source.offset);
    let shown = if source.size_limit == 0 { behind } else { behind.min(source.size_limit) };
    Ok(shown - shown % SECTOR)
}

/// The physical block size: the file's, unless the offset splits its blocks.
fn physical_block_size(facts: &Facts, offset: u64, block_size: u32) -> u32 {
    let mut physical = facts.physical_block_size;
    if !physical.is_power_of_two() {
        return block_size;
    }
    while physical > block_size && !offset.is_multiple_of(physical.into()) {
        physical /= 2;
    }
    physical.max(block_size)
}
