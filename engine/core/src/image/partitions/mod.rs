// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Partition tables as the kernel reads them: MBR with logical partitions, and GPT.
//!
//! Implements the kernel's rules (block/partitions): numbering, clipping, omissions. A table is
//! tenant data: no size or count in it determines how much is read or allocated, and no link is
//! followed twice.
//!
//! The kernel's rules:
//! - numbers go to 255 ([`MAX`]); MBR: 1 to 4, logical ones from 5; GPT: entry plus 1;
//! - a partition that starts beyond the end is omitted, one that ends beyond it is clipped, one of
//!   size 0 is omitted; overlapping ones are all kept;
//! - an extended partition has 1 KiB (or one block, if larger), so that nobody writes to it;
//! - a GPT counts only with a protective MBR, and then the MBR does not.
//!
//! Deviations: the backup GPT is used if the primary is damaged (the kernel does so only with the
//! parameter `gpt`; sfdisk and blkid always do). Chains of logical partitions end at a sector that
//! was read before, and after [`mbr::CHAIN_MAX`] links. BSD, Solaris and other tables are ignored.
//!
//! No crate is used: `gpt` 4.1 asserts on entries of other sizes and allocates the table by the
//! header's size, `mbrman` 0.6 pulls in fifteen crates, and both reject what the kernel accepts.

mod gpt;
mod mbr;

use super::geometry::is_block_size;
use super::region::Region;
use crate::error::{Error, Kind, Result};

/// The highest partition number, and so the maximum count.
pub const MAX: u32 = 255;

/// The range of a partition on its device, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PartitionRange {
    /// M of loopNpM.
    pub number: u32,
    /// First byte.
    pub start: u64,
    /// Bytes, at least a block.
    pub size: u64,
}

/// Reads the partition table of `disk`, a device with logical blocks of `block` bytes. No table
/// means no partitions.
///
/// May block as long as the file does; reads some 5 MiB at most.
pub fn read(disk: &mut Region<'_>, block: u32) -> Result<Vec<PartitionRange>> {
    if !is_block_size(block) {
        let message = format!("cannot read partitions with blocks of {block} bytes");
        return Err(Error::new(Kind::Invalid, message));
    }
    let block = u64::from(block);
    let mut sector = [0; 512];
    let whole = disk.read(0, &mut sector);
    if !whole.map_err(|error| Error::os(error, "cannot read the partition table"))? {
        return Ok(Vec::new());
    }
    let Some(table) = mbr::MbrTable::of(&sector) else { return Ok(Vec::new()) };
    let mut list = PartitionList { ranges: Vec::new(), capacity: disk.size() / block * block };
    if table.is_protective() {
        gpt::read(disk, block, &mut list);
    } else if !table.has_gpt_entry() {
        mbr::read(disk, block, &table, &mut list);
    }
    Ok(list.ranges)
}

/// Whether the first sector announces a GPT. If [`read`] finds no partitions then, the table is
/// empty or damaged, or lies beyond the end of `disk`.
pub fn has_gpt_entry(disk: &mut Region<'_>) -> bool {
    let mut sector = [0; 512];
    let is_read = disk.read(0, &mut sector).unwrap_or(false);
    is_read && mbr::MbrTable::of(&sector).is_some_and(|table| table.has_gpt_entry())
}

/// The partitions found so far, and the device's capacity.
struct PartitionList {
    ranges: Vec<PartitionRange>,
    capacity: u64,
}

impl PartitionList {
    fn add(&mut self, number: u32, start: u64, size: u64) {
        let Some(available) = self.capacity.checked_sub(start).filter(|&available| available > 0) else {
            return;
        };
        if (1..=MAX).contains(&number) && size > 0 {
            self.ranges.push(PartitionRange { number, start, size: size.min(available) });
        }
    }
}
