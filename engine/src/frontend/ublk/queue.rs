//! A queue of a ublk device as the worker sees it, and what both transports share.

use std::collections::VecDeque;
use std::os::fd::RawFd;

use io_uring::{cqueue, opcode, squeue};
use libublk::sys;

use super::batch::Batch;
use super::per_io::PerIo;
use crate::error::{Error, Kind, Result};
use crate::request::{Completion, Request, Tag};
use crate::ring::{Ring, Step, Token};
use crate::worker::{Data, Place, Transport};

/// One of the two transports.
#[derive(Debug)]
pub struct UblkQueue(pub(super) Kinds);

#[derive(Debug)]
pub(super) enum Kinds {
    PerIo(PerIo),
    Batch(Batch),
}

macro_rules! each {
    ($self:ident, $queue:ident => $call:expr) => {
        match &mut $self.0 {
            Kinds::PerIo($queue) => $call,
            Kinds::Batch($queue) => $call,
        }
    };
    (ref $self:ident, $queue:ident => $call:expr) => {
        match &$self.0 {
            Kinds::PerIo($queue) => $call,
            Kinds::Batch($queue) => $call,
        }
    };
}

impl Transport for UblkQueue {
    fn file(&self) -> RawFd {
        each!(ref self, queue => queue.file())
    }

    fn depth(&self) -> u16 {
        each!(ref self, queue => queue.depth())
    }

    fn arm(&mut self, place: Place, ring: &mut Ring) -> Result<()> {
        each!(self, queue => queue.arm(place, ring))
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
        each!(ref self, queue => queue.data(tag))
    }

    fn complete(&mut self, completion: Completion, ring: &mut Ring) -> Result<()> {
        each!(self, queue => queue.complete(completion, ring))
    }

    fn flush(&mut self, ring: &mut Ring) -> Result<usize> {
        match &mut self.0 {
            // Every answer is on its way already.
            Kinds::PerIo(_) => Ok(0),
            Kinds::Batch(queue) => queue.flush(ring),
        }
    }

    fn linked_commit(&mut self, tag: Tag, len: u32) -> Option<squeue::Entry> {
        each!(self, queue => queue.linked_commit(tag, len))
    }

    fn is_gone(&self) -> bool {
        each!(ref self, queue => queue.is_gone())
    }

    fn fallbacks(&self) -> u64 {
        each!(ref self, queue => queue.fallbacks())
    }

    fn is_starved(&self) -> bool {
        match &self.0 {
            Kinds::PerIo(queue) => queue.fallback().is_some_and(Fallback::is_starved),
            Kinds::Batch(queue) => queue.fallback().is_starved(),
        }
    }

    fn retry_starved(&mut self, ring: &mut Ring) -> Result<()> {
        each!(self, queue => queue.retry_starved(ring))
    }
}

/// The payload of a command for one request.
pub(super) fn io_command(queue: u16, tag: Tag, result: i32, addr: u64) -> [u8; 16] {
    let command = sys::ublksrv_io_cmd { q_id: queue, tag, result, addr };
    // SAFETY: 2 + 2 + 4 + 8 bytes of plain integers, without padding.
    unsafe { std::mem::transmute(command) }
}

/// No slot.
pub(super) const UNREGISTERED: u16 = u16::MAX;

/// Registered buffers of a queue's tags: the slots that the driver fills by itself, and the
/// requests for which it could not, because their slot was taken by another device's request.
#[derive(Debug)]
pub(super) struct Fallback {
    first: usize,
    automatic: Box<[u16]>,
    /// The spare slot that a tag in flight has; `UNREGISTERED` for all others.
    spare: Box<[u16]>,
    /// Being registered: the request to be handed on after it.
    pending: Box<[Option<Request>]>,
    /// Being unregistered: the answer to be given after it.
    answered: Box<[Option<Completion>]>,
    /// Without a slot, since there was none.
    starved: VecDeque<Request>,
    busy: usize,
    count: u64,
}

impl Fallback {
    pub(super) fn new() -> Self {
        Self {
            first: 0,
            automatic: Box::default(),
            spare: Box::default(),
            pending: Box::default(),
            answered: Box::default(),
            starved: VecDeque::new(),
            busy: 0,
            count: 0,
        }
    }

    /// Gives every tag of the queue at `place` its slot.
    pub(super) fn assign(&mut self, place: Place, ring: &Ring, depth: u16) {
        let tags = usize::from(depth);
        self.first = usize::from(place.slot.index) * tags;
        self.automatic = (0..tags).map(|tag| ring.buffers.automatic(self.first + tag)).collect();
        self.spare = vec![UNREGISTERED; tags].into();
        self.pending = vec![None; tags].into();
        self.answered = vec![None; tags].into();
        self.starved.reserve(tags);
    }

