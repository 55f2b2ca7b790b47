//! One io_uring, as the data path uses it: fixed files, registered buffers, one enter a round.
//!
//! Knows submissions and completions. Does not know what they are for: no device, no image, no
//! request. Not `Send` in spirit: made, used and dropped by one worker.

pub mod buffers;
mod enter;
pub mod files;
pub mod inflight;
pub mod setup;
pub mod token;

use std::os::fd::RawFd;

use enter::RingName;
use io_uring::{IoUring, cqueue, squeue};

pub use buffers::{ArrivalBuffers, BufferSlots};
pub use inflight::InFlight;
pub use setup::Sizes;
pub use token::{SlotId, Step, Token};

use crate::error::{Error, Kind, Result};
use files::FileTable;

/// One io_uring with its tables.
///
/// Field order is drop order: the io_uring goes before the memory it was given.
pub struct Ring {
    io: IoUring,
    name: RingName,
    /// Who the thread was when the ring was made, if that was asked for.
    personality: Option<u16>,
    files: FileTable,
    /// Which registered buffers are whose.
    pub buffers: BufferSlots,
    /// Where the kernel writes arrivals.
    pub arrivals: ArrivalBuffers,
    /// CQEs taken from the kernel and not yet looked at.
    drained: Vec<cqueue::Entry>,
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ring").finish_non_exhaustive()
    }
}

impl Ring {
    /// Makes a ring for the calling thread; a `privileged` one remembers what the thread may now.
    pub fn new(sizes: &Sizes, privileged: bool) -> Result<Ring> {
        let (io, personality, files, arrivals) = setup::make(sizes, privileged)?;
        let name = RingName::of(&io);
        let drained = Vec::with_capacity(io.params().cq_entries() as usize);
        let buffers = BufferSlots::new(sizes.buffers);
        Ok(Ring { io, name, personality, files, buffers, arrivals, drained })
    }

    /// The same submission, made with what the thread could do when the ring was made.
    pub fn privileged(&self, entry: squeue::Entry) -> squeue::Entry {
        match self.personality {
            Some(personality) => entry.personality(personality),
            None => entry,
        }
    }

    /// Puts `file` at `place` of the file table.
    pub fn set_file(&mut self, place: u32, file: RawFd) -> Result<()> {
        self.files.set(&self.io, place, file)
    }

    /// Empties `place` of the file table. Nothing that is in flight may be about it.
    pub fn clear_file(&mut self, place: u32) -> Result<()> {
        self.files.clear(&self.io, place)
    }

    /// Queues one submission. Whatever memory it names must stay valid until its completion, or,
    /// where it has none on success, until what it stands for is known to have ended.
    pub fn push(&mut self, entry: &squeue::Entry) -> Result<()> {
        self.push_chain(std::slice::from_ref(entry))
    }

    /// Queues submissions that belong together (a chain of links) and must not be torn apart.
    pub fn push_chain(&mut self, entries: &[squeue::Entry]) -> Result<()> {
        match entries {
            _ if !self.files.by_descriptor() => self.queue(entries),
            [one] => self.queue(&[self.files.resolve(one)]),
            [one, two] => self.queue(&[self.files.resolve(one), self.files.resolve(two)]),
            _ => Err(Error::new(Kind::Internal, "chains are of two")),
        }
    }

    fn queue(&mut self, entries: &[squeue::Entry]) -> Result<()> {
        // SAFETY: the callers (worker and frontend) keep buffers and command elements alive as
        // documented above: a device's memory is dropped only after its queue was drained.
        if unsafe { self.io.submission().push_multiple(entries) }.is_ok() {
            return Ok(());
        }
        // Full: make room, without waiting for anything.
        self.enter(0)?;
        // SAFETY: as above.
        unsafe { self.io.submission().push_multiple(entries) }
            .map_err(|_| Error::new(Kind::Internal, "submission queue full after submitting"))
    }

    /// Submits everything queued and waits for `want` completions.
    pub fn enter(&mut self, want: usize) -> Result<()> {
        loop {
            let queue = self.io.submission();
            let (queued, events) = (queue.len() as u32, queue.taskrun() || queue.cq_overflow());
            drop(queue);
            let error = match self.name.enter(queued, want as u32, events) {
                Ok(submitted) if submitted == queued => return Ok(()),
                // The kernel stopped half-way, perhaps within a chain: what follows would run
                // without what it must wait for.
                Ok(_) => {
                    return Err(Error::new(Kind::Internal, "the kernel took only a part of a submission"));
                }
                Err(error) => error,
            };
            match error.raw_os_error() {
                // EBUSY: completions have overflowed; this very call flushes them, and the caller
                // drains them. EAGAIN: the kernel is out of requests for the moment.
                Some(libc::EBUSY | libc::EAGAIN) => return Ok(()),
                Some(libc::EINTR) => continue,
                _ => return Err(Error::os(error, "io_uring_enter")),
            }
        }
    }

    /// Whether completions, or work that leads to them, are there without waiting.
    pub fn ready(&mut self) -> bool {
        !self.io.completion().is_empty() || self.io.submission().taskrun()
    }

    /// Whether anything is queued that the kernel has not seen.
    pub fn has_unsubmitted(&mut self) -> bool {
        !self.io.submission().is_empty()
    }

    /// Takes all completions that are there. Give the vector back with [`Ring::recycle`].
    pub fn drain(&mut self) -> Vec<cqueue::Entry> {
        let mut drained = std::mem::take(&mut self.drained);
        drained.extend(self.io.completion());
        drained
    }

    /// Takes the vector of [`Ring::drain`] back, so that the next drain allocates nothing.
    pub fn recycle(&mut self, mut drained: Vec<cqueue::Entry>) {
        drained.clear();
        self.drained = drained;
    }
}
