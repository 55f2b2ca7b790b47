//! The transport with one command a batch: one multishot fetch announces many requests, one
//! commit answers many.
//!
//! A commit of several answers may be taken in part; the rest is sent again. A commit of a single
//! one is taken or refused, so that its completion is only wanted when it is refused.

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
/// Tag of the token of a commit of one answer.
const SINGLE: Tag = Tag::MAX;

/// A commit of several answers: the driver reads the elements until it has taken them.
#[derive(Debug, Default)]
struct Commit {
    elements: Vec<Element>,
    taken: usize,
    busy: bool,
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
    /// All tags, for the command that announces them.
    prepared: Vec<Element>,
    /// Prepare, fetch and counted commits at the driver.
    outstanding: usize,
    /// The driver has ended the fetch for good, or the tags were not announced.
    ended: bool,
    collected: Vec<Element>,
    /// One element a tag, for commits of one: the tag is not used again before it was taken.
    singles: Box<[Element]>,
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
            collected: Vec::with_capacity(usize::from(depth)),
            singles: vec![Element::default(); usize::from(depth)].into(),
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

    /// Announces the tags; the fetch follows once the driver has taken note of them.
    pub(in crate::frontend) fn arm(&mut self, queue_slot: QueueSlot, ring: &mut Ring) -> Result<()> {
        self.queue_slot = Some(queue_slot);
        self.fallback.assign(queue_slot, ring, self.depth);
        self.prepared = (0..self.depth).map(|tag| self.element(tag, 0)).collect();
        self.outstanding += 1;
        let command = self.command(sys::UBLK_U_IO_PREP_IO_CMDS, &self.prepared)?;
        let command = if self.partscan { ring.privileged(command) } else { command };
        ring.push(&command.user_data(Token::pack(EventKind::Prepare, queue_slot.id, 0)))
    }

    fn element(&self, tag: Tag, result: i32) -> Element {
        Element { tag, buf_index: self.fallback.auto_slot(tag), result }
    }

    /// A command about these elements, which must stay where they are until it has ended.
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
                    return Err(refused(result, "announcing the tags"));
                }
                self.fetch(ring)
            }
            EventKind::Fetch => self.on_fetch(entry, ring, arrived),
            EventKind::Commit => self.on_commit(token, result, ring),
            EventKind::Register | EventKind::Unregister => {
                if let Some(completion) = self.fallback.on_event(token, result, ring, arrived)? {
                    let element = self.element(completion.tag, completion.result);
                    self.collected.push(element);
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
            // The arrival buffers had run out, or the multishot ended for reasons of its own: the
            // tags stay queued at the driver.
            errno
                if errno <= 0
                    || matches!(errno, libc::ENOBUFS | libc::ENOMEM | libc::EAGAIN | libc::EINTR) =>
            {
                self.fetch(ring)?;
            }
            _ => {
                self.ended = true;
                return Err(refused(result, "fetching requests"));
            }
        }
        faults
    }

    pub(in crate::frontend) fn complete(&mut self, completion: Completion, ring: &mut Ring) -> Result<()> {
        if self.fallback.holds(completion.tag) {
            return self.fallback.release(completion, self.queue_slot, self.queue, ring);
        }
        let element = self.element(completion.tag, completion.result);
        self.collected.push(element);
        Ok(())
    }

    pub(in crate::frontend) fn submit_commits(&mut self, ring: &mut Ring) -> Result<usize> {
        match *self.collected {
            [] => Ok(0),
            [one] => {
                self.collected.clear();
                let entry = self.single(one)?;
                ring.push(&entry)?;
                Ok(0)
            }
            _ => {
                let number = match self.commits.iter().position(|commit| !commit.busy) {
                    Some(number) => number,
                    None => {
                        let elements = Vec::with_capacity(usize::from(self.depth));
                        self.commits.push(Commit { elements, ..Commit::default() });
                        self.commits.len() - 1
                    }
                };
                let commit = &mut self.commits[number];
                std::mem::swap(&mut commit.elements, &mut self.collected);
                commit.taken = 0;
                commit.busy = true;
                self.outstanding += 1;
                self.send(number, ring)?;
                Ok(1)
            }
        }
    }

    fn send(&self, number: usize, ring: &mut Ring) -> Result<()> {
        let commit = &self.commits[number];
        let entry = self.command(sys::UBLK_U_IO_COMMIT_IO_CMDS, &commit.elements[commit.taken..])?;
        let slot = self
            .queue_slot
            .map(|queue_slot| queue_slot.id)
            .ok_or_else(|| Error::new(Kind::Internal, "not armed"))?;
        ring.push(&entry.user_data(Token::pack(EventKind::Commit, slot, number as Tag)))
    }

    /// The commit of one answer, which completes only when it is refused.
    fn single(&mut self, element: Element) -> Result<squeue::Entry> {
        let index = usize::from(element.tag);
        self.singles[index] = element;
        let entry = self.command(sys::UBLK_U_IO_COMMIT_IO_CMDS, &self.singles[index..=index])?;
        let slot = self
            .queue_slot
            .map(|queue_slot| queue_slot.id)
            .ok_or_else(|| Error::new(Kind::Internal, "not armed"))?;
        Ok(entry.flags(squeue::Flags::SKIP_SUCCESS).user_data(Token::pack(EventKind::Commit, slot, SINGLE)))
    }

    fn on_commit(&mut self, token: Token, result: i32, ring: &mut Ring) -> Result<()> {
        if token.tag == SINGLE {
            return match -result {
                // The device went away with the request. (Of a chain that broke at its transfer nothing is
                // seen here: the kernel skips the completions of what it cancels then.)
                errno if errno <= 0 || errno == libc::ENODEV => Ok(()),
                _ => Err(refused(result, "an answer")),
            };
        }
        let number = usize::from(token.tag);
        let Some(commit) = self.commits.get_mut(number) else {
            return Err(Error::new(Kind::Internal, "a commit ended that was never sent"));
        };
        let taken = usize::try_from(result).unwrap_or(0) / ELEMENT_BYTES;
        commit.taken += taken;
        self.outstanding -= 1;
        let retry = matches!(-result, libc::EAGAIN | libc::EINTR | libc::ENOMEM);
        if taken == 0 && !retry && commit.taken < commit.elements.len() {
            // The driver refuses the first of those left: only this one is given up.
            commit.taken += 1;
        }
        if commit.taken < commit.elements.len() {
            self.outstanding += 1;
            self.send(number, ring)?;
        } else {
            commit.busy = false;
            commit.elements.clear();
        }
        if result < 0 && !retry && result != -libc::ENODEV {
            Err(refused(result, "an answer"))
        } else {
            Ok(())
        }
    }

    pub(in crate::frontend) fn linked_commit(&mut self, tag: Tag, len: u32) -> Option<squeue::Entry> {
        if self.fallback.holds(tag) {
            return None;
        }
        self.single(self.element(tag, len.cast_signed())).ok()
    }

    pub(in crate::frontend) fn retry_waiting(&mut self, ring: &mut Ring) -> Result<()> {
        self.fallback.retry(self.queue_slot, self.queue, ring)
    }
}

fn refused(result: i32, what: &str) -> Error {
    Error::os(std::io::Error::from_raw_os_error(-result), format!("the driver refused {what}"))
}

fn payload(header: sys::ublk_batch_io) -> [u8; 16] {
    // SAFETY: 2 + 2 + 2 + 1 + 1 + 8 bytes of plain integers, without padding.
    unsafe { std::mem::transmute(header) }
}

/// Makes a command multishot, with buffers of `group`: io-uring 0.7 has no setters for these two
/// fields of a command's entry.
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
