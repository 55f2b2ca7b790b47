//! What the worker asks of a frontend's queue: the other side of the data path.
//!
//! Knows requests, completions and the ring. A frontend brings an implementation; the worker
//! never learns which driver is behind it.

use std::os::fd::RawFd;

use io_uring::{cqueue, squeue, types};

use crate::error::Result;
use crate::request::{Completion, Request, Tag};
use crate::ring::{Ring, SlotId, Token};

/// Where one queue of one device stands on its worker's ring.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    /// Its slot.
    pub slot: SlotId,
}

impl Place {
    /// Fixed file of the frontend's side.
    pub fn frontend(self) -> types::Fixed {
        types::Fixed(1 + 2 * u32::from(self.slot.index))
    }

    /// Fixed file of the image.
    pub fn image(self) -> types::Fixed {
        types::Fixed(2 + 2 * u32::from(self.slot.index))
    }
}

/// Where a request's data is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Data {
    /// In the registered buffer of this number, from its start.
    Registered(u16),
    /// In memory of the frontend's, from this address; valid until the request is committed.
    Memory(usize),
}

/// One queue of a frontend's device.
///
/// The worker calls `arm` once, then `on_event` for every completion whose step is the frontend's,
/// `complete` once for each request, and `flush` at the end of every round in which it called
/// `complete`. It drops the transport only after `is_gone`.
pub trait Transport: Send + 'static {
    /// The file that requests come from and completions go to.
    fn file(&self) -> RawFd;

    /// Tags: 0 .. depth.
    fn depth(&self) -> u16;

    /// Asks for requests. Called when the files are in place.
    fn arm(&mut self, place: Place, ring: &mut Ring) -> Result<()>;

    /// Takes a completion of the frontend's own; adds what arrived with it to `arrived`.
    fn on_event(
        &mut self,
        token: Token,
        entry: &cqueue::Entry,
        ring: &mut Ring,
        arrived: &mut Vec<Request>,
    ) -> Result<()>;

    /// Where the data of a request that is in flight is.
    fn data(&self, tag: Tag) -> Data;

    /// Answers a request; may wait for `flush` to do so.
    fn complete(&mut self, completion: Completion, ring: &mut Ring) -> Result<()>;

    /// Sends the answers that `complete` has collected. Returns how many completions this adds
    /// to the ring at once: the worker does not let them end its sleep.
    fn flush(&mut self, ring: &mut Ring) -> Result<usize>;

    /// The submission that answers `tag` with `len` bytes, to be chained to the transfer of these
    /// bytes; none where that is impossible now.
    fn linked_commit(&mut self, tag: Tag, len: u32) -> Option<squeue::Entry>;

    /// The driver has ended this queue, and nothing of it is in flight.
    fn is_gone(&self) -> bool;

    /// Requests whose buffer had to be registered by hand.
    fn fallbacks(&self) -> u64;

    /// Requests wait for a buffer slot of the ring, of which there is none.
    fn is_starved(&self) -> bool;

    /// Slots have come free: goes on with the requests that wait for one.
    fn retry_starved(&mut self, ring: &mut Ring) -> Result<()>;
}
