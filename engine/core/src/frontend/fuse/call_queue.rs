// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The queue from the session threads to one queue of one device: bounded, with an eventfd to wake
//! a sleeping worker.
//!
//! Knows calls and their replies; does not know files or rings. Nothing blocks forever: when the
//! queue stays full, calls fail.

use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::time::Duration;

use crossbeam::channel::{Receiver, Sender, bounded};
use fuser::{Errno, ReplyData, ReplyEmpty, ReplyWrite};
use rustix::event::{EventfdFlags, eventfd};

use super::buffer_pool::Buffer;
use crate::error::{Error, Result};
use crate::request::Op;

/// Capacity: twice the kernel's background requests for all files, so that only as many threads can
/// add more.
const CAPACITY: usize = 1024;
/// How long a session thread waits for space. Other callers of the thread wait meanwhile.
const SEND_TIMEOUT: Duration = Duration::from_secs(30);

/// How to reply to a call.
#[derive(Debug)]
pub(super) enum FuseReply {
    /// Reply with the data read.
    Data(ReplyData),
    /// Reply with the number of bytes written; or with an error although these were written,
    /// because more did not fit.
    Written(ReplyWrite, Option<Errno>),
    /// Reply with success or failure.
    Done(ReplyEmpty),
    /// Let the zeroed file reply.
    Zeroed(Box<dyn ZeroedReply>),
}

/// Replies to a caller that waits until its file is zeroed.
pub(super) trait ZeroedReply: std::fmt::Debug + Send {
    fn reply(self: Box<Self>, zeroed: std::result::Result<(), Errno>);
}

/// An operation that a user of a file waits for.
#[derive(Debug)]
pub(super) struct FuseCall {
    pub(super) op: Op,
    pub(super) offset: u64,
    /// Remaining bytes; a read or write fits one request.
    pub(super) len: u64,
    /// Data of a write, or of a read that has a tag.
    pub(super) buffer: Option<Buffer>,
    pub(super) answer: FuseReply,
}

impl FuseReply {
    /// Replies with success for all `len` bytes.
    pub(super) fn succeed(self, buffer: Option<&Buffer>, len: usize) {
        match self {
            FuseReply::Data(reply) => reply.data(buffer.map_or(&[], |buffer| buffer.filled(len))),
            FuseReply::Written(reply, None) => reply.written(len as u32),
            FuseReply::Written(reply, Some(error)) => reply.error(error),
            FuseReply::Done(reply) => reply.ok(),
            FuseReply::Zeroed(file) => file.reply(Ok(())),
        }
    }

    pub(super) fn fail(self, error: Errno) {
        match self {
            FuseReply::Data(reply) => reply.error(error),
            FuseReply::Written(reply, _) => reply.error(error),
            FuseReply::Done(reply) => reply.error(error),
            FuseReply::Zeroed(file) => file.reply(Err(error)),
        }
    }
}

/// The call queue of one device queue.
#[derive(Debug)]
pub(super) struct CallQueue {
    calls: Sender<FuseCall>,
    waiting: Receiver<FuseCall>,
    eventfd: OwnedFd,
    /// The worker needs a notification for the next call.
    notify_needed: AtomicBool,
    /// No more calls are accepted.
    closed: AtomicBool,
}

impl CallQueue {
    pub(super) fn new() -> Result<CallQueue> {
        let eventfd =
            eventfd(0, EventfdFlags::CLOEXEC).map_err(|error| Error::os(error, "cannot make an eventfd"))?;
        let (calls, waiting) = bounded(CAPACITY);
        Ok(CallQueue {
            calls,
            waiting,
            eventfd,
            notify_needed: AtomicBool::new(true),
            closed: AtomicBool::new(false),
        })
    }

    /// Readable when calls may be pending.
    pub(super) fn eventfd(&self) -> RawFd {
        self.eventfd.as_raw_fd()
    }

    /// Sends a call to the worker. It gets a reply in any case.
    pub(super) fn send(&self, call: FuseCall) {
        if let Err(rejected) = self.calls.send_timeout(call, SEND_TIMEOUT) {
            tracing::error!(
                "failed a request: the call queue of a FUSE file was full for {} s",
                SEND_TIMEOUT.as_secs()
            );
            return rejected.into_inner().answer.fail(Errno::EIO);
        }
        // Pairs with the worker's fence in `enable_notify`: one side sees the other's store.
        fence(Ordering::SeqCst);
        if self.closed.load(Ordering::SeqCst) {
            return self.fail_pending();
        }
        if self.notify_needed.load(Ordering::SeqCst) && self.notify_needed.swap(false, Ordering::SeqCst) {
            self.notify();
        }
    }

    fn notify(&self) {
        // Fails only if the counter is full, and then the worker wakes anyway.
        let _ = rustix::io::write(self.eventfd.as_fd(), &1u64.to_ne_bytes());
    }

    /// Takes a pending call.
    pub(super) fn take(&self) -> Option<FuseCall> {
        self.waiting.try_recv().ok()
    }

    /// The worker polls the queue and needs no notification.
    pub(super) fn disable_notify(&self) {
        self.notify_needed.store(false, Ordering::SeqCst);
    }

    /// The worker needs a notification from now on. False: a call is pending already.
    pub(super) fn enable_notify(&self) -> bool {
        self.notify_needed.store(true, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        self.waiting.is_empty()
    }

    /// Closes the queue: pending and later calls fail.
    pub(super) fn close(&self) {
        self.closed.store(true, Ordering::SeqCst);
        self.notify();
    }

    pub(super) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::SeqCst)
    }

    /// Fails the calls of a closed queue: for the worker, and for late senders.
    pub(super) fn fail_pending(&self) {
        while let Some(call) = self.take() {
            call.answer.fail(Errno::ENODEV);
        }
    }
}
