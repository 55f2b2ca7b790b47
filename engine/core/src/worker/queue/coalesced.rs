// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Operations that complete several requests: flushes and discards.
//!
//! Each queue has at most one of each kind in flight. Requests that arrive meanwhile wait for the
//! next one. `FlushQueue` and `DiscardQueue` decide which requests share an operation.

use std::time::Instant;

use super::{DeviceQueue, RETRIES};
use crate::error::Result;
use crate::ring::{EventKind, Ring};
use crate::worker::RoundClock;
use crate::worker::translate;
use crate::worker::transport::Transport;

impl<T: Transport> DeviceQueue<T> {
    /// Whether to retry an interrupted operation of the whole queue.
    fn may_retry(&mut self, result: i32) -> bool {
        let interrupted = matches!(result.wrapping_neg(), libc::EAGAIN | libc::EINTR);
        self.coalesced_retries = if interrupted { self.coalesced_retries.saturating_add(1) } else { 0 };
        self.stats.resubmits += u64::from(interrupted);
        interrupted && self.coalesced_retries <= RETRIES
    }

    /// Starts an fdatasync for all waiting flushes, unless one is in flight. Called at the end of a
    /// round: one fdatasync then serves all flushes of the round. `worker_is_idle`: no other queue of
    /// the worker has a request in flight.
    pub fn start_flush(
        &mut self,
        worker_is_idle: impl FnOnce() -> bool,
        ring: &mut Ring,
        clock: &RoundClock,
    ) -> Result<()> {
        let flushes = self.flushes.waiting();
        if !self.flushes.start() {
            return Ok(());
        }
        let durability = self.image.durability();
        if durability.is_durable() {
            return self.complete_flushes(0, ring, clock);
        }
        self.quiet_moment = durability.quiet_moment();
        // Nobody waits for the worker, and recent ones were faster than a switch to another thread.
        let alone = self.busy() == flushes && self.sync.may_block_worker() && !self.image.may_block();
        if alone && worker_is_idle() {
            let start = Instant::now();
            let result = rustix::fs::fdatasync(self.image.fd());
            self.sync.blocked_worker(start.elapsed().as_nanos() as u64);
            return self.on_synced(result.map_or_else(|errno| -errno.raw_os_error(), |()| 0), ring, clock);
        }
        self.stats.punts += 1;
        self.sync.submitted(clock.now_ns());
        self.push_sync(ring)
    }

    fn push_sync(&self, ring: &mut Ring) -> Result<()> {
        ring.push(&self.token(translate::sync(self.queue_slot.image_file()), EventKind::Flush, 0))
    }

    pub(super) fn on_flush(&mut self, result: i32, ring: &mut Ring, clock: &RoundClock) -> Result<()> {
        if self.may_retry(result) {
            return self.push_sync(ring);
        }
        self.sync.ended(clock.now_ns());
        self.on_synced(result, ring, clock)
    }

    /// Completes an fdatasync, and its flushes.
    fn on_synced(&mut self, result: i32, ring: &mut Ring, clock: &RoundClock) -> Result<()> {
        if let (0, Some(moment)) = (result, self.quiet_moment.take()) {
            self.image.durability().set_durable(moment);
        }
        self.stats.syncs += 1;
        self.complete_flushes(result, ring, clock)
    }

    fn complete_flushes(&mut self, result: i32, ring: &mut Ring, clock: &RoundClock) -> Result<()> {
        self.completed_tags.extend(self.flushes.done());
        self.complete_all(result, ring, clock)
    }

    /// Punches the next hole for adjacent discards, unless one is being punched.
    pub(super) fn start_punch(&mut self, ring: &mut Ring, clock: &RoundClock) -> Result<()> {
        while let Some(punch) = self.discards.next() {
            if punch.len > 0 {
                self.stats.punts += 1;
                self.punch = Some((punch.offset, punch.len));
                return self.push_punch(punch.offset, punch.len, ring);
            }
            // Less than a block: nothing to free.
            self.completed_tags.extend(self.discards.done());
            self.complete_all(0, ring, clock)?;
        }
        Ok(())
    }

    fn push_punch(&self, offset: u64, len: u64, ring: &mut Ring) -> Result<()> {
        let entry = translate::punch(self.queue_slot.image_file(), offset, len);
        ring.push(&self.token(entry, EventKind::Punch, 0))
    }

    pub(super) fn on_punch(&mut self, result: i32, ring: &mut Ring, clock: &RoundClock) -> Result<()> {
        if let (true, Some((offset, len))) = (self.may_retry(result), self.punch) {
            return self.push_punch(offset, len, ring);
        }
        self.completed_tags.extend(self.discards.done());
        self.complete_all(result, ring, clock)?;
        self.start_punch(ring, clock)
    }

    fn complete_all(&mut self, result: i32, ring: &mut Ring, clock: &RoundClock) -> Result<()> {
        while let Some(tag) = self.completed_tags.pop() {
            self.complete(tag, result, ring, clock)?;
        }
        Ok(())
    }
}
