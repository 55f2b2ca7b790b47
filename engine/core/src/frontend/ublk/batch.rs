// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The batch transport: one multishot fetch announces many requests, one commit completes many.
//!
//! The driver may consume only part of a commit of several completions; the rest is resubmitted. It
//! consumes or rejects a commit of one as a whole, so its completion matters only on failure.

use std::fs::File;
use std::os::fd::{AsRawFd, RawFd};

use io_uring::{cqueue, opcode, squeue};
use libublk::sys;

use super::fallback::Fallback;
use super::memory::Descriptors;
use crate::error::{Error, Kind, Result};
use crate::request::{Completion, Request, Tag};
use crate::ring::setup::ARRIVAL_GROUP;
use crate::ring::{EventKind, Ring, Token};
use crate::worker::{Data, QueueSlot};

type Element = sys::ublk_elem_header;
const ELEMENT_BYTES: usize = size_of::<Element>();
/// Token tag of a commit of one completion.
const SINGLE_COMMIT: Tag = Tag::MAX;

/// A commit of several completions: the driver reads the elements until it has consumed them.
#[derive(Debug, Default)]
struct Commit {
    elements: Vec<Element>,
    consumed: usize,
    in_flight: bool,
}

/// One queue.
#[derive(Debug)]
pub struct Batch {
    file: File,
    queue: u16,
    depth: u16,
    descriptors: Descriptors,
    fallback: Fallback,
    partscan: bool,
    queue_slot: Option<QueueSlot>,
    /// All tags, for the command that prepares them.
    prepared: Vec<Element>,
    /// Prepare, fetch and multi-element commit commands at the driver.
    outstanding: usize,
    /// The driver has ended the fetch for good, or the tags were not prepared.
    ended: bool,
    pending_commits: Vec<Element>,
    /// One element per tag, for commits of one: the tag is not reused before the driver has
    /// consumed it.
    single_elements: Box<[Element]>,
    commits: Vec<Commit>,
}

impl Batch {
    pub(super) fn new(file: File, queue: u16, depth: u16, descriptors: Descriptors, partscan: bool) -> Self {
        Self {
            file,
            queue,
            depth,
            descriptors,
            fallback: Fallback::new(),
            partscan,
            queue_slot: None,
            prepared: Vec::new(),
            outstanding: 0,
            ended: false,
            pending_commits: Vec::with_capacity(usize::from(depth)),
            single_elements: vec![Element::default(); usize::from(depth)].into(),
            commits: Vec::new(),
        }
    }

