//! Partition tables as the kernel reads them: MBR with logical partitions, and GPT.
//!
//! Knows which partitions a table means, by the kernel's rules (block/partitions): its numbers, what
//! it clips and what it leaves out. Does not know what becomes of them. A table is a tenant's: no size
//! or count in it decides how much is read or allocated, and nothing is followed twice.
//!
//! By the kernel's rules:
//! - numbers go to 255 ([`MAX`]); MBR: 1 to 4, logical ones from 5; GPT: entry plus 1;
//! - a partition that starts behind the end is left out, one that ends behind it is clipped, one of size
//!   0 is left out; overlapping ones are all shown;
//! - an extended partition is shown with 1 KiB (one block, if that is more), so that nobody writes to it;
//! - a GPT counts only beside a protective MBR, and then the MBR does not.
//!
//! Not by its rules: the backup GPT is used when the primary is damaged (the kernel does so with the
//! parameter `gpt` only; so do sfdisk and blkid); chains of logical partitions end where they return to
//! a sector they came by, and after [`mbr::CHAIN_MAX`] links; BSD, Solaris and other tables are ignored.
//!
//! Ours and not a crate's: `gpt` 4.1 asserts on entries of other sizes and allocates the table by the
//! header's word, `mbrman` 0.6 brings fifteen crates, and both refuse what the kernel accepts.

mod gpt;
mod mbr;

use super::region::Region;
use crate::error::{Error, Kind, Result};

/// The highest number of a partition, and so how many there are at most.
pub const MAX: u32 = 255;

/// A partition: where it is on the device, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// M of loopNpM.
    pub number: u32,
    /// First byte.
    pub start: u64,
    /// Bytes, at least a block.
    pub size: u64,
}

/// Reads the table of `disk`, a device of logical blocks of `block` bytes; no table: no partitions.
///
/// May block for as long as the file does, for at most some 5 MiB.
pub fn read(disk: &mut Region<'_>, block: u32) -> Result<Vec<Part>> {
    if !(512..=4096).contains(&block) || !block.is_power_of_two() {
        let message = format!("cannot read partitions with blocks of {block} bytes");
        return Err(Error::new(Kind::Invalid, message));
    }
    let block = u64::from(block);
    let mut sector = [0; 512];
    let whole = disk.read(0, &mut sector);
    if !whole.map_err(|error| Error::os(error, "cannot read the partition table"))? {
        return Ok(Vec::new());
    }
    let Some(table) = mbr::Table::of(&sector) else { return Ok(Vec::new()) };
    let mut found = Found { parts: Vec::new(), capacity: disk.size() / block * block };
    if table.protects_gpt() {
        gpt::read(disk, block, &mut found);
    } else if !table.mentions_gpt() {
        mbr::read(disk, block, &table, &mut found);
    }
    Ok(found.parts)
}

/// What was found so far, and where the device ends.
struct Found {
    parts: Vec<Part>,
    capacity: u64,
}

impl Found {
    fn add(&mut self, number: u32, start: u64, size: u64) {
        let Some(room) = self.capacity.checked_sub(start).filter(|&room| room > 0) else { return };
        if (1..=MAX).contains(&number) && size > 0 {
            self.parts.push(Part { number, start, size: size.min(room) });
        }
    }
}
