//! Few large punches for many small discards.
//!
//! Pure bookkeeping of one queue of a device: knows ranges and tags, not files.

use std::vec::Drain;

use crate::request::Tag;

/// A discard that waits.
#[derive(Clone, Copy, Debug)]
struct Pending {
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
    /// Bytes, a multiple of the granularity. 0: the discards fill no block, so there is nothing
    /// to do; call [`DiscardQueue::done`] at once and complete its tags with success.
    pub len: u64,
}

/// Discards of one queue, merged while they wait for the one that is in flight.
///
/// fallocate waits for all I/O on the file and keeps new I/O out, so one at a time, and as large
/// as possible. Merging comes before the cutting to whole blocks: a block half in one discard and
/// half in the next is freed too.
///
/// The cycle: `push`..., `next` → punch, `done` → tags, `next`... Every tag pushed comes out of
/// `done` exactly once.
#[derive(Debug)]
pub struct DiscardQueue {
    granularity: u64,
    /// By `start`.
    pending: Vec<Pending>,
    in_flight: Vec<Tag>,
    arrived: u64,
}

impl DiscardQueue {
    /// For a queue of this depth over a file with this discard granularity in bytes (0 counts
    /// as 1). Never allocates afterwards.
    pub fn new(depth: u16, granularity: u32) -> Self {
        Self {
            granularity: u64::from(granularity.max(1)),
            pending: Vec::with_capacity(depth.into()),
            in_flight: Vec::with_capacity(depth.into()),
            arrived: 0,
        }
    }

    /// A discard of `len` bytes at `offset` **of the file** arrived: the file's blocks are what
    /// the granularity is about.
    pub fn push(&mut self, tag: Tag, offset: u64, len: u64) {
        debug_assert!(self.pending.len() < self.pending.capacity());
        let at = self.pending.partition_point(|p| p.start <= offset);
        self.arrived += 1;
        let pending = Pending { start: offset, end: offset.saturating_add(len), number: self.arrived, tag };
        self.pending.insert(at, pending);
    }

    /// The next range to punch: that of the oldest discard and of all that touch it. It is in
    /// flight from now on, until [`done`](Self::done); none while one is.
    #[must_use = "the punch counts as in flight until `done`"]
    #[expect(clippy::should_implement_trait, reason = "not an iterator: `done` comes between")]
    pub fn next(&mut self) -> Option<Punch> {
        if self.in_flight() {
            return None;
        }
        let run = self.oldest_run()?;
        let start = self.pending[run.first].start;
        let tags = self.pending.drain(run.first..run.behind).map(|p| p.tag);
        self.in_flight.extend(tags);
        // Inwards, so that only bytes which were asked for are lost.
        let offset = start.checked_next_multiple_of(self.granularity);
        let end = run.end - run.end % self.granularity;
        let punch = offset.filter(|offset| *offset < end);
        Some(punch.map_or(Punch { offset: 0, len: 0 }, |offset| Punch { offset, len: end - offset }))
    }

    /// Among the runs of discards that touch each other, the one with the oldest discard.
    fn oldest_run(&self) -> Option<Run> {
        let mut oldest: Option<Run> = None;
        let mut current: Option<Run> = None;
        for (i, p) in self.pending.iter().enumerate() {
            let run = match current {
                Some(run) if p.start <= run.end => {
                    Run { behind: i + 1, end: run.end.max(p.end), number: run.number.min(p.number), ..run }
                }
                _ => Run { first: i, behind: i + 1, end: p.end, number: p.number },
            };
            // A run that grew replaces its former self: its number is the same or lower.
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

    /// Nothing waits and nothing is in flight.
    pub fn is_empty(&self) -> bool {
        self.pending.is_empty() && self.in_flight.is_empty()
    }

    /// The punch ended: the discards that its result answers. Ask [`next`](Self::next) again.
    pub fn done(&mut self) -> Drain<'_, Tag> {
        self.in_flight.drain(..)
    }
}

/// Discards `first .. behind` of those that wait: each touches the ones before it.
#[derive(Clone, Copy, Debug)]
struct Run {
    first: usize,
    behind: usize,
    /// Where the union of their ranges ends.
    end: u64,
    /// The oldest one's.
    number: u64,
}
