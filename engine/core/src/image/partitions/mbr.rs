//! The four entries of an MBR, and chains of logical partitions.

use std::collections::HashSet;

use super::super::region::{Region, le};
use super::{Found, MAX};

/// Links of all chains at the most. (The kernel's limit is a hundred without a partition.)
pub(super) const CHAIN_MAX: usize = 512;
/// Fields of a table count blocks; the kernel counts sectors.
const SECTOR: u64 = 512;
/// The type of an entry that protects a GPT.
const GPT: u8 = 0xee;

#[derive(Clone, Copy, Debug)]
struct Entry {
    boot: u8,
    kind: u8,
    /// In blocks.
    start: u64,
    /// In blocks.
    size: u64,
}

impl Entry {
    fn is_extended(&self) -> bool {
        self.size > 0 && [0x05, 0x0f, 0x85].contains(&self.kind)
    }
}

/// Four entries: an MBR, or a link of a chain.
#[derive(Clone, Copy, Debug)]
pub(super) struct Table([Entry; 4]);

impl Table {
    /// The entries of `sector`, if its last bytes say that it has some.
    fn any(sector: &[u8; 512]) -> Option<Table> {
        let entry = |index: usize| {
            let at = 446 + 16 * index;
            let (boot, kind) = (le::<1>(sector, at) as u8, le::<1>(sector, at + 4) as u8);
            Entry { boot, kind, start: le::<4>(sector, at + 8), size: le::<4>(sector, at + 12) }
        };
        sector.ends_with(&[0x55, 0xaa]).then(|| Table([entry(0), entry(1), entry(2), entry(3)]))
    }

    /// The MBR in the first sector of a device. Boot sectors of file systems end in the same bytes.
    pub(super) fn of(sector: &[u8; 512]) -> Option<Table> {
        Self::any(sector).filter(|table| table.mentions_gpt() || table.is_bootable_or_not())
    }

    fn is_bootable_or_not(&self) -> bool {
        self.0.iter().all(|entry| entry.boot == 0 || entry.boot == 0x80)
    }

    /// Says that there is a GPT, where it is.
    pub(super) fn protects_gpt(&self) -> bool {
        self.0.iter().any(|entry| entry.kind == GPT && entry.start == 1)
    }

    /// Says that there is, or was, a GPT.
    pub(super) fn mentions_gpt(&self) -> bool {
        self.0.iter().any(|entry| entry.kind == GPT)
    }
}

/// Adds what `table`, the device's MBR, and its chains say.
pub(super) fn read(disk: &mut Region<'_>, block: u64, table: &Table, found: &mut Found) {
    let mut chains = Chains { block, next: 5, seen: HashSet::new() };
    for (entry, number) in table.0.iter().zip(1..) {
        let (start, size) = (entry.start * block, entry.size * block);
        if entry.is_extended() {
            found.add(number, start, size.min(block.max(2 * SECTOR)));
            chains.follow(disk, start, size, found);
        } else {
            found.add(number, start, size);
        }
    }
}

struct Chains {
    block: u64,
    /// The next logical partition's number.
    next: u32,
    /// Where links were read.
    seen: HashSet<u64>,
}

impl Chains {
    /// Adds the logical partitions of the extended one at `first`; positions and sizes are in bytes.
    fn follow(&mut self, disk: &mut Region<'_>, first: u64, size: u64, found: &mut Found) {
        let (mut here, mut here_size) = (first, size);
        while self.next <= MAX && self.seen.len() < CHAIN_MAX && self.seen.insert(here) {
            let Some(Table(entries)) = disk.bytes(here).as_ref().and_then(Table::any) else { return };
            for (index, entry) in entries.iter().enumerate() {
                if entry.size == 0 || entry.is_extended() || self.next > MAX {
                    continue;
                }
                let (offset, size) = (entry.start * self.block, entry.size * self.block);
                let start = here + offset;
                // The last two entries of a link mean nothing; some tools write there all the same.
                let fits = offset + size <= here_size && start >= first && start + size <= first + here_size;
                if index >= 2 && !fits {
                    continue;
                }
                found.add(self.next, start, size);
                self.next += 1;
            }
            let Some(next) = entries.iter().find(|entry| entry.is_extended()) else { return };
            (here, here_size) = (first + next.start * self.block, next.size * self.block);
        }
    }
}
