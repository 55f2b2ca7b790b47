//! One queue of a device of any frontend, as the worker sees it.
//!
//! One flat choice a call: what is behind it is decided once a device, and predicted ever after.

use std::os::fd::RawFd;

use io_uring::{cqueue, squeue};

use super::fuse::FuseQueue;
use super::ublk::{Batch, PerIo};
use crate::error::Result;
use crate::request::{Completion, Request, Tag};
use crate::ring::{Ring, Token};
use crate::worker::{Data, QueueSlot, Transport};

/// One of the three transports.
#[derive(Debug)]
pub enum Queue {
    /// ublk, one command a request.
    PerIo(PerIo),
    /// ublk, commands in batches.
    Batch(Batch),
    /// FUSE. Boxed, so that it makes the others no larger.
    Fuse(Box<FuseQueue>),
}

macro_rules! each {
    ($self:expr, $queue:ident => $call:expr) => {
        match $self {
            Queue::PerIo($queue) => $call,
            Queue::Batch($queue) => $call,
            Queue::Fuse($queue) => $call,
        }
    };
}

impl Transport for Queue {
    fn file(&self) -> RawFd {
        each!(self, queue => queue.file())
    }

    fn depth(&self) -> u16 {
        each!(self, queue => queue.depth())
    }

    fn arm(&mut self, queue_slot: QueueSlot, ring: &mut Ring) -> Result<()> {
        each!(self, queue => queue.arm(queue_slot, ring))
    }

    fn on_event(
        &mut self,
        token: Token,
        entry: &cqueue::Entry,
        ring: &mut Ring,
        arrived: &mut Vec<Request>,
    ) -> Result<()> {
        each!(self, queue => queue.on_event(token, entry, ring, arrived))
    }

    fn data(&self, tag: Tag) -> Data {
        each!(self, queue => queue.data(tag))
    }

    fn complete(&mut self, completion: Completion, ring: &mut Ring) -> Result<()> {
        each!(self, queue => queue.complete(completion, ring))
    }

    fn submit_commits(&mut self, ring: &mut Ring) -> Result<usize> {
        match self {
            // Every answer is on its way already.
            Queue::PerIo(_) => Ok(0),
            Queue::Batch(queue) => queue.submit_commits(ring),
            Queue::Fuse(queue) => queue.submit_commits(ring),
        }
    }

    fn linked_commit(&mut self, tag: Tag, len: u32) -> Option<squeue::Entry> {
        match self {
            Queue::PerIo(queue) => queue.linked_commit(tag, len),
            Queue::Batch(queue) => queue.linked_commit(tag, len),
            // An answer is a write to the kernel that only this thread can make.
            Queue::Fuse(_) => None,
        }
    }

    fn is_drained(&self) -> bool {
        each!(self, queue => queue.is_drained())
    }

    fn fallbacks(&self) -> u64 {
        match self {
            Queue::PerIo(queue) => queue.fallbacks(),
            Queue::Batch(queue) => queue.fallbacks(),
            Queue::Fuse(_) => 0,
        }
    }

    fn is_waiting_for_buffer(&self) -> bool {
        match self {
            Queue::PerIo(queue) => queue.is_waiting_for_buffer(),
            Queue::Batch(queue) => queue.is_waiting_for_buffer(),
            Queue::Fuse(_) => false,
        }
    }

    fn retry_waiting(&mut self, ring: &mut Ring) -> Result<()> {
        match self {
            Queue::PerIo(queue) => queue.retry_waiting(ring),
            Queue::Batch(queue) => queue.retry_waiting(ring),
            Queue::Fuse(_) => Ok(()),
        }
    }
}
