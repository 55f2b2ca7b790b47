// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the block layer counts of a disk, in /sys/block/DISK/stat.

use std::path::Path;
use std::{fs, io};

/// Bytes of a sector in the counts, whatever the block size of the disk.
const SECTOR: u64 = 512;

/// Counts since the disk was added.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BlockStats {
    /// Reads completed.
    pub reads: u64,
    /// Bytes read.
    pub read_bytes: u64,
    /// Writes completed.
    pub writes: u64,
    /// Bytes written.
    pub written_bytes: u64,
    /// Requests in flight.
    pub in_flight: u64,
    /// Discards and write-zeroes completed.
    pub discards: u64,
    /// Flushes completed.
    pub flushes: u64,
    /// Sum of the durations of all reads and writes, in milliseconds.
    pub transfer_ms: u64,
    /// Time with at least one request in flight.
    pub busy_ms: u64,
    /// The same, for each request in flight.
    pub queued_ms: u64,
}

impl BlockStats {
    /// Of the disk with this name.
    pub fn of_disk(name: &str) -> io::Result<BlockStats> {
        fs::read_to_string(Path::new("/sys/block").join(name).join("stat")).map(|text| Self::parse(&text))
    }

    /// `reads merged sectors ms writes merged sectors ms in_flight busy_ms queued_ms discards merged
    /// sectors ms flushes ms`
    fn parse(text: &str) -> BlockStats {
        let fields: Vec<u64> = text.split_ascii_whitespace().map(|word| word.parse().unwrap_or(0)).collect();
        let field = |n: usize| fields.get(n).copied().unwrap_or(0);
        BlockStats {
            reads: field(0),
            read_bytes: field(2).saturating_mul(SECTOR),
            writes: field(4),
            written_bytes: field(6).saturating_mul(SECTOR),
            in_flight: field(8),
            discards: field(11),
            flushes: field(15),
            transfer_ms: field(3).saturating_add(field(7)),
            busy_ms: field(9),
            queued_ms: field(10),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_statistics_of_the_block_layer() {
        let stats = BlockStats::parse("  7 1 56 4 5 2 40 3 1 6 8 3 0 24 1 2 9\n");
        assert_eq!((stats.reads, stats.read_bytes, stats.writes, stats.written_bytes), (7, 28672, 5, 20480));
        assert_eq!((stats.in_flight, stats.discards, stats.flushes), (1, 3, 2));
        assert_eq!((stats.transfer_ms, stats.busy_ms, stats.queued_ms), (7, 6, 8));
        assert_eq!(BlockStats::parse(""), BlockStats::default());
    }
}
