// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How changes become durable: which writes are durable themselves, and where a queue runs an
//! fdatasync, on the worker's own thread or on one of io_uring's.
//!
//! Only speed depends on these choices; `Durability` and `FlushQueue` decide what a flush must wait
//! for.

use super::{ActiveRequest, DeviceQueue};
use crate::request::{Op, Request};
use crate::worker::transport::Transport;

/// An fdatasync on one of io_uring's threads that takes less than this, wake-ups included, may run on
/// the worker the next time.
const FAST_ASYNC_NS: u64 = 100_000;
/// The worker goes on with that as long as its own take less than this.
const FAST_INLINE_NS: u64 = 50_000;
/// So many flushes are left to io_uring after a slow one.
const SLOW_FLUSHES: u32 = 64;

impl<T: Transport> DeviceQueue<T> {
    /// Tells the image's `Durability` of a request. Returns it, or a durable write in its place.
    pub(super) fn count_change(&self, request: Request, rejected: bool) -> Request {
        let durability = self.image.durability();
        match request.op {
            Op::Flush => durability.on_flush(),
            _ if rejected => {}
            Op::Write { fua } if fua || self.geometry.durable_writes || durability.expects_flush() => {
                durability.begin_durable();
                return Request { op: Op::Write { fua: true }, ..request };
            }
            // No flush follows.
            Op::WriteZeroes { unmap, .. } if self.geometry.durable_writes => {
                durability.begin();
                return Request { op: Op::WriteZeroes { unmap, fua: true }, ..request };
            }
            op if op.is_plain_change() => durability.begin(),
            _ => {}
        }
        request
    }

    /// The end of a request that `count_change` has counted.
    pub(super) fn end_plain(&self, active: &ActiveRequest) {
        if active.plain {
            self.image.durability().end();
        }
    }
}

/// The times of the fdatasyncs of one queue.
#[derive(Debug, Default)]
pub(super) struct SyncPolicy {
    is_fast: bool,
    /// Flushes before the next attempt on the worker.
    slow: u32,
    /// When the fdatasync in flight was submitted.
    submitted_ns: u64,
}

impl SyncPolicy {
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
