// SPDX-License-Identifier: Apache-2.0 OR MIT
//! MBR: four entries, and chains of logical partitions.

use std::collections::HashSet;

use super::super::region::{Region, le};
use super::{MAX, PartitionList};

/// Maximum number of links of all chains. (The kernel's limit is a hundred without a partition.)
pub(super) const CHAIN_MAX: usize = 512;
/// Fields of a table count blocks; the kernel counts sectors.
const SECTOR: u64 = 512;
/// The type of a protective entry.
const GPT: u8 = 0xee;

#[derive(Clone, Copy, Debug)]
struct MbrEntry {
    boot: u8,
    kind: u8,
    /// In blocks.
    start: u64,
    /// In blocks.
    size: u64,
}

impl MbrEntry {
    fn is_extended(&self) -> bool {
        self.size > 0 && [0x05, 0x0f, 0x85].contains(&self.kind)
    }
}

/// Four entries: an MBR, or a link of a chain (EBR).
#[derive(Clone, Copy, Debug)]
pub(super) struct MbrTable([MbrEntry; 4]);

impl MbrTable {
    /// The entries of `sector`, if it ends with the boot signature.
    fn parse_unchecked(sector: &[u8; 512]) -> Option<MbrTable> {
        let entry = |index: usize| {
            let at = 446 + 16 * index;
            let (boot, kind) = (le::<1>(sector, at) as u8, le::<1>(sector, at + 4) as u8);
            MbrEntry { boot, kind, start: le::<4>(sector, at + 8), size: le::<4>(sector, at + 12) }
        };
        sector.ends_with(&[0x55, 0xaa]).then(|| MbrTable([entry(0), entry(1), entry(2), entry(3)]))
    }

    /// The MBR in the first sector of a device. Boot sectors of file systems have the same
    /// signature.
    pub(super) fn of(sector: &[u8; 512]) -> Option<MbrTable> {
        Self::parse_unchecked(sector).filter(|table| table.has_gpt_entry() || table.has_valid_boot_flags())
    }

    fn has_valid_boot_flags(&self) -> bool {
        self.0.iter().all(|entry| entry.boot == 0 || entry.boot == 0x80)
    }

    /// Whether it is the protective MBR of a GPT.
    pub(super) fn is_protective(&self) -> bool {
        self.0.iter().any(|entry| entry.kind == GPT && entry.start == 1)
    }

    /// Whether it has a GPT entry.
    pub(super) fn has_gpt_entry(&self) -> bool {
        self.0.iter().any(|entry| entry.kind == GPT)
    }
}

/// Adds the partitions of the MBR `table` and its chains.
pub(super) fn read(disk: &mut Region<'_>, block: u64, table: &MbrTable, list: &mut PartitionList) {
    let mut chains = Chains { block, next: 5, seen: HashSet::new() };
    for (entry, number) in table.0.iter().zip(1..) {
        let (start, size) = (entry.start * block, entry.size * block);
        if entry.is_extended() {
            list.add(number, start, size.min(block.max(2 * SECTOR)));
            chains.follow(disk, start, size, list);
        } else {
            list.add(number, start, size);
        }
    }
}

struct Chains {
    block: u64,
    /// The next logical partition's number.
    next: u32,
    /// Positions of the links read so far.
    seen: HashSet<u64>,
}

impl Chains {
    /// Adds the logical partitions of the extended one at `first`; positions and sizes are in
    /// bytes.
    fn follow(&mut self, disk: &mut Region<'_>, first: u64, size: u64, list: &mut PartitionList) {
        let (mut here, mut here_size) = (first, size);
        while self.next <= MAX && self.seen.len() < CHAIN_MAX && self.seen.insert(here) {
            let Some(MbrTable(entries)) = disk.bytes(here).as_ref().and_then(MbrTable::parse_unchecked)
            else {
                return;
            };
            for (index, entry) in entries.iter().enumerate() {
                if entry.size == 0 || entry.is_extended() || self.next > MAX {
                    continue;
                }
                let (offset, size) = (entry.start * self.block, entry.size * self.block);
                let start = here + offset;
                // The last two entries of a link are unused, but some tools write to them.
                let fits = offset + size <= here_size && start >= first && start + size <= first + here_size;
                if index >= 2 && !fits {
                    continue;
                }
                list.add(self.next, start, size);
                self.next += 1;
            }
            let Some(next) = entries.iter().find(|entry| entry.is_extended()) else { return };
            (here, here_size) = (first + next.start * self.block, next.size * self.block);
        }
    }
}
