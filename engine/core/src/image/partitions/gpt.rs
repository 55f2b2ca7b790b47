// SPDX-License-Identifier: Apache-2.0 OR MIT
//! GPT: header, checksums, entries; the backup if the primary is damaged.

use super::super::region::{Region, le};
use super::{MAX, PartitionList};

/// Bytes of a header, by the first version of the standard.
const HEADER: usize = 92;
/// Bytes of an entry. The standard allows more; the kernel does not.
const ENTRY: usize = 128;
/// Maximum bytes of all entries: the kernel's limit.
const TABLE_MAX: u64 = 4 << 20;

struct Header {
    /// Byte of the device at which the entries start.
    entries: u64,
    count: u64,
    crc: u32,
}

/// Adds the partitions of the primary table, or of the backup.
pub(super) fn read(disk: &mut Region<'_>, block: u64, list: &mut PartitionList) {
    let Some(last) = (disk.size() / block).checked_sub(1).filter(|&last| last > 0) else { return };
    let mut valid = |lba| {
        let header = header(disk, lba, last, block)?;
        entries(disk, &header)
    };
    let Some(entries) = valid(1).or_else(|| valid(last)) else { return };
    for (entry, number) in entries.chunks_exact(ENTRY).zip(1..) {
        let unused = entry.starts_with(&[0; 16]);
        let (first, end) = (le::<8>(entry, 32), le::<8>(entry, 40));
        if !unused && first <= end && end <= last {
            list.add(number, first * block, (end - first + 1) * block);
        }
    }
}

/// The header in block `lba`, if valid; `last` is the device's last block.
fn header(disk: &mut Region<'_>, lba: u64, last: u64, block: u64) -> Option<Header> {
    let mut memory = [0; 4096];
    let sector = memory.get_mut(..usize::try_from(block).ok()?)?;
    disk.read(lba.checked_mul(block)?, sector).ok()?.then_some(())?;
    let size = usize::try_from(le::<4>(sector, 12)).ok()?;
    let (my_lba, first, end) = (le::<8>(sector, 24), le::<8>(sector, 40), le::<8>(sector, 48));
    let header = Header {
        entries: le::<8>(sector, 72).checked_mul(block)?,
        count: le::<4>(sector, 80),
        crc: le::<4>(sector, 88) as u32,
    };
    let valid = sector.starts_with(b"EFI PART")
        && size >= HEADER
        && my_lba == lba
        && first <= end
        && end <= last
        && le::<4>(sector, 84) == ENTRY as u64
        && header.count * ENTRY as u64 <= TABLE_MAX;
    let expected_crc = le::<4>(sector, 16) as u32;
    sector.get_mut(16..20)?.fill(0);
    (valid && crc32(0, sector.get(..size)?) == expected_crc).then_some(header)
}

/// The entries that can become partitions, if the checksum of all is right.
fn entries(disk: &mut Region<'_>, header: &Header) -> Option<Vec<u8>> {
    let mut used = Vec::new();
    let (mut crc, mut at, mut rest) = (0, header.entries, header.count as usize * ENTRY);
    let mut memory = vec![0; (MAX as usize + 1) * ENTRY];
    while rest > 0 {
        let count = rest.min(memory.len());
        let part = memory.get_mut(..count)?;
        disk.read(at, part).ok()?.then_some(())?;
        crc = crc32(crc, part);
        if used.is_empty() {
            used.extend_from_slice(part);
        }
        (at, rest) = (at.checked_add(count as u64)?, rest - count);
    }
    (crc == header.crc).then_some(used)
}

/// Goes on with the CRC-32 of zlib and Ethernet.
fn crc32(crc: u32, bytes: &[u8]) -> u32 {
    const TABLE: [u32; 256] = {
        let mut table = [0; 256];
        let mut index = 0;
        while index < 256 {
            let (mut value, mut bit) = (index as u32, 0);
            while bit < 8 {
                value = if value & 1 == 1 { value >> 1 ^ 0xedb8_8320 } else { value >> 1 };
                bit += 1;
            }
            table[index] = value;
            index += 1;
        }
        table
    };
    let step = |crc: u32, &byte: &u8| crc >> 8 ^ TABLE[usize::from(crc as u8 ^ byte)];
    !bytes.iter().fold(!crc, step)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_are_those_of_zlib() {
        assert_eq!(crc32(0, b"123456789"), 0xcbf4_3926);
        assert_eq!(crc32(crc32(0, b"1234"), b"56789"), 0xcbf4_3926);
    }
}
