// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A queue of a file, the worker's side: takes calls from the call queue, assigns tags, replies.
//!
//! The worker learns of calls through a read of the eventfd, of which one is always in flight.
//! While it has no free tag, it checks the call queue itself once a tag is free.

use std::collections::VecDeque;
use std::os::fd::RawFd;
use std::sync::Arc;

use fuser::Errno;
use io_uring::{cqueue, opcode, squeue};

use super::buffer_pool::BufferPool;
use super::call_queue::{CallQueue, FuseCall};
use crate::error::{Error, Kind, Result};
use crate::request::{Completion, Op, Request, Tag};
use crate::ring::{EventKind, Ring, Token};
use crate::worker::{Data, QueueSlot};

/// Tags of this queue's own CQEs.
const WAKE_TAG: Tag = 0;
const NOP_TAG: Tag = 1;
/// Maximum number of bytes that one request zeroes.
const ZERO_AT_ONCE: u64 = 1 << 30;

/// A call in flight.
#[derive(Debug)]
struct ActiveCall {
    call: FuseCall,
    /// Address of its data.
    address: usize,
    /// Bytes of the call that this request covers.
    len: u32,
}

/// One queue of one file.
#[derive(Debug)]
pub struct FuseQueue {
    call_queue: Arc<CallQueue>,
    buffers: Arc<BufferPool>,
    depth: u16,
    queue_slot: Option<QueueSlot>,
    /// Target of the eventfd read; the kernel writes to it while `read_pending`.
    count: Box<u64>,
    read_pending: bool,
    /// No notification is needed: there were more calls than tags.
    polling: bool,
    /// A no-op is in flight that makes the worker check the call queue.
    nop_pending: bool,
    active: Box<[Option<ActiveCall>]>,
    free: Vec<Tag>,
    /// Calls that are done in part.
    partial: VecDeque<FuseCall>,
}

impl FuseQueue {
    pub(super) fn new(call_queue: Arc<CallQueue>, buffers: Arc<BufferPool>, depth: u16) -> Self {
        Self {
            call_queue,
            buffers,
            depth,
            queue_slot: None,
            count: Box::new(0),
            read_pending: false,
            polling: false,
            nop_pending: false,
            active: (0..depth).map(|_| None).collect(),
            free: (0..depth).rev().collect(),
            partial: VecDeque::with_capacity(usize::from(depth)),
        }
    }

    pub(in crate::frontend) fn file(&self) -> RawFd {
        self.call_queue.eventfd()
    }

    pub(in crate::frontend) fn depth(&self) -> u16 {
        self.depth
    }

    pub(in crate::frontend) fn arm(&mut self, queue_slot: QueueSlot, ring: &mut Ring) -> Result<()> {
        self.queue_slot = Some(queue_slot);
        self.arm_read(ring)
    }

    fn queue_slot(&self) -> Result<QueueSlot> {
        self.queue_slot.ok_or_else(|| Error::new(Kind::Internal, "the queue is not armed"))
    }

    fn arm_read(&mut self, ring: &mut Ring) -> Result<()> {
        let queue_slot = self.queue_slot()?;
        let entry = opcode::Read::new(queue_slot.frontend_file(), (&raw mut *self.count).cast(), 8)
            .build()
            .flags(squeue::Flags::FIXED_FILE)
            .user_data(Token::pack(EventKind::Fetch, queue_slot.id, WAKE_TAG));
        ring.push(&entry)?;
        self.read_pending = true;
        Ok(())
    }

    pub(in crate::frontend) fn on_event(
        &mut self,
        token: Token,
        entry: &cqueue::Entry,
        ring: &mut Ring,
        arrived: &mut Vec<Request>,
    ) -> Result<()> {
        match (token.kind, token.tag) {
            (EventKind::Fetch, WAKE_TAG) => self.read_pending = false,
            (EventKind::Fetch, _) => self.nop_pending = false,
            _ => return Ok(()),
        }
        // A notification follows its call, whatever the read returns. But repeating a failed read
        // would loop.
        let result = entry.result();
        if result < 0 && !matches!(-result, libc::EINTR | libc::EAGAIN | libc::ECANCELED) {
            let error = std::io::Error::from_raw_os_error(-result);
            return Err(Error::os(error, "io_uring refuses to wake a queue").with_kind(Kind::Internal));
        }
        if self.call_queue.is_closed() {
            // No need to check the call queue for free tags.
            self.polling = false;
            self.call_queue.fail_pending();
            self.partial.drain(..).for_each(|call| call.answer.fail(Errno::ENODEV));
            return Ok(());
        }
        self.take_calls(arrived);
        if self.read_pending { Ok(()) } else { self.arm_read(ring) }
    }

