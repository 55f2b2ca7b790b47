// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Whether all that was written to a file is durable.
//!
//! Counts plain modifications: those that are not durable when they end. If none has begun since a
//! moment at which all had ended and an fdatasync started that succeeded, a flush has nothing to do.
//! Shared by everything that writes the file for one device: its queues, its partitions, an image
//! that replaces another one of the same file. Knows counts, not files.

use std::sync::atomic::{AtomicU64, Ordering};

/// Groups of queues with counters of their own, so that workers do not share cache lines.
const SHARDS: usize = 8;
/// A number that no count of modifications reaches.
const NEVER: u64 = u64::MAX;

#[derive(Debug, Default)]
#[repr(align(64))]
struct Shard {
    begun: AtomicU64,
    ended: AtomicU64,
}

/// See the module.
#[derive(Debug)]
pub struct Durability {
    shards: [Shard; SHARDS],
    /// The modifications that had begun by the last durable moment; at first, the file may have others.
    durable: AtomicU64,
}

impl Default for Durability {
    fn default() -> Self {
        Self { shards: Default::default(), durable: AtomicU64::new(NEVER) }
    }
}

/// A moment at which no plain modification was in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QuietMoment(u64);

impl Durability {
    /// A plain modification begins. Call it before the modification is submitted.
    pub fn begin(&self, queue: u16) {
        self.shards[usize::from(queue) % SHARDS].begun.fetch_add(1, Ordering::SeqCst);
    }

    /// It has ended. Call it before its request is completed.
    pub fn end(&self, queue: u16) {
        self.shards[usize::from(queue) % SHARDS].ended.fetch_add(1, Ordering::SeqCst);
    }

    /// Whether a flush that arrives now has nothing to do.
    pub fn is_durable(&self) -> bool {
        let durable = self.durable.load(Ordering::SeqCst);
        self.begun() == durable
    }

    /// Call it before an fdatasync starts. None: a plain modification is in flight, and may end too
    /// late for that fdatasync.
    pub fn quiet_moment(&self) -> Option<QuietMoment> {
        // In this order: no count of ends then includes one whose beginning is not counted. Equal
        // sums mean that between both reads nothing was in flight.
        let ended: u64 = self.shards.iter().map(|shard| shard.ended.load(Ordering::SeqCst)).sum();
        (self.begun() == ended).then_some(QuietMoment(ended))
    }

    /// An fdatasync that started after this moment has succeeded.
    pub fn set_durable(&self, moment: QuietMoment) {
        self.durable.store(moment.0, Ordering::SeqCst);
    }

    fn begun(&self) -> u64 {
        self.shards.iter().map(|shard| shard.begun.load(Ordering::SeqCst)).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flush_has_nothing_to_do_only_after_a_successful_sync() {
        let file = Durability::default();
        assert!(!file.is_durable(), "nobody knows what was written before");
        let moment = file.quiet_moment().unwrap();
        file.set_durable(moment);
        assert!(file.is_durable());
        file.begin(0);
        assert!(!file.is_durable() && file.quiet_moment().is_none());
        file.end(0);
        assert!(!file.is_durable());
        let moment = file.quiet_moment().unwrap();
        // The sync fails: nothing changes. The next one succeeds, but a write has begun meanwhile.
        file.begin(9);
        file.set_durable(moment);
        assert!(!file.is_durable());
        file.end(9);
        assert!(!file.is_durable());
        file.set_durable(file.quiet_moment().unwrap());
        assert!(file.is_durable());
    }

    #[test]
    fn a_write_on_any_queue_counts() {
        let file = Durability::default();
        for queue in [0, 1, 7, 8, 300] {
            file.begin(queue);
            assert!(file.quiet_moment().is_none(), "{queue}");
            file.end(queue);
            file.set_durable(file.quiet_moment().unwrap());
            assert!(file.is_durable());
        }
    }
}
