// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Shared by both transports: commands for one request, and registered buffers.

use std::collections::VecDeque;

use io_uring::{opcode, squeue};
use libublk::sys;

use crate::error::{Error, Kind, Result};
use crate::request::{Completion, Request, Tag};
use crate::ring::{EventKind, Ring, Token};
use crate::worker::QueueSlot;

/// The payload of a command for one request.
pub(super) fn io_command(queue: u16, tag: Tag, result: i32, addr: u64) -> [u8; 16] {
    let command = sys::ublksrv_io_cmd { q_id: queue, tag, result, addr };
    // SAFETY: 2 + 2 + 4 + 8 bytes of plain integers, without padding.
    unsafe { std::mem::transmute(command) }
}

/// No slot.
const NO_SLOT: u16 = u16::MAX;

/// The registered buffers of a queue's tags: the slots that the driver fills, and the requests for
/// which it could not because another device's request uses the slot.
#[derive(Debug)]
pub(super) struct Fallback {
    first: usize,
    auto_slots: Box<[u16]>,
    /// The spare slot of each tag in flight; `NO_SLOT` for all others.
    spare: Box<[u16]>,
    /// Requests whose buffer is being registered.
    registering: Box<[Option<Request>]>,
    /// Completions whose buffer is being unregistered.
    unregistering: Box<[Option<Completion>]>,
    /// Requests that wait for a spare slot.
    waiting_for_buffer: VecDeque<Request>,
    outstanding: usize,
    count: u64,
}

impl Fallback {
    pub(super) fn new() -> Self {
        Self {
            first: 0,
            auto_slots: Box::default(),
            spare: Box::default(),
            registering: Box::default(),
            unregistering: Box::default(),
            waiting_for_buffer: VecDeque::new(),
            outstanding: 0,
            count: 0,
        }
    }

    /// Assigns a slot to every tag of the queue at `queue_slot`.
    pub(super) fn assign_slots(&mut self, queue_slot: QueueSlot, ring: &Ring, depth: u16) {
        let tags = usize::from(depth);
        self.first = usize::from(queue_slot.id.index) * tags;
        self.auto_slots = (0..tags).map(|tag| ring.buffers.auto_slot_of(self.first + tag)).collect();
        self.spare = vec![NO_SLOT; tags].into();
        self.registering = vec![None; tags].into();
        self.unregistering = vec![None; tags].into();
        self.waiting_for_buffer.reserve(tags);
    }

    /// The buffer registration argument of a per-request command.
    pub(super) fn auto_registration_of(&self, tag: Tag) -> u64 {
        auto_registration(self.auto_slot(tag))
    }

    pub(super) fn auto_slot(&self, tag: Tag) -> u16 {
        self.auto_slots.get(usize::from(tag)).copied().unwrap_or(0)
    }

    /// The slot of a request's data.
    pub(super) fn slot(&self, tag: Tag) -> u16 {
        match self.spare.get(usize::from(tag)) {
            Some(&slot) if slot != NO_SLOT => slot,
            _ => self.auto_slot(tag),
        }
    }

    /// Whether the worker registered this request's buffer.
    pub(super) fn is_fallback(&self, tag: Tag) -> bool {
        self.spare.get(usize::from(tag)).is_some_and(|slot| *slot != NO_SLOT)
    }

    pub(super) fn count(&self) -> u64 {
        self.count
    }

    pub(super) fn is_idle(&self) -> bool {
        self.outstanding == 0 && self.waiting_for_buffer.is_empty()
    }

    pub(super) fn is_waiting_for_buffer(&self) -> bool {
        !self.waiting_for_buffer.is_empty()
    }

    /// Handles a request whose buffer the worker must register.
    pub(super) fn arrived(
        &mut self,
        request: Request,
        queue_slot: Option<QueueSlot>,
        queue: u16,
        ring: &mut Ring,
    ) -> Result<()> {
        use crate::request::Op;
        if !matches!(request.op, Op::Read | Op::Write { .. }) {
            return Err(Error::new(Kind::Internal, "a request without data needs a buffer"));
        }
        self.count += 1;
        self.waiting_for_buffer.push_back(request);
        self.retry(queue_slot, queue, ring)
    }

    /// Registers buffers of waiting requests while spare slots last.
    pub(super) fn retry(&mut self, queue_slot: Option<QueueSlot>, queue: u16, ring: &mut Ring) -> Result<()> {
        while let Some(&request) = self.waiting_for_buffer.front() {
            let Some(slot) = ring.buffers.take() else { return Ok(()) };
            self.waiting_for_buffer.pop_front();
            let index = usize::from(request.tag);
            self.spare[index] = slot;
            self.registering[index] = Some(request);
            self.outstanding += 1;
            ring.push(&registration(
                sys::UBLK_U_IO_REGISTER_IO_BUF,
                EventKind::Register,
                queue_slot,
                queue,
                request.tag,
                slot,
            )?)?;
        }
        Ok(())
    }

    /// Completes a request after unregistering its buffer.
    pub(super) fn release(
        &mut self,
        completion: Completion,
        queue_slot: Option<QueueSlot>,
        queue: u16,
        ring: &mut Ring,
    ) -> Result<()> {
        let index = usize::from(completion.tag);
        self.unregistering[index] = Some(completion);
        let slot = self.spare[index];
        ring.push(&registration(
            sys::UBLK_U_IO_UNREGISTER_IO_BUF,
            EventKind::Unregister,
            queue_slot,
            queue,
            completion.tag,
            slot,
        )?)
    }

    /// Handles the end of a registration or unregistration. Returns a completion that can be
    /// committed now.
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
        if token.kind == EventKind::Register && result >= 0 {
            arrived.extend(self.registering[index].take());
            return Ok(None);
        }
        let slot = std::mem::replace(&mut self.spare[index], NO_SLOT);
        if token.kind == EventKind::Register || result >= 0 {
            ring.buffers.release(slot);
        } else {
            // The slot may still map the request's pages: it is never reused. The request completes
            // all the same, or its submitter would hang.
            tracing::error!(slot, errno = -result, "cannot unregister a request's buffer");
        }
        self.outstanding -= 1;
        if token.kind == EventKind::Unregister {
            return Ok(self.unregistering[index].take());
        }
        // It has no buffer and the worker has not seen it: fail it here.
        let failed = self.registering[index].take();
        Ok(failed.map(|request| crate::request::PendingRequest::new(request.tag).complete(-libc::EIO)))
    }
}

fn registration(
    opcode: u32,
    step: EventKind,
    queue_slot: Option<QueueSlot>,
    queue: u16,
    tag: Tag,
    slot: u16,
) -> Result<squeue::Entry> {
    let queue_slot = queue_slot.ok_or_else(|| Error::new(Kind::Internal, "the queue is not armed"))?;
    Ok(opcode::UringCmd16::new(queue_slot.frontend_file(), opcode)
        .cmd(io_command(queue, tag, 0, u64::from(slot)))
        .build()
        .flags(squeue::Flags::FIXED_FILE)
        .user_data(Token::pack(step, queue_slot.id, tag)))
}

/// The flags and slot with which the driver registers a tag's buffer.
fn auto_registration(slot: u16) -> u64 {
    debug_assert_ne!(slot, NO_SLOT);
    u64::from(slot) | u64::from(sys::UBLK_AUTO_BUF_REG_FALLBACK) << 16
}
