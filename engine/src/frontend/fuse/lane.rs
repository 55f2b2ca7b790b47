//! The way from the session threads to one queue of one device: a bounded queue, and a bell for a
//! worker that sleeps.
//!
//! Knows calls and how they are answered; does not know files or rings. Nobody waits here for ever:
//! when the queue stays full for long, calls fail.

use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::time::Duration;

use crossbeam::channel::{Receiver, Sender, bounded};
use fuser::{Errno, FileAttr, ReplyAttr, ReplyData, ReplyEmpty, ReplyWrite};
use rustix::event::{EventfdFlags, eventfd};

use super::buffer::Buffer;
use super::node::{Node, Nodes, TTL};
use crate::error::{Error, Result};
use crate::request::Op;

/// Calls that wait for a tag: twice as many as the kernel sends on its own for all files together, so
/// that more come only from as many threads.
const WAITING: usize = 1024;
/// How long a session thread waits for room among them. It keeps others waiting meanwhile.
const PATIENCE: Duration = Duration::from_secs(30);

/// How one is answered.
#[derive(Debug)]
pub(super) enum Answer {
    /// With what was read.
    Data(ReplyData),
    /// With the number of bytes written; or with an error although these were written, for there
    /// were more, which did not fit.
    Written(ReplyWrite, Option<Errno>),
    /// With success or failure.
    Done(ReplyEmpty),
    /// With the attributes of the file, which was emptied.
    Emptied(ReplyAttr, Arc<Node>),
    /// The same, and the kernel is to drop what it caches: it is told a size of 0, and the true one later.
    Truncated(ReplyAttr, Arc<Node>, Arc<Nodes>),
}

/// What a user of a file waits for.
#[derive(Debug)]
pub(super) struct Call {
    pub(super) op: Op,
    pub(super) offset: u64,
    /// Bytes left; of a read or write all fit one request.
    pub(super) len: u64,
    /// Data of a write; of a read, once it has a tag.
    pub(super) buffer: Option<Buffer>,
    pub(super) answer: Answer,
}

impl Answer {
    /// All `len` bytes are done.
    pub(super) fn succeed(self, buffer: Option<&Buffer>, len: usize) {
        match self {
            Answer::Data(reply) => reply.data(buffer.map_or(&[], |buffer| buffer.filled(len))),
            Answer::Written(reply, None) => reply.written(len as u32),
            Answer::Written(reply, Some(error)) => reply.error(error),
            Answer::Done(reply) => reply.ok(),
            Answer::Emptied(reply, node) => {
                node.state().emptying = false;
                reply.attr(&TTL, &node.attr());
            }
            Answer::Truncated(reply, node, nodes) => {
                node.state().emptying = false;
                reply.attr(&TTL, &FileAttr { size: 0, ..node.attr() });
                nodes.correct_size(&node);
            }
        }
    }

    pub(super) fn fail(self, error: Errno) {
        match self {
            Answer::Data(reply) => reply.error(error),
            Answer::Written(reply, _) => reply.error(error),
            Answer::Done(reply) => reply.error(error),
            Answer::Emptied(reply, node) | Answer::Truncated(reply, node, _) => {
                node.state().emptying = false;
                reply.error(error);
            }
        }
    }
}

/// One queue's way.
#[derive(Debug)]
pub(super) struct Lane {
    calls: Sender<Call>,
    waiting: Receiver<Call>,
    bell: OwnedFd,
    /// The worker will not look by itself.
    asleep: AtomicBool,
    /// Nothing is taken on any more.
    ended: AtomicBool,
}

impl Lane {
    pub(super) fn new() -> Result<Lane> {
        let bell =
            eventfd(0, EventfdFlags::CLOEXEC).map_err(|error| Error::os(error, "cannot make an eventfd"))?;
        let (calls, waiting) = bounded(WAITING);
        Ok(Lane { calls, waiting, bell, asleep: AtomicBool::new(true), ended: AtomicBool::new(false) })
    }

    /// Readable when there is something to look for.
    pub(super) fn bell(&self) -> RawFd {
        self.bell.as_raw_fd()
    }

    /// Hands a call to the worker; it is answered in any case.
    pub(super) fn send(&self, call: Call) {
        if let Err(refused) = self.calls.send_timeout(call, PATIENCE) {
            tracing::error!("a file's queue was full for {} s: a request fails", PATIENCE.as_secs());
            return refused.into_inner().answer.fail(Errno::EIO);
        }
        // Against the worker's: falls asleep, looks once more. One of us sees the other.
        fence(Ordering::SeqCst);
        if self.ended.load(Ordering::SeqCst) {
            return self.fail_waiting();
        }
        if self.asleep.load(Ordering::SeqCst) && self.asleep.swap(false, Ordering::SeqCst) {
            self.ring();
        }
    }

    fn ring(&self) {
        // It fails only when the counter is full, and then the bell rings as it is.
        let _ = rustix::io::write(self.bell.as_fd(), &1u64.to_ne_bytes());
    }

    /// A call, if one waits.
    pub(super) fn take(&self) -> Option<Call> {
        self.waiting.try_recv().ok()
    }

    /// The worker is going to look without being told.
    pub(super) fn wake(&self) {
        self.asleep.store(false, Ordering::SeqCst);
    }

    /// The worker looks no more unless the bell rings; false when something has come by now.
    pub(super) fn sleep(&self) -> bool {
        self.asleep.store(true, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        self.waiting.is_empty()
    }

    /// Ends it: what waits fails, and what comes.
    pub(super) fn end(&self) {
        self.ended.store(true, Ordering::SeqCst);
        self.ring();
    }

    pub(super) fn is_ended(&self) -> bool {
        self.ended.load(Ordering::SeqCst)
    }

    /// Of an ended lane: by the worker, and by whoever came too late.
    pub(super) fn fail_waiting(&self) {
        while let Some(call) = self.take() {
            call.answer.fail(Errno::ENODEV);
        }
    }
}
