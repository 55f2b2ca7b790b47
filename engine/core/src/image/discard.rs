// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Merges many small discards into few large hole punches.
//!
//! Pure bookkeeping for one queue of a device: knows ranges and tags, not files.

use std::vec::Drain;

use crate::request::Tag;

/// A pending discard.
#[derive(Clone, Copy, Debug)]
struct PendingDiscard {
    start: u64,
    end: u64,
    /// Order of arrival.
    number: u64,
    tag: Tag,
}

/// A range of the file to punch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Punch {
    /// First byte, a multiple of the granularity.
    pub offset: u64,
    /// Bytes, a multiple of the granularity. 0: the discards fill no block, so there is nothing to
    /// punch; call [`DiscardQueue::done`] and complete its tags with success.
    pub len: u64,
}

/// The discards of one queue, merged while one is in flight.
///
/// fallocate waits for all I/O on the file and blocks new I/O: issue one at a time, as large as
/// possible. Discards are merged before they are aligned to blocks, so a block split between two
/// adjacent discards is freed too.
///
/// The cycle is `push`..., `next` → punch, `done` → tags, `next`... `done` returns every pushed tag
/// exactly once.
#[derive(Debug)]
pub struct DiscardQueue {
    granularity: u64,
    /// By `start`.
    pending: Vec<PendingDiscard>,
    in_flight: Vec<Tag>,
    arrived: u64,
}

impl DiscardQueue {
    /// For a queue of this depth on a file with this discard granularity in bytes (0 counts as 1).
    /// Never allocates afterwards.
    pub fn new(depth: u16, granularity: u32) -> Self {
        Self {
            granularity: u64::from(granularity.max(1)),
            pending: Vec::with_capacity(depth.into()),
            in_flight: Vec::with_capacity(depth.into()),
            arrived: 0,
        }
    }

    /// Adds a discard of `len` bytes at `offset` **of the file**, to whose blocks the granularity
    /// applies.
    pub fn push(&mut self, tag: Tag, offset: u64, len: u64) {
        debug_assert!(self.pending.len() < self.pending.capacity());
        let at = self.pending.partition_point(|p| p.start <= offset);
        self.arrived += 1;
        let pending =
            PendingDiscard { start: offset, end: offset.saturating_add(len), number: self.arrived, tag };
        self.pending.insert(at, pending);
    }

    /// The next range to punch: that of the oldest discard and all adjacent ones. It is in flight
    /// until [`done`](Self::done); none while one is.
    #[must_use = "the punch counts as in flight until `done`"]
    #[expect(clippy::should_implement_trait, reason = "not an iterator: `done` comes between")]
    pub fn next(&mut self) -> Option<Punch> {
        if self.in_flight() {
            return None;
        }
        let run = self.oldest_run()?;
        let start = self.pending[run.first].start;
        let tags = self.pending.drain(run.first..run.end_index).map(|p| p.tag);
        self.in_flight.extend(tags);
        // Rounds inwards, so that only requested bytes are lost.
        let offset = start.checked_next_multiple_of(self.granularity);
        let end = run.end - run.end % self.granularity;
        let punch = offset.filter(|offset| *offset < end);
        Some(punch.map_or(Punch { offset: 0, len: 0 }, |offset| Punch { offset, len: end - offset }))
    }

    /// Of the runs of adjacent discards, the one with the oldest discard.
    fn oldest_run(&self) -> Option<Run> {
        let mut oldest: Option<Run> = None;
        let mut current: Option<Run> = None;
        for (i, p) in self.pending.iter().enumerate() {
            let run = match current {
                Some(run) if p.start <= run.end => {
                    Run { end_index: i + 1, end: run.end.max(p.end), number: run.number.min(p.number), ..run }
                }
                _ => Run { first: i, end_index: i + 1, end: p.end, number: p.number },
            };
            // A run that grew replaces itself: its number is the same or lower.
            if oldest.is_none_or(|oldest| oldest.first == run.first || run.number < oldest.number) {
                oldest = Some(run);
            }
            current = Some(run);
        }
        oldest
    }

    /// A punch is in flight.
    pub fn in_flight(&self) -> bool {
        !self.in_flight.is_empty()
    }

    /// No discard is pending or in flight.
    pub fn is_empty(&self) -> bool {
        self.pending.is_empty() && self.in_flight.is_empty()
    }

    /// Completes the punch: returns the discards that it covers. Call [`next`](Self::next) next.
    pub fn done(&mut self) -> Drain<'_, Tag> {
        self.in_flight.drain(..)
    }
}

/// Pending discards `first .. end_index`: each is adjacent to the ones before it.
#[derive(Clone, Copy, Debug)]
struct Run {
    first: usize,
    end_index: usize,
    /// End of the union of their ranges.
    end: u64,
    /// Number of the oldest one.
    number: u64,
}
