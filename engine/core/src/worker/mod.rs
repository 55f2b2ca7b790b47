// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The event loop of one worker: drain all completions, translate, submit once, commit once.
//!
//! A worker serves queue `q` of every device of its instance on one ring. It handles queues and
//! messages from the control side; it does not know instances, names or quotas. The loop never
//! allocates, logs or blocks, except in the io_uring_enter that ends each round.

mod clock;
mod handle;
pub mod queue;
pub mod stats;
mod throttle;
pub mod translate;
pub mod transport;

use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

use crossbeam::channel::{Receiver, Sender, TryRecvError};
use io_uring::{opcode, squeue, types};

pub use clock::RoundClock;
pub use handle::{NewQueue, WorkerHandle};
pub use queue::DeviceQueue;
pub use stats::QueueStats;
pub use throttle::{IoLimits, Throttle};
pub use transport::{Data, QueueSlot, Transport};

use crate::error::{Error, Kind, Result};
use crate::ring::{EventKind, Ring, RingSizes, SlotId, Token};
use handle::WorkerMessage;

/// Index in the file table of the eventfd that wakes the worker.
const WAKE: types::Fixed = types::Fixed(0);

/// Longest pause of a worker that holds requests for the limits of a device, which may change.
const HOLD_MAX: Duration = Duration::from_millis(100);

/// Options of a worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WorkerOptions {
    /// Submit transfer and commit as one linked chain where possible.
    pub linked_commit: bool,
    /// Some devices may use partition scanning, which needs CAP_SYS_ADMIN.
    pub partscan: bool,
    /// A worker that has nothing else to do may run an fdatasync itself, if recent ones were fast.
    pub blocking_sync: bool,
}

/// One worker, on its own thread.
struct Worker<T> {
    ring: Ring,
    options: WorkerOptions,
    queues: Vec<Option<DeviceQueue<T>>>,
    /// Indices of queues with completions to commit in this round.
    committing: Vec<u16>,
    /// Queues to remove once nothing of them is in flight, each with the channel to reply on.
    draining: Vec<(SlotId, Sender<Result<()>>)>,
    /// Queues with requests that wait for a buffer slot.
    waiting_for_buffer: Vec<u16>,
    /// Queues that hold requests for the limits of their devices.
    holding: Vec<u16>,
    messages: Receiver<WorkerMessage<T>>,
    wake: OwnedFd,
    wake_buffer: Box<u64>,
    clock: RoundClock,
}

impl<T: Transport> Worker<T> {
    fn new(
        sizes: &RingSizes,
        options: WorkerOptions,
        messages: Receiver<WorkerMessage<T>>,
        wake: OwnedFd,
    ) -> Result<Self> {
        let mut ring = Ring::new(sizes, options.partscan)?;
        ring.set_file(WAKE.0, wake.as_raw_fd())?;
        let mut worker = Self {
            ring,
            options,
            queues: Vec::new(),
            committing: Vec::new(),
            draining: Vec::new(),
            waiting_for_buffer: Vec::new(),
            holding: Vec::new(),
            messages,
            wake,
            wake_buffer: Box::new(0),
            clock: RoundClock::start(),
        };
        worker.arm_wake()?;
        Ok(worker)
    }

    /// Runs until the control side stops it.
    fn run(&mut self) -> Result<()> {
        let mut want = 1;
        let mut hold = None;
        loop {
            self.ring.enter_within(want, hold)?;
            self.clock.begin_round();
            let mut woken = false;
            // Ends: the kernel adds completions in `enter` only, to which a full submission queue leads.
            while let Some(entry) = self.ring.next_completion() {
                let Some(token) = Token::unpack(entry.user_data()) else { continue };
                if token.kind == EventKind::Wake {
                    check_wake(entry.result())?;
                    woken = true;
                    continue;
                }
                self.dispatch(token, &entry)?;
            }
            if !self.waiting_for_buffer.is_empty() {
                self.retry_waiting()?;
            }
            hold = if self.holding.is_empty() { None } else { self.release_held()? };
            self.start_flushes()?;
            want = 1 + self.submit_commits()?;
            if woken && !self.handle_messages()? {
                return Ok(());
            }
            if !self.draining.is_empty() {
                self.remove_drained();
            }
        }
    }

