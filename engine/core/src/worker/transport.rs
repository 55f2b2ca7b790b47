// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The interface between the worker and a frontend's queue.
//!
//! Knows requests, completions and the ring. Each frontend implements it; the worker never learns
//! which driver it uses.

use std::os::fd::RawFd;

use io_uring::{cqueue, squeue, types};

use crate::error::Result;
use crate::request::{Completion, Request, Tag};
use crate::ring::{Ring, SlotId, Token};

/// The slot of one queue of one device on its worker's ring.
#[derive(Clone, Copy, Debug)]
pub struct QueueSlot {
    /// Slot and generation.
    pub id: SlotId,
}

impl QueueSlot {
    /// Fixed file of the frontend.
    pub fn frontend_file(self) -> types::Fixed {
        types::Fixed(1 + 2 * u32::from(self.id.index))
    }

    /// Fixed file of the image.
    pub fn image_file(self) -> types::Fixed {
        types::Fixed(2 + 2 * u32::from(self.id.index))
    }
}

/// Location of a request's data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Data {
    /// Start of the registered buffer with this index.
    Registered(u16),
    /// Memory of the frontend at this address, valid until the request is committed.
    Memory(usize),
}

/// One queue of a frontend's device.
///
/// The worker calls `arm` once and `on_event` for every completion of the frontend. It calls
/// `complete` once per request, and `submit_commits` at the end of every round in which it called
/// `complete`. It drops the transport only after `is_drained`.
pub trait Transport: Send + 'static {
    /// The file that delivers requests and takes commits.
    fn file(&self) -> RawFd;

    /// Tags: 0 .. depth.
    fn depth(&self) -> u16;

    /// Asks the driver for requests. Called once the files are registered.
    fn arm(&mut self, queue_slot: QueueSlot, ring: &mut Ring) -> Result<()>;

    /// Handles a completion of the frontend. Appends the requests that arrived with it to
    /// `arrived`.
    fn on_event(
        &mut self,
        token: Token,
        entry: &cqueue::Entry,
        ring: &mut Ring,
        arrived: &mut Vec<Request>,
    ) -> Result<()>;

    /// Location of the data of a request in flight.
    fn data(&self, tag: Tag) -> Data;

    /// Completes a request; may defer the commit to `submit_commits`.
    fn complete(&mut self, completion: Completion, ring: &mut Ring) -> Result<()>;

    /// Commits what `complete` collected. Returns how many CQEs this adds at once: the worker does
    /// not let them end its sleep.
    fn submit_commits(&mut self, ring: &mut Ring) -> Result<usize>;

    /// The submission that completes `tag` with `len` bytes, to be linked to the transfer of these
    /// bytes; none if that is impossible now.
    fn linked_commit(&mut self, tag: Tag, len: u32) -> Option<squeue::Entry>;

    /// The driver has ended this queue, and nothing of it is in flight.
    fn is_drained(&self) -> bool;

    /// Number of requests whose buffer the worker had to register.
    fn fallbacks(&self) -> u64;

    /// Requests wait for a free buffer slot of the ring.
    fn is_waiting_for_buffer(&self) -> bool;

    /// Retries the requests that wait for a buffer slot.
    fn retry_waiting(&mut self, ring: &mut Ring) -> Result<()>;
}
