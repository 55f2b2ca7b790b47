// SPDX-License-Identifier: Apache-2.0 OR MIT
//! One io_uring of the data path: fixed files, registered buffers, one enter per round.
//!
//! Knows submissions and completions. Does not know devices, images or requests. One worker
//! creates, uses and drops it.

pub mod buffers;
mod enter;
pub mod files;
pub mod inflight;
pub mod setup;
mod slot_allocator;
pub mod token;

use std::os::fd::RawFd;
use std::time::Duration;

use enter::RingHandle;
use io_uring::{IoUring, cqueue, squeue};

pub use buffers::{ArrivalBuffers, BufferSlots};
pub use inflight::InFlight;
pub use setup::RingSizes;
pub use slot_allocator::SlotAllocator;
pub use token::{EventKind, SlotId, Token};

use crate::error::{Error, Kind, Result};
use files::FileTable;

/// One io_uring with its tables.
///
/// Field order is drop order: the io_uring is dropped before its memory.
pub struct Ring {
    io: IoUring,
    name: RingHandle,
    /// Credentials of the creating thread, if requested.
    personality: Option<u16>,
    files: FileTable,
    /// Allocation of registered buffers.
    pub buffers: BufferSlots,
    /// Buffers for arriving tags.
    pub arrivals: ArrivalBuffers,
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ring").finish_non_exhaustive()
    }
}

impl Ring {
    /// Creates a ring for the calling thread. A `privileged` one keeps the thread's present
    /// credentials.
    pub fn new(sizes: &RingSizes, privileged: bool) -> Result<Ring> {
        let (io, personality, files, arrivals) = setup::create(sizes, privileged)?;
        let name = RingHandle::of(&io);
        let buffers = BufferSlots::new(sizes.buffers);
        Ok(Ring { io, name, personality, files, buffers, arrivals })
    }

    /// The same submission with the credentials kept at creation.
    pub fn privileged(&self, entry: squeue::Entry) -> squeue::Entry {
        match self.personality {
            Some(personality) => entry.personality(personality),
            None => entry,
        }
    }

    /// Stores `file` at `index` of the file table.
    pub fn set_file(&mut self, index: u32, file: RawFd) -> Result<()> {
        self.files.set(&self.io, index, file)
    }

    /// Clears `index` of the file table. Nothing in flight may use it.
    pub fn clear_file(&mut self, index: u32) -> Result<()> {
        self.files.clear(&self.io, index)
    }

    /// Queues one submission. Memory that it names must stay valid until its completion; without a
    /// completion on success, until the operation is known to have ended.
    pub fn push(&mut self, entry: &squeue::Entry) -> Result<()> {
        self.push_chain(std::slice::from_ref(entry))
    }

    /// Queues submissions that belong together (a chain of links) and must not be torn apart.
    pub fn push_chain(&mut self, entries: &[squeue::Entry]) -> Result<()> {
        match entries {
            _ if !self.files.by_descriptor() => self.queue(entries),
            [one] => self.queue(&[self.files.resolve(one)]),
            [one, two] => self.queue(&[self.files.resolve(one), self.files.resolve(two)]),
            _ => Err(Error::new(Kind::Internal, "a chain has more than two entries")),
        }
    }

    fn queue(&mut self, entries: &[squeue::Entry]) -> Result<()> {
        // SAFETY: the callers (worker and frontend) keep buffers and command elements alive as
        // documented above: a device's memory is dropped only after its queue was drained.
        if unsafe { self.io.submission().push_multiple(entries) }.is_ok() {
            return Ok(());
        }
        // Full: submit without waiting.
        self.enter(0)?;
        // SAFETY: as above.
        unsafe { self.io.submission().push_multiple(entries) }
            .map_err(|_| Error::new(Kind::Internal, "the submission queue is full after a submit"))
    }

    /// Submits everything queued and waits for `want` completions.
    pub fn enter(&mut self, want: usize) -> Result<()> {
        self.enter_within(want, None)
    }

    /// The same, with a timeout.
    pub fn enter_within(&mut self, want: usize, timeout: Option<Duration>) -> Result<()> {
        loop {
            let queued = self.io.submission().len() as u32;
            let submitted = match timeout {
                None => self.name.enter(queued, want as u32),
                Some(timeout) => self.name.enter_within(queued, want as u32, timeout),
            };
            let error = match submitted {
                Ok(submitted) if submitted == queued => return Ok(()),
                // The kernel stopped early, perhaps within a chain: later entries would run out of
                // order.
                Ok(_) => {
                    return Err(Error::new(Kind::Internal, "the kernel accepted only part of a submission"));
                }
                Err(error) => error,
            };
            match error.raw_os_error() {
                // ETIME: nothing was queued, and the timeout has passed.
                Some(libc::ETIME) => return Ok(()),
                // EBUSY: completions have overflowed; this very call flushes them, and the caller
                // drains them. EAGAIN: the kernel is out of requests for the moment.
                Some(libc::EBUSY | libc::EAGAIN) => return Ok(()),
                Some(libc::EINTR) => continue,
                _ => return Err(Error::os(error, "io_uring_enter")),
            }
        }
    }

    /// Takes the next completion.
    pub fn next_completion(&mut self) -> Option<cqueue::Entry> {
        self.io.completion().next()
    }
}