    fn dispatch(&mut self, token: Token, entry: &io_uring::cqueue::Entry) -> Result<()> {
        let slot = self.queues.get_mut(usize::from(token.slot.index)).and_then(Option::as_mut);
        // A late completion of a removed device has an older generation.
        let Some(queue) = slot.filter(|queue| queue.queue_slot().id == token.slot) else { return Ok(()) };
        if self.committing.last() != Some(&token.slot.index) {
            self.committing.push(token.slot.index);
        }
        if let Err(error) = queue.on_event(token, entry, &mut self.ring, &self.clock) {
            handle_queue_error(queue, error)?;
        }
        if queue.is_waiting_for_buffer() && !self.waiting_for_buffer.contains(&token.slot.index) {
            self.waiting_for_buffer.push(token.slot.index);
        }
        if queue.held_for_ns().is_some() && !self.holding.contains(&token.slot.index) {
            self.holding.push(token.slot.index);
        }
        Ok(())
    }

    /// Accepts held requests that the limits admit now. Returns the pause until the next attempt.
    fn release_held(&mut self) -> Result<Option<Duration>> {
        let mut hold = None;
        for position in (0..self.holding.len()).rev() {
            let index = self.holding[position];
            let queue = self.queues.get_mut(usize::from(index)).and_then(Option::as_mut);
            let wait_ns = match queue {
                None => None,
                Some(queue) => {
                    if let Err(error) = queue.release_held(&mut self.ring, &self.clock) {
                        handle_queue_error(queue, error)?;
                    }
                    if !self.committing.contains(&index) {
                        self.committing.push(index);
                    }
                    queue.held_for_ns()
                }
            };
            match wait_ns.map(Duration::from_nanos) {
                None => drop(self.holding.swap_remove(position)),
                Some(wait) => hold = Some(hold.unwrap_or(HOLD_MAX).min(wait)),
            }
        }
        Ok(hold)
    }

    /// Retries the requests that wait for a buffer slot.
    fn retry_waiting(&mut self) -> Result<()> {
        let (queues, ring) = (&mut self.queues, &mut self.ring);
        let mut outcome = Ok(());
        self.waiting_for_buffer.retain(|&index| {
            let Some(Some(queue)) = queues.get_mut(usize::from(index)) else { return false };
            outcome = std::mem::replace(&mut outcome, Ok(())).and(queue.retry_waiting(ring));
            queue.is_waiting_for_buffer()
        });
        outcome
    }

    /// Starts the flushes of this round, and those that waited for one that has ended.
    fn start_flushes(&mut self) -> Result<()> {
        for position in 0..self.committing.len() {
            let index = usize::from(self.committing[position]);
            let (before, rest) = self.queues.split_at_mut(index);
            let Some((Some(queue), after)) = rest.split_first_mut() else { continue };
            let is_idle =
                |queues: &[Option<DeviceQueue<T>>]| queues.iter().flatten().all(|one| one.busy() == 0);
            let worker_is_idle = || self.options.blocking_sync && is_idle(before) && is_idle(after);
            if let Err(error) = queue.start_flush(worker_is_idle, &mut self.ring, &self.clock) {
                handle_queue_error(queue, error)?;
            }
        }
        Ok(())
    }

    /// Commits the completions of this round. Returns how many CQEs the commits add at once.
    fn submit_commits(&mut self) -> Result<usize> {
        let mut added = 0;
        while let Some(index) = self.committing.pop() {
            let Some(Some(queue)) = self.queues.get_mut(usize::from(index)) else { continue };
            added += queue.submit_commits(&mut self.ring)?;
        }
        Ok(added)
    }

    /// Reads the eventfd, so that the next message wakes the worker.
    fn arm_wake(&mut self) -> Result<()> {
        let no_slot = SlotId { index: 0, generation: 0 };
        let entry = opcode::Read::new(WAKE, (&raw mut *self.wake_buffer).cast(), 8)
            .build()
            .flags(squeue::Flags::FIXED_FILE)
            .user_data(Token::pack(EventKind::Wake, no_slot, 0));
        self.ring.push(&entry)
    }