    pub(in crate::frontend) fn file(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    pub(in crate::frontend) fn depth(&self) -> u16 {
        self.depth
    }

    pub(in crate::frontend) fn is_waiting_for_buffer(&self) -> bool {
        self.fallback.is_waiting_for_buffer()
    }

    pub(in crate::frontend) fn fallbacks(&self) -> u64 {
        self.fallback.count()
    }

    pub(in crate::frontend) fn is_drained(&self) -> bool {
        self.ended && self.outstanding == 0 && self.fallback.is_idle()
    }

    pub(in crate::frontend) fn data(&self, tag: Tag) -> Data {
        Data::Registered(self.fallback.slot(tag))
    }

    /// Prepares the tags; the fetch follows once the driver has done so.
    pub(in crate::frontend) fn arm(&mut self, queue_slot: QueueSlot, ring: &mut Ring) -> Result<()> {
        self.queue_slot = Some(queue_slot);
        self.fallback.assign_slots(queue_slot, ring, self.depth);
        self.prepared = (0..self.depth).map(|tag| self.element(tag, 0)).collect();
        self.outstanding += 1;
        let command = self.command(sys::UBLK_U_IO_PREP_IO_CMDS, &self.prepared)?;
        let command = if self.partscan { ring.privileged(command) } else { command };
        ring.push(&command.user_data(Token::pack(EventKind::Prepare, queue_slot.id, 0)))
    }

    fn element(&self, tag: Tag, result: i32) -> Element {
        Element { tag, buf_index: self.fallback.auto_slot(tag), result }
    }

    /// A command with these elements, which must stay in place until it completes.
    fn command(&self, opcode: u32, elements: &[Element]) -> Result<squeue::Entry> {
        let queue_slot =
            self.queue_slot.ok_or_else(|| Error::new(Kind::Internal, "the queue is not armed"))?;
        let header = sys::ublk_batch_io {
            q_id: self.queue,
            flags: sys::UBLK_BATCH_F_AUTO_BUF_REG_FALLBACK as u16,
            nr_elem: elements.len() as u16,
            elem_bytes: ELEMENT_BYTES as u8,
            ..Default::default()
        };
        Ok(opcode::UringCmd16::new(queue_slot.frontend_file(), opcode)
            .cmd(payload(header))
            .addr(Some(elements.as_ptr() as u64))
            .build()
            .flags(squeue::Flags::FIXED_FILE))
    }

    fn fetch(&mut self, ring: &mut Ring) -> Result<()> {
        let queue_slot =
            self.queue_slot.ok_or_else(|| Error::new(Kind::Internal, "the queue is not armed"))?;
        let header =
            sys::ublk_batch_io { q_id: self.queue, elem_bytes: size_of::<Tag>() as u8, ..Default::default() };
        let entry = opcode::UringCmd16::new(queue_slot.frontend_file(), sys::UBLK_U_IO_FETCH_IO_CMDS)
            .cmd(payload(header))
            .build()
            .flags(squeue::Flags::FIXED_FILE | squeue::Flags::BUFFER_SELECT)
            .user_data(Token::pack(EventKind::Fetch, queue_slot.id, 0));
        self.outstanding += 1;
        ring.push(&multishot(entry, ARRIVAL_GROUP))
    }

    pub(in crate::frontend) fn on_event(
        &mut self,
        token: Token,
        entry: &cqueue::Entry,
        ring: &mut Ring,
        arrived: &mut Vec<Request>,
    ) -> Result<()> {
        let result = entry.result();
        match token.kind {
            EventKind::Prepare => {
                self.outstanding -= 1;
                self.prepared = Vec::new();
                if result < 0 {
                    self.ended = true;
                    return Err(driver_error(result, "the preparation of the tags"));
                }
                self.fetch(ring)
            }
            EventKind::Fetch => self.on_fetch(entry, ring, arrived),
            EventKind::Commit => self.on_commit(token, result, ring),
            EventKind::Register | EventKind::Unregister => {
                if let Some(completion) = self.fallback.on_event(token, result, ring, arrived)? {
                    let element = self.element(completion.tag, completion.result);
                    self.pending_commits.push(element);
                }
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn on_fetch(&mut self, entry: &cqueue::Entry, ring: &mut Ring, arrived: &mut Vec<Request>) -> Result<()> {
        let result = entry.result();
        let mut faults = Ok(());
        if let Some(id) = cqueue::buffer_select(entry.flags()) {
            let bytes = usize::try_from(result).unwrap_or(0);
            let mut needs_fallback = Vec::new();
            match ring.arrivals.tags(id, bytes) {
                Some(tags) => {
                    for &tag in tags {
                        match self.descriptors.read(tag) {
                            Some(described) if described.needs_registration => {
                                needs_fallback.push(described.request)
                            }
                            Some(described) => arrived.push(described.request),
                            None => faults = Err(Error::new(Kind::Internal, "tag out of range")),
                        }
                    }
                    ring.arrivals.provide(id);
                }
                None => faults = Err(Error::new(Kind::Internal, "arrival buffer out of range")),
            }
            for request in needs_fallback {
                self.fallback.arrived(request, self.queue_slot, self.queue, ring)?;
            }
        }
        if cqueue::more(entry.flags()) {
            return faults;
        }
        self.outstanding -= 1;
        match -result {
            libc::ENODEV | libc::ECANCELED => self.ended = true,
            // The arrival buffers ran out, or the kernel ended the multishot. The tags stay queued
            // at the driver.
            errno
                if errno <= 0
                    || matches!(errno, libc::ENOBUFS | libc::ENOMEM | libc::EAGAIN | libc::EINTR) =>
            {
                self.fetch(ring)?;
            }
            _ => {
                self.ended = true;
                return Err(driver_error(result, "the fetch of requests"));
            }
        }
        faults
    }

    pub(in crate::frontend) fn complete(&mut self, completion: Completion, ring: &mut Ring) -> Result<()> {
        if self.fallback.is_fallback(completion.tag) {
            return self.fallback.release(completion, self.queue_slot, self.queue, ring);
        }
        let element = self.element(completion.tag, completion.result);
        self.pending_commits.push(element);
        Ok(())
    }

    pub(in crate::frontend) fn submit_commits(&mut self, ring: &mut Ring) -> Result<usize> {
        match *self.pending_commits {
            [] => Ok(0),
            [one] => {
                self.pending_commits.clear();
                let entry = self.single(one)?;
                ring.push(&entry)?;
                Ok(0)
            }
            _ => {
                let number = match self.commits.iter().position(|commit| !commit.in_flight) {
                    Some(number) => number,
                    None => {
                        let elements = Vec::with_capacity(usize::from(self.depth));
                        self.commits.push(Commit { elements, ..Commit::default() });
                        self.commits.len() - 1
                    }
                };
                let commit = &mut self.commits[number];
                std::mem::swap(&mut commit.elements, &mut self.pending_commits);
                commit.consumed = 0;
                commit.in_flight = true;
                self.outstanding += 1;
                self.send(number, ring)?;
                Ok(1)
            }
        }
    }

    fn send(&self, number: usize, ring: &mut Ring) -> Result<()> {
        let commit = &self.commits[number];
        let entry = self.command(sys::UBLK_U_IO_COMMIT_IO_CMDS, &commit.elements[commit.consumed..])?;
        let slot = self
            .queue_slot
            .map(|queue_slot| queue_slot.id)
            .ok_or_else(|| Error::new(Kind::Internal, "not armed"))?;
        ring.push(&entry.user_data(Token::pack(EventKind::Commit, slot, number as Tag)))
    }

    /// The commit of one completion. It posts a CQE only on failure.
    fn single(&mut self, element: Element) -> Result<squeue::Entry> {
        let index = usize::from(element.tag);
        self.single_elements[index] = element;
        let entry = self.command(sys::UBLK_U_IO_COMMIT_IO_CMDS, &self.single_elements[index..=index])?;
        let slot = self
            .queue_slot
            .map(|queue_slot| queue_slot.id)
            .ok_or_else(|| Error::new(Kind::Internal, "not armed"))?;
        Ok(entry.flags(squeue::Flags::SKIP_SUCCESS).user_data(Token::pack(
            EventKind::Commit,
            slot,
            SINGLE_COMMIT,
        )))
    }

    fn on_commit(&mut self, token: Token, result: i32, ring: &mut Ring) -> Result<()> {
        if token.tag == SINGLE_COMMIT {
            return match -result {
                // The device was removed with the request. (A chain that breaks at its transfer
                // posts nothing here: the kernel skips the CQEs of what it cancels.)
                errno if errno <= 0 || errno == libc::ENODEV => Ok(()),
                _ => Err(driver_error(result, "a commit")),
            };
        }
        let number = usize::from(token.tag);
        let Some(commit) = self.commits.get_mut(number) else {
            return Err(Error::new(Kind::Internal, "a commit completed that was never submitted"));
        };
        let consumed = usize::try_from(result).unwrap_or(0) / ELEMENT_BYTES;
        commit.consumed += consumed;
        self.outstanding -= 1;
        let retry = matches!(-result, libc::EAGAIN | libc::EINTR | libc::ENOMEM);
        if consumed == 0 && !retry && commit.consumed < commit.elements.len() {
            // The driver rejects the first remaining element: give up only this one.
            commit.consumed += 1;
        }
        if commit.consumed < commit.elements.len() {
            self.outstanding += 1;
            self.send(number, ring)?;
        } else {
            commit.in_flight = false;
            commit.elements.clear();
        }
        if result < 0 && !retry && result != -libc::ENODEV {
            Err(driver_error(result, "a commit"))
        } else {
            Ok(())
        }
    }

    pub(in crate::frontend) fn linked_commit(&mut self, tag: Tag, len: u32) -> Option<squeue::Entry> {
        if self.fallback.is_fallback(tag) {
            return None;
        }
        self.single(self.element(tag, len.cast_signed())).ok()
    }

    pub(in crate::frontend) fn retry_waiting(&mut self, ring: &mut Ring) -> Result<()> {
        self.fallback.retry(self.queue_slot, self.queue, ring)
    }
}

fn driver_error(result: i32, what: &str) -> Error {
    Error::os(std::io::Error::from_raw_os_error(-result), format!("the driver refused {what}"))
}

fn payload(header: sys::ublk_batch_io) -> [u8; 16] {
    // SAFETY: 2 + 2 + 2 + 1 + 1 + 8 bytes of plain integers, without padding.
    unsafe { std::mem::transmute(header) }
}

/// Makes a command multishot, with buffers of `group`: io-uring 0.7 has no setters for these
/// fields.
fn multishot(mut entry: squeue::Entry, group: u16) -> squeue::Entry {
    /// Byte offsets in `struct io_uring_sqe` of <linux/io_uring.h>.
    const URING_CMD_FLAGS: usize = 28;
    const BUF_GROUP: usize = 40;
    const IORING_URING_CMD_MULTISHOT: u32 = 1 << 1;
    const { assert!(size_of::<squeue::Entry>() == 64) };
    // SAFETY: an entry is the kernel's 64-byte structure (asserted above), owned by us; both
    // fields are plain integers inside it, written unaligned to ask nothing of its alignment.
    unsafe {
        let bytes = (&raw mut entry).cast::<u8>();
        bytes.add(URING_CMD_FLAGS).cast::<u32>().write_unaligned(IORING_URING_CMD_MULTISHOT);
        bytes.add(BUF_GROUP).cast::<u16>().write_unaligned(group);
    }
    entry
}
