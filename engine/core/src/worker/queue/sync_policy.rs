// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How a queue makes writes durable: with the write itself, on the worker's own thread, or on one of
//! io_uring's.
//!
//! Only speed depends on these choices; `Durability` and `FlushQueue` decide what a flush must wait
//! for. Knows the requests and the times of one queue.

use crate::request::Op;

/// After so many flushes in a row with at most one write each, the next lone write is durable itself.
const STREAK: u32 = 4;
/// An fdatasync on one of io_uring's threads that takes less than this, wake-ups included, may run on
/// the worker the next time.
const FAST_ASYNC_NS: u64 = 100_000;
/// The worker goes on with that as long as its own take less than this.
const FAST_INLINE_NS: u64 = 50_000;
/// So many flushes are left to io_uring after a slow one.
const SLOW_FLUSHES: u32 = 64;

/// See the module.
#[derive(Debug, Default)]
pub(super) struct SyncPolicy {
    /// Writes since the last flush.
    writes: u32,
    /// Flushes in a row with at most one write before each.
    streak: u32,
    is_fast: bool,
    /// Flushes before the next attempt on the worker.
    slow: u32,
    /// When the fdatasync in flight was submitted.
    submitted_ns: u64,
}

impl SyncPolicy {
    /// Counts an operation. Returns it, or a durable write in place of a write that a flush is likely
    /// to follow.
    pub(super) fn predict(&mut self, op: Op) -> Op {
        match op {
            Op::Write { fua } => {
                self.writes = self.writes.saturating_add(1);
                Op::Write { fua: fua || self.streak >= STREAK && self.writes == 1 }
            }
            Op::Flush => {
                self.streak = if self.writes <= 1 { self.streak.saturating_add(1) } else { 0 };
                self.writes = 0;
                op
            }
            Op::Discard | Op::WriteZeroes { .. } | Op::Reserve => {
                self.streak = 0;
                op
            }
            Op::Read | Op::Unknown(_) => op,
        }
    }

    /// Whether the next fdatasync may run on the worker, if nothing else has to.
    pub(super) fn may_block_worker(&self) -> bool {
        self.is_fast && self.slow == 0
    }

    /// An fdatasync is submitted to the ring.
    pub(super) fn submitted(&mut self, now_ns: u64) {
        self.submitted_ns = now_ns;
        self.slow = self.slow.saturating_sub(1);
    }

    /// That fdatasync has ended.
    pub(super) fn ended(&mut self, now_ns: u64) {
        self.is_fast = now_ns.saturating_sub(self.submitted_ns) < FAST_ASYNC_NS;
    }

    /// One that ran on the worker took this long.
    pub(super) fn blocked_worker(&mut self, ns: u64) {
        if ns >= FAST_INLINE_NS {
            self.slow = SLOW_FLUSHES;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Op = Op::Write { fua: false };
    const DURABLE: Op = Op::Write { fua: true };

    #[test]
    fn a_lone_write_is_durable_after_flushes_in_a_row() {
        let mut policy = SyncPolicy::default();
        for _ in 0..STREAK {
            assert_eq!(policy.predict(PLAIN), PLAIN);
            assert_eq!(policy.predict(Op::Flush), Op::Flush);
        }
        assert_eq!(policy.predict(PLAIN), DURABLE);
        assert_eq!(policy.predict(PLAIN), PLAIN, "the second one before the flush");
        policy.predict(Op::Flush);
        assert_eq!(policy.predict(PLAIN), PLAIN, "two writes before a flush end the row");
        assert_eq!(policy.predict(DURABLE), DURABLE);
    }

    #[test]
    fn only_fast_ones_block_the_worker() {
        let mut policy = SyncPolicy::default();
        assert!(!policy.may_block_worker(), "nothing is known");
        policy.submitted(1_000_000);
        policy.ended(1_000_000 + FAST_ASYNC_NS);
        assert!(!policy.may_block_worker());
        policy.submitted(2_000_000);
        policy.ended(2_000_000 + FAST_ASYNC_NS - 1);
        assert!(policy.may_block_worker());
        policy.blocked_worker(FAST_INLINE_NS - 1);
        assert!(policy.may_block_worker());
        policy.blocked_worker(FAST_INLINE_NS);
        for _ in 0..SLOW_FLUSHES {
            assert!(!policy.may_block_worker());
            policy.submitted(0);
            policy.ended(1);
        }
        assert!(policy.may_block_worker());
    }
}