    /// What a per-request command says about its tag's buffer.
    pub(super) fn automatic(&self, tag: Tag) -> u64 {
        super::per_io::automatic_registration(self.automatic_slot(tag))
    }

    pub(super) fn automatic_slot(&self, tag: Tag) -> u16 {
        self.automatic.get(usize::from(tag)).copied().unwrap_or(0)
    }

    /// The slot where a request's data is now.
    pub(super) fn slot(&self, tag: Tag) -> u16 {
        match self.spare.get(usize::from(tag)) {
            Some(&slot) if slot != UNREGISTERED => slot,
            _ => self.automatic_slot(tag),
        }
    }

    /// Whether this request's buffer was registered by hand.
    pub(super) fn holds(&self, tag: Tag) -> bool {
        self.spare.get(usize::from(tag)).is_some_and(|slot| *slot != UNREGISTERED)
    }

    pub(super) fn count(&self) -> u64 {
        self.count
    }

    pub(super) fn is_idle(&self) -> bool {
        self.busy == 0 && self.starved.is_empty()
    }

    pub(super) fn is_starved(&self) -> bool {
        !self.starved.is_empty()
    }

    /// A request has arrived whose buffer must be registered by hand.
    pub(super) fn arrived(
        &mut self,
        request: Request,
        place: Option<Place>,
        queue: u16,
        ring: &mut Ring,
    ) -> Result<()> {
        use crate::request::Op;
        if !matches!(request.op, Op::Read | Op::Write { .. }) {
            return Err(Error::new(
                Kind::Internal,
                "a buffer is to be registered for a request without data",
            ));
        }
        self.count += 1;
        self.starved.push_back(request);
        self.retry(place, queue, ring)
    }

    /// Registers buffers of waiting requests as far as there are slots.
    pub(super) fn retry(&mut self, place: Option<Place>, queue: u16, ring: &mut Ring) -> Result<()> {
        while let Some(&request) = self.starved.front() {
            let Some(slot) = ring.buffers.take() else { return Ok(()) };
            self.starved.pop_front();
            let index = usize::from(request.tag);
            self.spare[index] = slot;
            self.pending[index] = Some(request);
            self.busy += 1;
            ring.push(&registration(
                sys::UBLK_U_IO_REGISTER_IO_BUF,
                Step::Register,
                place,
                queue,
                request.tag,
                slot,
            )?)?;
        }
        Ok(())
    }

    /// A request is answered: its buffer goes first.
    pub(super) fn release(
        &mut self,
        completion: Completion,
        place: Option<Place>,
        queue: u16,
        ring: &mut Ring,
    ) -> Result<()> {
        let index = usize::from(completion.tag);
        self.answered[index] = Some(completion);
        let slot = self.spare[index];
        ring.push(&registration(
            sys::UBLK_U_IO_UNREGISTER_IO_BUF,
            Step::Unregister,
            place,
            queue,
            completion.tag,
            slot,
        )?)
    }

    /// A registration or its opposite has ended. Returns an answer that can be given now.
    pub(super) fn on_event(
        &mut self,
        token: Token,
        result: i32,
        ring: &mut Ring,
        arrived: &mut Vec<Request>,
    ) -> Result<Option<Completion>> {
        let index = usize::from(token.tag);
        if index >= self.spare.len() {
            return Err(Error::new(Kind::Internal, "tag out of range"));
        }
        if token.step == Step::Register && result >= 0 {
            arrived.extend(self.pending[index].take());
            return Ok(None);
        }
        let slot = std::mem::replace(&mut self.spare[index], UNREGISTERED);
        ring.buffers.give_back(slot);
        self.busy -= 1;
        if token.step == Step::Unregister {
            return Ok(self.answered[index].take());
        }
        // It never had a buffer, and nobody has seen it yet: failed here.
        let failed = self.pending[index].take();
        Ok(failed.map(|request| crate::request::Owed::new(request.tag).pay(-libc::EIO)))
    }
}

fn registration(
    opcode: u32,
    step: Step,
    place: Option<Place>,
    queue: u16,
    tag: Tag,
    slot: u16,
) -> Result<squeue::Entry> {
    let place = place.ok_or_else(|| Error::new(Kind::Internal, "the queue is not armed"))?;
    Ok(opcode::UringCmd16::new(place.frontend(), opcode)
        .cmd(io_command(queue, tag, 0, u64::from(slot)))
        .build()
        .flags(squeue::Flags::FIXED_FILE)
        .user_data(Token::pack(step, place.slot, tag)))
}
