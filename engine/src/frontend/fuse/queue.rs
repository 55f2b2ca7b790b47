//! A queue of a file as the worker sees it: takes calls from its lane, gives them tags, answers
//! them.
//!
//! Knows the lane and the ring. The worker learns of calls by a read of the lane's eventfd, of which
//! one is always in flight; while it has no free tag it looks by itself once it has one.

use std::collections::VecDeque;
use std::os::fd::RawFd;
use std::sync::Arc;

use fuser::Errno;
use io_uring::{cqueue, opcode, squeue};

use super::buffer::Buffers;
use super::lane::{Call, Lane};
use crate::error::{Error, Kind, Result};
use crate::request::{Completion, Op, Request, Tag};
use crate::ring::{EventKind, Ring, Token};
use crate::worker::{Data, QueueSlot};

/// Tags of this queue's own completions.
const BELL: Tag = 0;
const NUDGE: Tag = 1;
/// Bytes of a zeroed range that one request does.
const ZERO_AT_ONCE: u64 = 1 << 30;

/// A call in flight.
#[derive(Debug)]
struct Active {
    call: Call,
    /// Where its data is.
    address: usize,
    /// Bytes that this request does of it.
    len: u32,
}

/// One queue of one file.
#[derive(Debug)]
pub struct FuseQueue {
    lane: Arc<Lane>,
    buffers: Arc<Buffers>,
    depth: u16,
    queue_slot: Option<QueueSlot>,
    /// What the eventfd is read into; the kernel writes to it while `listening`.
    count: Box<u64>,
    listening: bool,
    /// Nobody rings the bell: there were more calls than tags.
    awake: bool,
    /// A no-op is on its way round the ring, to make us look.
    nudged: bool,
    active: Box<[Option<Active>]>,
    free: Vec<Tag>,
    /// Calls of which a part is done and more is to do.
    unfinished: VecDeque<Call>,
}

impl FuseQueue {
    pub(super) fn new(lane: Arc<Lane>, buffers: Arc<Buffers>, depth: u16) -> Self {
        Self {
            lane,
            buffers,
            depth,
            queue_slot: None,
            count: Box::new(0),
            listening: false,
            awake: false,
            nudged: false,
            active: (0..depth).map(|_| None).collect(),
            free: (0..depth).rev().collect(),
            unfinished: VecDeque::with_capacity(usize::from(depth)),
        }
    }

    pub(in crate::frontend) fn file(&self) -> RawFd {
        self.lane.bell()
    }

    pub(in crate::frontend) fn depth(&self) -> u16 {
        self.depth
    }

    pub(in crate::frontend) fn arm(&mut self, queue_slot: QueueSlot, ring: &mut Ring) -> Result<()> {
        self.queue_slot = Some(queue_slot);
        self.listen(ring)
    }

    fn queue_slot(&self) -> Result<QueueSlot> {
        self.queue_slot.ok_or_else(|| Error::new(Kind::Internal, "the queue is not armed"))
    }

