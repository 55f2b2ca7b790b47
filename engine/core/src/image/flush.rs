//! One fsync for many flushes.
//!
//! Pure bookkeeping of one queue of a device: knows tags, not files.

use std::vec::Drain;

use crate::request::Tag;

/// Flushes that wait, and those that the running fsync will answer.
///
/// A flush promises that whatever was completed before it is durable. An fsync that already runs
/// when the flush arrives may have passed by such writes, so the flush waits for the next one.
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

    /// A flush arrived.
    pub fn push(&mut self, tag: Tag) {
        debug_assert!(self.waiting.len() < self.waiting.capacity());
        self.waiting.push(tag);
    }

    /// Whether an fsync must be issued now. When true, all that wait have become its business.
    #[must_use = "when true, an fsync must be issued"]
    pub fn start(&mut self) -> bool {
        if self.in_flight() || self.waiting.is_empty() {
            return false;
        }
        std::mem::swap(&mut self.waiting, &mut self.in_flight);
        true
    }

    /// An fsync is running.
    pub fn in_flight(&self) -> bool {
        !self.in_flight.is_empty()
    }

    /// Nothing waits and nothing runs.
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty() && self.in_flight.is_empty()
    }

    /// The fsync ended: the flushes that its result answers. Ask [`start`](Self::start) again.
    pub fn done(&mut self) -> Drain<'_, Tag> {
        self.in_flight.drain(..)
    }
}