    /// Handles all pending messages. Returns false after a stop message.
    fn handle_messages(&mut self) -> Result<bool> {
        self.arm_wake()?;
        loop {
            match self.messages.try_recv() {
                Ok(WorkerMessage::Add(queue, reply)) => {
                    let _ = reply.send(self.add(queue));
                }
                Ok(WorkerMessage::Remove(slot, reply)) => self.draining.push((slot, reply)),
                Ok(WorkerMessage::Resize(slot, geometry, reply)) => {
                    let outcome = self.queue(slot).map(|queue| queue.set_geometry(geometry));
                    let _ = reply.send(outcome);
                }
                Ok(WorkerMessage::Replace(slot, image, reply)) => {
                    let _ = reply.send(self.replace(slot, image));
                }
                Ok(WorkerMessage::Stats(slot, reply)) => {
                    let stats = self.queue(slot).map(|queue| queue.stats());
                    let _ = reply.send(stats);
                }
                Err(TryRecvError::Empty) => return Ok(true),
                Ok(WorkerMessage::Stop) | Err(TryRecvError::Disconnected) => return Ok(false),
            }
        }
    }

    fn queue(&mut self, slot: SlotId) -> Result<&mut DeviceQueue<T>> {
        self.queues
            .get_mut(usize::from(slot.index))
            .and_then(Option::as_mut)
            .filter(|queue| queue.queue_slot().id == slot)
            .ok_or_else(|| Error::new(Kind::NotFound, "no such device on this worker"))
    }

    fn replace(&mut self, slot: SlotId, image: std::sync::Arc<crate::image::Image>) -> Result<()> {
        let queue = self.queues.get_mut(usize::from(slot.index)).and_then(Option::as_mut);
        match queue.filter(|queue| queue.queue_slot().id == slot) {
            Some(queue) => queue.replace(image, &mut self.ring),
            None => Err(Error::new(Kind::NotFound, "no such device on this worker")),
        }
    }

    fn add(&mut self, queue: NewQueue<T>) -> Result<()> {
        let index = usize::from(queue.slot.index);
        if self.queues.len() <= index {
            self.queues.resize_with(index + 1, || None);
        }
        if self.queues[index].is_some() {
            return Err(Error::new(Kind::Internal, "the queue slot is in use"));
        }
        let queue_slot = QueueSlot { id: queue.slot };
        let linked = self.options.linked_commit;
        let NewQueue { transport, image, throttle, .. } = queue;
        match DeviceQueue::new(queue_slot, transport, image, throttle, linked, &mut self.ring) {
            Ok(queue) => self.queues[index] = Some(queue),
            Err(error) => {
                // The slot's next device overwrites an entry that stays.
                let _ = self.ring.clear_file(queue_slot.frontend_file().0);
                let _ = self.ring.clear_file(queue_slot.image_file().0);
                return Err(error);
            }
        }
        Ok(())
    }

    /// Closes the draining queues of which nothing is in flight any more.
    fn remove_drained(&mut self) {
        let (queues, ring) = (&mut self.queues, &mut self.ring);
        self.draining.retain(|(slot, reply)| {
            let Some(entry) = queues.get_mut(usize::from(slot.index)) else {
                let _ = reply.send(Ok(()));
                return false;
            };
            match entry {
                Some(queue) if queue.queue_slot().id == *slot && !queue.is_idle() => return true,
                Some(queue) if queue.queue_slot().id == *slot => {
                    let closed = entry.take().map_or(Ok(()), |queue| queue.close(ring));
                    let _ = reply.send(closed);
                }
                _ => {
                    let _ = reply.send(Ok(()));
                }
            }
            false
        });
    }
}

/// Rejects a failed eventfd read: repeating it would loop.
fn check_wake(result: i32) -> Result<()> {
    match -result {
        libc::EINTR | libc::EAGAIN | libc::ECANCELED => Ok(()),
        errno if errno > 0 => {
            let error = std::io::Error::from_raw_os_error(errno);
            Err(Error::os(error, "a worker cannot read its eventfd").with_kind(Kind::Internal))
        }
        _ => Ok(()),
    }
}

/// Decides what an error of a queue means. An inconsistency of our own state (a duplicate tag, a
/// full ring) ends the worker. An error of the driver marks the queue as failed.
fn handle_queue_error<T: Transport>(queue: &mut DeviceQueue<T>, error: Error) -> Result<()> {
    if error.kind() == Kind::Internal {
        return Err(error);
    }
    tracing::error!(slot = queue.queue_slot().id.index, %error, "a queue has failed");
    queue.set_failed();
    Ok(())
}

impl<T> Drop for Worker<T> {
    fn drop(&mut self) {
        // The eventfd read may still be in flight when the ring closes. The kernel ends it later,
        // so the eight bytes are leaked rather than freed under it.
        Box::leak(std::mem::take(&mut self.wake_buffer));
        let _ = &self.wake;
    }
}