    fn listen(&mut self, ring: &mut Ring) -> Result<()> {
        let queue_slot = self.queue_slot()?;
        let entry = opcode::Read::new(queue_slot.frontend_file(), (&raw mut *self.count).cast(), 8)
            .build()
            .flags(squeue::Flags::FIXED_FILE)
            .user_data(Token::pack(EventKind::Fetch, queue_slot.id, BELL));
        ring.push(&entry)?;
        self.listening = true;
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
            (EventKind::Fetch, BELL) => self.listening = false,
            (EventKind::Fetch, _) => self.nudged = false,
            _ => return Ok(()),
        }
        // Who rang has put something into the lane before, whatever came of the read. But a read that cannot
        // work would be sent again and again.
        let result = entry.result();
        if result < 0 && !matches!(-result, libc::EINTR | libc::EAGAIN | libc::ECANCELED) {
            let error = std::io::Error::from_raw_os_error(-result);
            return Err(Error::os(error, "io_uring refuses to wake a queue").with_kind(Kind::Internal));
        }
        if self.lane.is_ended() {
            // There is nothing to look for when a tag comes free.
            self.awake = false;
            self.lane.fail_waiting();
            self.unfinished.drain(..).for_each(|call| call.answer.fail(Errno::ENODEV));
            return Ok(());
        }
        self.look(arrived);
        if self.listening { Ok(()) } else { self.listen(ring) }
    }

    /// Takes calls as long as there are tags for them.
    fn look(&mut self, arrived: &mut Vec<Request>) {
        self.lane.wake();
        self.awake = true;
        while let Some(tag) = self.free.pop() {
            match self.unfinished.pop_front().or_else(|| self.lane.take()) {
                Some(call) => arrived.push(self.begin(tag, call)),
                None => {
                    self.free.push(tag);
                    if self.lane.sleep() {
                        self.awake = false;
                        return;
                    }
                    self.lane.wake();
                }
            }
        }
    }

    fn begin(&mut self, tag: Tag, mut call: Call) -> Request {
        let len = call.len.min(ZERO_AT_ONCE) as u32;
        let request = Request { tag, op: call.op, offset: call.offset, len };
        // Of a read only now: those that wait for a tag hold no memory.
        if call.op == Op::Read {
            call.buffer = self.buffers.take(len as usize);
        }
        let address = call.buffer.as_mut().map_or(0, |buffer| buffer.address());
        self.active[usize::from(tag)] = Some(Active { call, address, len });
        request
    }

    pub(in crate::frontend) fn data(&self, tag: Tag) -> Data {
        let active = self.active.get(usize::from(tag)).and_then(Option::as_ref);
        Data::Memory(active.map_or(0, |active| active.address))
    }

    pub(in crate::frontend) fn complete(&mut self, completion: Completion, _ring: &mut Ring) -> Result<()> {
        let Completion { tag, result } = completion;
        let active = self.active.get_mut(usize::from(tag)).and_then(Option::take);
        let Some(Active { mut call, len, .. }) = active else {
            return Err(Error::new(Kind::Internal, format!("tag {tag} was answered and is not in flight")));
        };
        self.free.push(tag);
        if result < 0 {
            call.answer.fail(Errno::from_i32(-result));
        } else if matches!(call.op, Op::WriteZeroes { .. }) && call.len > u64::from(len) {
            call.offset += u64::from(len);
            call.len -= u64::from(len);
            self.unfinished.push_back(call);
            return Ok(());
        } else {
            call.answer.succeed(call.buffer.as_ref(), len as usize);
        }
        if let Some(buffer) = call.buffer {
            self.buffers.give(buffer);
        }
        Ok(())
    }

    /// All answers are given already; but tags have come free, and what waits for one must be seen.
    pub(in crate::frontend) fn submit_commits(&mut self, ring: &mut Ring) -> Result<usize> {
        let waits = self.awake || !self.unfinished.is_empty();
        if waits && !self.nudged && !self.free.is_empty() {
            let slot = self.queue_slot()?.id;
            // It has no file; the ring asks every submission for the flag.
            let nudge = opcode::Nop::new().build().flags(squeue::Flags::FIXED_FILE);
            ring.push(&nudge.user_data(Token::pack(EventKind::Fetch, slot, NUDGE)))?;
            self.nudged = true;
        }
        Ok(0)
    }

    pub(in crate::frontend) fn is_drained(&self) -> bool {
        self.lane.is_ended() && !self.listening && !self.nudged && self.unfinished.is_empty()
    }
}

impl Drop for FuseQueue {
    fn drop(&mut self) {
        // Of a worker that ends in the middle of things: what the kernel may still write to stays.
        if self.listening {
            Box::leak(std::mem::take(&mut self.count));
        }
        for active in self.active.iter_mut().filter_map(Option::take) {
            std::mem::forget(active.call.buffer);
        }
    }
}
