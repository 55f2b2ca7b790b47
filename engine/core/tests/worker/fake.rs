// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A fake driver: requests arrive over a channel and an eventfd, completions leave over a channel.
//!
//! Knows the interface of a transport. Does not know images, nor the tests.

use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crossbeam::channel::{Receiver, Sender, unbounded};
use io_uring::{cqueue, opcode, squeue};
use loopengine_core::error::Result;
use loopengine_core::request::{Completion, Request, Tag};
use loopengine_core::ring::{EventKind, Ring, Token};
use loopengine_core::worker::{Data, QueueSlot, Transport};
use rustix::event::{EventfdFlags, eventfd};

pub(crate) const DEPTH: u16 = 64;
pub(crate) const LEN_MAX: usize = 64 * 1024;
/// A timeout far beyond any operation of these tests.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);

/// Aligned for direct I/O.
#[repr(align(4096))]
struct Buffer([u8; LEN_MAX]);

/// A completion, and the content of the request's buffer at that time.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) tag: Tag,
    pub(crate) result: i32,
    pub(crate) data: Vec<u8>,
}

/// The worker's end.
pub(crate) struct Fake {
    wake: OwnedFd,
    wakes: Box<[u8; 8]>,
    buffers: Vec<Buffer>,
    lens: Vec<u32>,
    requests: Receiver<(Request, Vec<u8>)>,
    answers: Sender<Answer>,
    stopped: Arc<AtomicBool>,
    listening: bool,
    unanswered: usize,
    linked: bool,
    queue_slot: Option<QueueSlot>,
}

/// The user's end.
pub(crate) struct User {
    wake: OwnedFd,
    requests: Sender<(Request, Vec<u8>)>,
    answers: Receiver<Answer>,
    stopped: Arc<AtomicBool>,
}

/// A device; with `linked`, its commits can be chained to transfers.
pub(crate) fn device(linked: bool) -> (Fake, User) {
    let wake = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
    let (to_worker, requests) = unbounded();
    let (answers, from_worker) = unbounded();
    let stopped = Arc::new(AtomicBool::new(false));
    let theirs = wake.try_clone().unwrap();
    let fake = Fake {
        wake,
        wakes: Box::new([0; 8]),
        buffers: (0..DEPTH).map(|_| Buffer([0x5a; LEN_MAX])).collect(),
        lens: vec![0; usize::from(DEPTH)],
        requests,
        answers,
        stopped: stopped.clone(),
        listening: false,
        unanswered: 0,
        linked,
        queue_slot: None,
    };
    (fake, User { wake: theirs, requests: to_worker, answers: from_worker, stopped })
}

impl User {
    /// Requests that arrive together, each with the data to write.
    pub(crate) fn send(&self, requests: impl IntoIterator<Item = (Request, Vec<u8>)>) {
        requests.into_iter().for_each(|request| self.requests.send(request).unwrap());
        rustix::io::write(self.wake.as_fd(), &1u64.to_ne_bytes()).unwrap();
    }

    pub(crate) fn answer(&self) -> Answer {
        self.answers.recv_timeout(ANSWER_LIMIT).expect("an answer in time")
    }

    /// A single request.
    pub(crate) fn ask(&self, request: Request, data: &[u8]) -> Answer {
        self.send([(request, data.to_vec())]);
        let answer = self.answer();
        assert_eq!(answer.tag, request.tag);
        answer
    }

    /// The driver ends the device, after these requests.
    pub(crate) fn stop(&self, last: impl IntoIterator<Item = (Request, Vec<u8>)>) {
        let last: Vec<_> = last.into_iter().collect();
        last.into_iter().for_each(|request| self.requests.send(request).unwrap());
        self.stopped.store(true, Ordering::Release);
        self.send([]);
    }

    /// Surplus completions. The worker must have dropped its end.
    pub(crate) fn left_over(&self) -> Vec<Answer> {
        let left = std::iter::from_fn(|| self.answers.try_recv().ok()).collect();
        assert!(self.answers.recv_timeout(Duration::ZERO).is_err_and(|error| error.is_disconnected()));
        left
    }
}

impl Fake {
    fn listen(&mut self, queue_slot: QueueSlot, ring: &mut Ring) -> Result<()> {
        self.listening = true;
        let entry = opcode::Read::new(queue_slot.frontend_file(), self.wakes.as_mut_ptr(), 8).build();
        ring.push(&entry.flags(squeue::Flags::FIXED_FILE).user_data(Token::pack(
            EventKind::Fetch,
            queue_slot.id,
            0,
        )))
    }

    fn answer(&mut self, tag: Tag, result: i32) {
        let len = self.lens[usize::from(tag)] as usize;
        let data = self.buffers[usize::from(tag)].0[..len].to_vec();
        // The user detects a surplus completion.
        self.unanswered = self.unanswered.saturating_sub(1);
        let _ = self.answers.send(Answer { tag, result, data });
    }
}

impl Transport for Fake {
    fn file(&self) -> RawFd {
        self.wake.as_raw_fd()
    }

    fn depth(&self) -> u16 {
        DEPTH
    }

    fn arm(&mut self, queue_slot: QueueSlot, ring: &mut Ring) -> Result<()> {
        self.queue_slot = Some(queue_slot);
        self.listen(queue_slot, ring)
    }

    fn on_event(
        &mut self,
        token: Token,
        entry: &cqueue::Entry,
        ring: &mut Ring,
        arrived: &mut Vec<Request>,
    ) -> Result<()> {
        match token.kind {
            EventKind::Fetch => {
                self.listening = false;
                // Before the queue is drained: nothing is sent afterwards.
                let stopped = self.stopped.load(Ordering::Acquire);
                while let Ok((request, data)) = self.requests.try_recv() {
                    let tag = usize::from(request.tag);
                    self.lens[tag] = request.len.min(LEN_MAX as u32);
                    self.buffers[tag].0[..data.len()].copy_from_slice(&data);
                    self.unanswered += 1;
                    arrived.push(request);
                }
                match self.queue_slot {
                    Some(queue_slot) if !stopped => self.listen(queue_slot, ring),
                    _ => Ok(()),
                }
            }
            EventKind::Commit if entry.result() >= 0 => {
                self.answer(token.tag, self.lens[usize::from(token.tag)].cast_signed());
                Ok(())
            }
            // A commit whose transfer failed is cancelled; the worker completes the request itself.
            _ => Ok(()),
        }
    }

    fn data(&self, tag: Tag) -> Data {
        Data::Memory(self.buffers[usize::from(tag)].0.as_ptr() as usize)
    }

    fn complete(&mut self, completion: Completion, _: &mut Ring) -> Result<()> {
        self.answer(completion.tag, completion.result);
        Ok(())
    }

    fn submit_commits(&mut self, _: &mut Ring) -> Result<usize> {
        Ok(0)
    }

    fn linked_commit(&mut self, tag: Tag, _: u32) -> Option<squeue::Entry> {
        let slot = self.queue_slot.filter(|_| self.linked)?.id;
        let commit = opcode::Nop::new().build().flags(squeue::Flags::FIXED_FILE);
        Some(commit.user_data(Token::pack(EventKind::Commit, slot, tag)))
    }

    fn is_drained(&self) -> bool {
        self.stopped.load(Ordering::Acquire) && !self.listening && self.unanswered == 0
    }

    fn fallbacks(&self) -> u64 {
        0
    }

    fn is_waiting_for_buffer(&self) -> bool {
        false
    }

    fn retry_waiting(&mut self, _: &mut Ring) -> Result<()> {
        Ok(())
    }
}
