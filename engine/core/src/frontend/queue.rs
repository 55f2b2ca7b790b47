// SPDX-License-Identifier: Apache-2.0 OR MIT
//! One queue of a device of any frontend: the worker's view.
//!
//! One branch per call, well predicted: the kind never changes for a device.

use std::os::fd::RawFd;

use io_uring::{cqueue, squeue};

use super::fuse::FuseQueue;
use super::ublk::{Batch, PerIo};
use crate::error::Result;
use crate::request::{Completion, Request, Tag};
use crate::ring::{Ring, Token};
use crate::worker::{Data, QueueSlot, Transport};

/// The three transports.
#[derive(Debug)]
pub enum FrontendQueue {
    /// ublk, one command per request.
    PerIo(PerIo),
    /// ublk, commands in batches.
    Batch(Batch),
    /// FUSE. Boxed, so that it does not enlarge the others.
    Fuse(Box<FuseQueue>),
}

macro_rules! each {
    ($self:expr, $queue:ident => $call:expr) => {
        match $self {
            FrontendQueue::PerIo($queue) => $call,
            FrontendQueue::Batch($queue) => $call,
            FrontendQueue::Fuse($queue) => $call,
        }
    };
}

impl Transport for FrontendQueue {
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
            // Every commit is queued already.
            FrontendQueue::PerIo(_) => Ok(0),
            FrontendQueue::Batch(queue) => queue.submit_commits(ring),
            FrontendQueue::Fuse(queue) => queue.submit_commits(ring),
        }
    }

    fn linked_commit(&mut self, tag: Tag, len: u32) -> Option<squeue::Entry> {
        match self {
            FrontendQueue::PerIo(queue) => queue.linked_commit(tag, len),
            FrontendQueue::Batch(queue) => queue.linked_commit(tag, len),
            // A reply is a write to the kernel that only this thread can make.
            FrontendQueue::Fuse(_) => None,
        }
    }

    fn is_drained(&self) -> bool {
        each!(self, queue => queue.is_drained())
    }

    fn fallbacks(&self) -> u64 {
        match self {
            FrontendQueue::PerIo(queue) => queue.fallbacks(),
            FrontendQueue::Batch(queue) => queue.fallbacks(),
            FrontendQueue::Fuse(_) => 0,
        }
    }

    fn is_waiting_for_buffer(&self) -> bool {
        match self {
            FrontendQueue::PerIo(queue) => queue.is_waiting_for_buffer(),
            FrontendQueue::Batch(queue) => queue.is_waiting_for_buffer(),
            FrontendQueue::Fuse(_) => false,
        }
    }

    fn retry_waiting(&mut self, ring: &mut Ring) -> Result<()> {
        match self {
            FrontendQueue::PerIo(queue) => queue.retry_waiting(ring),
            FrontendQueue::Batch(queue) => queue.retry_waiting(ring),
            FrontendQueue::Fuse(_) => Ok(()),
        }
    }
}
