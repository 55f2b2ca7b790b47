// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Whether all that was written to a file is durable.
//!
//! Counts plain modifications: those that are not durable when they end. If none has begun since a
//! moment at which all had ended and an fdatasync started that succeeded, a flush has nothing to do.
//! Also knows whether a flush is likely to follow each write: then a write is cheapest if it is durable
//! itself. That is a guess, and costs only time. Shared by everything that writes the file for one
//! device: its queues, its partitions, an image that replaces another one of the same file. Knows
//! counts, not files.

use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};

/// Groups of threads with counters of their own, so that workers do not share cache lines.
const SHARDS: usize = 8;
/// After so many flushes in a row with at most one change before each, a lone write is durable itself.
const ROW: u32 = 4;
/// A number that no count of modifications reaches.
const NEVER: u64 = u64::MAX;

static THREADS: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    static SHARD: usize = THREADS.fetch_add(1, Ordering::Relaxed) % SHARDS;
}

#[derive(Debug, Default)]
#[repr(align(64))]
struct Shard {
    begun: AtomicU64,
    ended: AtomicU64,
    /// Writes that are durable when they end.
    durable_writes: AtomicU64,
}

/// See the module.
#[derive(Debug)]
pub struct Durability {
    shards: [Shard; SHARDS],
    /// The modifications that had begun by the last durable moment; at first, the file may have others.
    durable: AtomicU64,
    /// Flushes in a row with at most one change before each.
    row: AtomicU32,
    /// All changes at the last flush.
    at_flush: AtomicU64,
}

impl Default for Durability {
    fn default() -> Self {
        Self {
            shards: Default::default(),
            durable: AtomicU64::new(NEVER),
            row: AtomicU32::new(0),
            at_flush: AtomicU64::new(0),
        }
    }
}

/// A moment at which no plain modification was in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QuietMoment(u64);

impl Durability {
    /// A plain modification begins. Call it before the modification is submitted.
    pub fn begin(&self) {
        self.shard().begun.fetch_add(1, Ordering::SeqCst);
    }

    /// It has ended. Call it before its request is completed.
    pub fn end(&self) {
        self.shard().ended.fetch_add(1, Ordering::SeqCst);
    }

    /// A write begins that is durable when it ends.
    pub fn begin_durable(&self) {
        self.shard().durable_writes.fetch_add(1, Ordering::Relaxed);
    }

    /// A flush has arrived.
    pub fn on_flush(&self) {
        let changes = self.changes();
        let since = changes.saturating_sub(self.at_flush.swap(changes, Ordering::Relaxed));
        let row = if since <= 1 { self.row.load(Ordering::Relaxed).saturating_add(1) } else { 0 };
        self.row.store(row, Ordering::Relaxed);
    }

    /// Whether the last flush came after at most one change.
    pub fn is_in_row(&self) -> bool {
        self.row.load(Ordering::Relaxed) > 0
    }

    /// Whether a write that arrives now is likely to be the only one before the next flush.
    pub fn expects_flush(&self) -> bool {
        // The first comparison is all that other patterns cost.
        self.row.load(Ordering::Relaxed) >= ROW && self.changes() == self.at_flush.load(Ordering::Relaxed)
    }

    fn changes(&self) -> u64 {
        let changes = |shard: &Shard| {
            shard.begun.load(Ordering::Relaxed) + shard.durable_writes.load(Ordering::Relaxed)
        };
        self.shards.iter().map(changes).sum()
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

    fn shard(&self) -> &Shard {
        &self.shards[SHARD.with(|shard| *shard)]
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
        file.begin();
        assert!(!file.is_durable() && file.quiet_moment().is_none());
        file.end();
        assert!(!file.is_durable());
        let moment = file.quiet_moment().unwrap();
        // The sync fails: nothing changes. The next one succeeds, but a write has begun meanwhile.
        file.begin();
        file.set_durable(moment);
        assert!(!file.is_durable());
        file.end();
        assert!(!file.is_durable());
        file.set_durable(file.quiet_moment().unwrap());
        assert!(file.is_durable());
    }

    #[test]
    fn a_lone_write_is_durable_after_flushes_in_a_row() {
        let file = Durability::default();
        for _ in 0..ROW {
            assert!(!file.expects_flush());
            file.begin();
            file.end();
            file.on_flush();
        }
        assert!(file.expects_flush());
        file.begin_durable();
        assert!(!file.expects_flush(), "the second one before the flush");
        file.on_flush();
        assert!(file.expects_flush());
        for _ in 0..2 {
            file.begin();
            file.end();
        }
        file.on_flush();
        assert!(!file.expects_flush(), "two writes before a flush end the row");
    }

    #[test]
    fn a_write_on_any_thread_counts() {
        let file = Durability::default();
        for _ in 0..2 * SHARDS {
            std::thread::scope(|scope| scope.spawn(|| file.begin()).join()).unwrap();
            assert!(file.quiet_moment().is_none());
            std::thread::scope(|scope| scope.spawn(|| file.end()).join()).unwrap();
            assert!(!file.is_durable());
            file.set_durable(file.quiet_moment().unwrap());
            assert!(file.is_durable());
        }
    }
}