    /// Takes calls while tags are free.
    fn take_calls(&mut self, arrived: &mut Vec<Request>) {
        self.call_queue.disable_notify();
        self.polling = true;
        while let Some(tag) = self.free.pop() {
            match self.partial.pop_front().or_else(|| self.call_queue.take()) {
                Some(call) => arrived.push(self.begin(tag, call)),
                None => {
                    self.free.push(tag);
                    if self.call_queue.enable_notify() {
                        self.polling = false;
                        return;
                    }
                    self.call_queue.disable_notify();
                }
            }
        }
    }

    fn begin(&mut self, tag: Tag, mut call: FuseCall) -> Request {
        let len = call.len.min(ZERO_AT_ONCE) as u32;
        let request = Request { tag, op: call.op, offset: call.offset, len };
        // Allocates for a read only now: waiting calls hold no memory.
        if call.op == Op::Read {
            call.buffer = self.buffers.take(len as usize);
        }
        let address = call.buffer.as_mut().map_or(0, |buffer| buffer.address());
        self.active[usize::from(tag)] = Some(ActiveCall { call, address, len });
        request
    }

    pub(in crate::frontend) fn data(&self, tag: Tag) -> Data {
        let active = self.active.get(usize::from(tag)).and_then(Option::as_ref);
        Data::Memory(active.map_or(0, |active| active.address))
    }

    pub(in crate::frontend) fn complete(&mut self, completion: Completion, _ring: &mut Ring) -> Result<()> {
        let Completion { tag, result } = completion;
        let active = self.active.get_mut(usize::from(tag)).and_then(Option::take);
        let Some(ActiveCall { mut call, len, .. }) = active else {
            return Err(Error::new(Kind::Internal, format!("tag {tag} was completed but is not in flight")));
        };
        self.free.push(tag);
        if result < 0 {
            call.answer.fail(Errno::from_i32(-result));
        } else if matches!(call.op, Op::WriteZeroes { .. }) && call.len > u64::from(len) {
            call.offset += u64::from(len);
            call.len -= u64::from(len);
            self.partial.push_back(call);
            return Ok(());
        } else {
            call.answer.succeed(call.buffer.as_ref(), len as usize);
        }
        if let Some(buffer) = call.buffer {
            self.buffers.give(buffer);
        }
        Ok(())
    }

    /// All replies are sent already. Tags have become free, so waiting calls must be checked.
    pub(in crate::frontend) fn submit_commits(&mut self, ring: &mut Ring) -> Result<usize> {
        let waits = self.polling || !self.partial.is_empty();
        if waits && !self.nop_pending && !self.free.is_empty() {
            let slot = self.queue_slot()?.id;
            // It uses no file; the ring requires the flag.
            let nop = opcode::Nop::new().build().flags(squeue::Flags::FIXED_FILE);
            ring.push(&nop.user_data(Token::pack(EventKind::Fetch, slot, NOP_TAG)))?;
            self.nop_pending = true;
        }
        Ok(0)
    }

    pub(in crate::frontend) fn is_drained(&self) -> bool {
        self.call_queue.is_closed() && !self.read_pending && !self.nop_pending && self.partial.is_empty()
    }
}

impl Drop for FuseQueue {
    fn drop(&mut self) {
        // A worker may end with operations in flight: leak what the kernel may still write to.
        if self.read_pending {
            Box::leak(std::mem::take(&mut self.count));
        }
        for active in self.active.iter_mut().filter_map(Option::take) {
            std::mem::forget(active.call.buffer);
        }
    }
}
