// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Coalesces flushes: one fdatasync completes many.
//!
//! Pure bookkeeping for one queue of a device: knows tags, not files.

use std::vec::Drain;

use crate::request::Tag;

/// Pending flushes, and those that the running fdatasync completes.
///
/// A flush guarantees that all writes completed before it are durable. An fsync that runs when the
/// flush arrives may miss such writes, so the flush waits for the next one.
#[derive(Debug)]
pub struct FlushQueue {
    waiting: Vec<Tag>,
    in_flight: Vec<Tag>,
}

impl FlushQueue {
    /// For a queue of this depth; never allocates afterwards.
    pub fn new(depth: u16) -> Self {
        Self { waiting: Vec::with_capacity(depth.into()), in_flight: Vec::with_capacity(depth.into()) }
    }

    /// Adds a flush.
    pub fn push(&mut self, tag: Tag) {
        debug_assert!(self.waiting.len() < self.waiting.capacity());
        self.waiting.push(tag);
    }

    /// Whether an fsync must be issued now. If so, it covers all pending flushes.
    #[must_use = "when true, an fsync must be issued"]
    pub fn start(&mut self) -> bool {
        if self.in_flight() || self.waiting.is_empty() {
            return false;
        }
        std::mem::swap(&mut self.waiting, &mut self.in_flight);
        true
    }

    /// Flushes that wait for the next fsync.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// An fsync is running.
    pub fn in_flight(&self) -> bool {
        !self.in_flight.is_empty()
    }

    /// No flush is pending or in flight.
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty() && self.in_flight.is_empty()
    }

    /// Completes the fsync: returns the flushes that it covers. Call [`start`](Self::start) next.
    pub fn done(&mut self) -> Drain<'_, Tag> {
        self.in_flight.drain(..)
    }
}
