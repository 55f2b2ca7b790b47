// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The transport with one command per request: copy mode and automatic buffers.
//!
//! Every tag has one command at the driver. Its completion announces a request. The command that
//! commits this request also fetches the tag's next one.

use std::fs::File;
use std::os::fd::{AsRawFd, RawFd};

use io_uring::{cqueue, opcode, squeue};
use libublk::sys;

use super::fallback::{Fallback, io_command};
use super::memory::{CopyBuffers, Descriptors};
use crate::error::{Error, Kind, Result};
use crate::request::{Completion, Request, Tag};
use crate::ring::{EventKind, Ring, Token};
use crate::worker::{Data, QueueSlot};

/// Location of the data of this queue's requests.
#[derive(Debug)]
pub(super) enum DataBuffers {
    /// Copied by the driver.
    Copied(CopyBuffers),
    /// Registered by the driver; slots are assigned when armed.
    Registered(Fallback),
}

/// One queue.
#[derive(Debug)]
pub struct PerIo {
    file: File,
    queue: u16,
    descriptors: Descriptors,
    buffers: DataBuffers,
    partscan: bool,
    queue_slot: Option<QueueSlot>,
    /// Commands at the driver, or queued for it.
    outstanding: u16,
    depth: u16,
}

impl PerIo {
    pub(super) fn new(
        file: File,
        queue: u16,
        depth: u16,
        descriptors: Descriptors,
        buffers: DataBuffers,
        partscan: bool,
    ) -> Self {
        Self { file, queue, descriptors, buffers, partscan, queue_slot: None, outstanding: 0, depth }
    }

    pub(in crate::frontend) fn file(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    pub(in crate::frontend) fn depth(&self) -> u16 {
        self.depth
    }

    pub(in crate::frontend) fn arm(&mut self, queue_slot: QueueSlot, ring: &mut Ring) -> Result<()> {
        self.queue_slot = Some(queue_slot);
        if let DataBuffers::Registered(fallback) = &mut self.buffers {
            fallback.assign_slots(queue_slot, ring, self.depth);
        }
        for tag in 0..self.depth {
            let fetch = self.command(sys::UBLK_U_IO_FETCH_REQ, tag, -1)?;
            ring.push(&if self.partscan { ring.privileged(fetch) } else { fetch })?;
            self.outstanding += 1;
        }
        Ok(())
    }

    /// The command that commits `tag` (or only fetches), and fetches its next request.
    fn command(&self, opcode: u32, tag: Tag, result: i32) -> Result<squeue::Entry> {
        let queue_slot =
            self.queue_slot.ok_or_else(|| Error::new(Kind::Internal, "the queue is not armed"))?;
        let (address, in_entry) = match &self.buffers {
            DataBuffers::Copied(buffers) => (buffers.address(tag) as u64, 0),
            DataBuffers::Registered(fallback) => (0, fallback.auto_registration_of(tag)),
        };
        let payload = io_command(self.queue, tag, result, address);
        Ok(opcode::UringCmd16::new(queue_slot.frontend_file(), opcode)
            .cmd(payload)
            .addr(Some(in_entry))
            .build()
            .flags(squeue::Flags::FIXED_FILE)
            .user_data(Token::pack(EventKind::Fetch, queue_slot.id, tag)))
    }

    pub(in crate::frontend) fn on_event(
        &mut self,
        token: Token,
        entry: &cqueue::Entry,
        ring: &mut Ring,
        arrived: &mut Vec<Request>,
    ) -> Result<()> {
        let (tag, result) = (token.tag, entry.result());
        match token.kind {
            EventKind::Fetch if result == 0 => {
                let described = self
                    .descriptors
                    .read(tag)
                    .ok_or_else(|| Error::new(Kind::Internal, "tag out of range"))?;
                match &mut self.buffers {
                    DataBuffers::Registered(fallback) if described.needs_registration => {
                        fallback.arrived(described.request, self.queue_slot, self.queue, ring)
                    }
                    _ => {
                        arrived.push(described.request);
                        Ok(())
                    }
                }
            }
            EventKind::Fetch => {
                self.outstanding -= 1;
                match -result {
                    // The device is being stopped, or its queue cancelled.
                    libc::ENODEV | libc::ECANCELED => Ok(()),
                    errno => {
                        let error = std::io::Error::from_raw_os_error(errno);
                        Err(Error::os(error, format!("the driver refused the command of tag {tag}")))
                    }
                }
            }
            EventKind::Register | EventKind::Unregister => {
                let DataBuffers::Registered(fallback) = &mut self.buffers else { return Ok(()) };
                if let Some(completion) = fallback.on_event(token, result, ring, arrived)? {
                    ring.push(&self.command(
                        sys::UBLK_U_IO_COMMIT_AND_FETCH_REQ,
                        completion.tag,
                        completion.result,
                    )?)?;
                }
                Ok(())
            }
            _ => Ok(()),
        }
    }

    pub(in crate::frontend) fn data(&self, tag: Tag) -> Data {
        match &self.buffers {
            DataBuffers::Copied(buffers) => Data::Memory(buffers.address(tag)),
            DataBuffers::Registered(fallback) => Data::Registered(fallback.slot(tag)),
        }
    }

    pub(in crate::frontend) fn complete(&mut self, completion: Completion, ring: &mut Ring) -> Result<()> {
        if let DataBuffers::Registered(fallback) = &mut self.buffers
            && fallback.is_fallback(completion.tag)
        {
            return fallback.release(completion, self.queue_slot, self.queue, ring);
        }
        ring.push(&self.command(sys::UBLK_U_IO_COMMIT_AND_FETCH_REQ, completion.tag, completion.result)?)
    }

    pub(in crate::frontend) fn linked_commit(&mut self, tag: Tag, len: u32) -> Option<squeue::Entry> {
        if matches!(&self.buffers, DataBuffers::Registered(fallback) if fallback.is_fallback(tag)) {
            return None;
        }
        self.command(sys::UBLK_U_IO_COMMIT_AND_FETCH_REQ, tag, len.cast_signed()).ok()
    }

    pub(in crate::frontend) fn is_drained(&self) -> bool {
        self.outstanding == 0 && self.fallback().is_none_or(Fallback::is_idle)
    }

    pub(in crate::frontend) fn is_waiting_for_buffer(&self) -> bool {
        self.fallback().is_some_and(Fallback::is_waiting_for_buffer)
    }

    fn fallback(&self) -> Option<&Fallback> {
        match &self.buffers {
            DataBuffers::Copied(_) => None,
            DataBuffers::Registered(fallback) => Some(fallback),
        }
    }

    pub(in crate::frontend) fn retry_waiting(&mut self, ring: &mut Ring) -> Result<()> {
        match &mut self.buffers {
            DataBuffers::Copied(_) => Ok(()),
            DataBuffers::Registered(fallback) => fallback.retry(self.queue_slot, self.queue, ring),
        }
    }

    pub(in crate::frontend) fn fallbacks(&self) -> u64 {
        self.fallback().map_or(0, Fallback::count)
    }
}
