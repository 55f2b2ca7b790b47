//! The loop of one worker: drain all completions, translate, submit once, commit once.
//!
//! A worker serves queue `q` of every device of its instance on one ring. It knows queues of
//! devices and messages from the control side; it does not know instances, names or quotas.
//! Nothing in the loop allocates, logs or waits, but for the one enter that ends each round.

mod handle;
mod poll;
pub mod queue;
pub mod stats;
pub mod translate;
pub mod transport;

use std::os::fd::{AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, Sender, TryRecvError};
use io_uring::{opcode, squeue, types};

pub use handle::{Job, WorkerHandle};
pub use queue::DeviceQueue;
pub use stats::QueueStats;
pub use transport::{Data, Place, Transport};

use crate::error::{Error, Kind, Result};
use crate::ring::{Ring, Sizes, SlotId, Step, Token};
use handle::Message;
use poll::Poll;

/// File table place of the eventfd that wakes the worker.
const WAKE: types::Fixed = types::Fixed(0);

/// Switches of a worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Switches {
    /// Transfer and commit go as one chain where possible.
    pub linked_commit: bool,
    /// For how long a worker that had lone requests looks for more before it sleeps, at the most.
    pub poll: Duration,
    /// Among its disks may be some of which the kernel reads the partition table, which takes CAP_SYS_ADMIN.
    pub partscan: bool,
}

/// One worker, on its own thread.
struct Worker<T> {
    ring: Ring,
    switches: Switches,
    queues: Vec<Option<DeviceQueue<T>>>,
    /// Indices of queues with answers to send, in this round.
    touched: Vec<u16>,
    /// Queues that go as soon as nothing of them is in flight, and who waits for it.
    leaving: Vec<(SlotId, Sender<Result<()>>)>,
    /// Queues with requests that wait for a buffer slot.
    starved: Vec<u16>,
    messages: Receiver<Message<T>>,
    wake: OwnedFd,
    wake_buffer: Box<u64>,
    started: Instant,
}

impl<T: Transport> Worker<T> {
    fn new(sizes: &Sizes, switches: Switches, messages: Receiver<Message<T>>, wake: OwnedFd) -> Result<Self> {
        let mut ring = Ring::new(sizes, switches.partscan)?;
        ring.set_file(WAKE.0, wake.as_raw_fd())?;
        let mut worker = Self {
            ring,
            switches,
            queues: Vec::new(),
            touched: Vec::new(),
            leaving: Vec::new(),
            starved: Vec::new(),
            messages,
            wake,
            wake_buffer: Box::new(0),
            started: Instant::now(),
        };
        worker.listen()?;
        Ok(worker)
    }

    /// Serves until it is told to stop.
    fn run(&mut self) -> Result<()> {
        let mut want = 1;
        let mut poll = Poll::new(self.switches.poll);
        let mut completions = 0;
        loop {
            self.rest(want, &mut poll, completions)?;
            let now_ns = self.started.elapsed().as_nanos() as u64;
            let drained = self.ring.drain();
            completions = drained.len();
            let mut told = false;
            for entry in &drained {
                let Some(token) = Token::unpack(entry.user_data()) else { continue };
                if token.step == Step::Wake {
                    check_wake(entry.result())?;
                    told = true;
                    continue;
                }
                self.dispatch(token, entry, now_ns)?;
            }
            self.ring.recycle(drained);
            if !self.starved.is_empty() {
                self.feed_starved()?;
            }
            want = 1 + self.send_answers()?;
            if told && !self.listen_and_obey()? {
                return Ok(());
            }
            if !self.leaving.is_empty() {
                self.see_off();
            }
        }
    }

    /// Submits and sleeps, or looks for work for a moment before it does.
    fn rest(&mut self, want: usize, poll: &mut Poll, completions: usize) -> Result<()> {
        let Some(window) = poll.after(completions) else { return self.ring.enter(want) };
        if self.ring.has_unsubmitted() {
            self.ring.enter(0)?;
        }
        let until = Instant::now() + window;
        while !self.ring.ready() {
            // Looking at the clock takes longer than looking at the ring.
            (0..16).for_each(|_| std::hint::spin_loop());
            if Instant::now() >= until {
                poll.learn(false);
                return self.ring.enter(want);
            }
        }
        poll.learn(true);
        self.ring.enter(0)
    }

    fn dispatch(&mut self, token: Token, entry: &io_uring::cqueue::Entry, now_ns: u64) -> Result<()> {
        let slot = self.queues.get_mut(usize::from(token.slot.index)).and_then(Option::as_mut);
        // A late completion of a device that is gone: its generation is another.
        let Some(queue) = slot.filter(|queue| queue.place().slot == token.slot) else { return Ok(()) };
        if self.touched.last() != Some(&token.slot.index) {
            self.touched.push(token.slot.index);
        }
        if let Err(error) = queue.on_event(token, entry, &mut self.ring, now_ns) {
            judge(queue, error)?;
        }
        if queue.is_starved() && !self.starved.contains(&token.slot.index) {
            self.starved.push(token.slot.index);
        }
        Ok(())
    }

    /// Lets queues that wait for buffer slots have those that came free in this round.
    fn feed_starved(&mut self) -> Result<()> {
        let (queues, ring) = (&mut self.queues, &mut self.ring);
        let mut outcome = Ok(());
        self.starved.retain(|&index| {
            let Some(Some(queue)) = queues.get_mut(usize::from(index)) else { return false };
            outcome = std::mem::replace(&mut outcome, Ok(())).and(queue.retry_starved(ring));
            queue.is_starved()
        });
        outcome
    }

    /// Sends the answers of this round; returns how many completions they add at once.
    fn send_answers(&mut self) -> Result<usize> {
        let mut added = 0;
        while let Some(index) = self.touched.pop() {
            let Some(Some(queue)) = self.queues.get_mut(usize::from(index)) else { continue };
            added += queue.flush(&mut self.ring)?;
        }
        Ok(added)
    }

    /// Asks to be woken by the next message.
    fn listen(&mut self) -> Result<()> {
        let nobody = SlotId { index: 0, generation: 0 };
        let entry = opcode::Read::new(WAKE, (&raw mut *self.wake_buffer).cast(), 8)
            .build()
            .flags(squeue::Flags::FIXED_FILE)
            .user_data(Token::pack(Step::Wake, nobody, 0));
        self.ring.push(&entry)
    }

    /// Does what the control side says; false when that is to stop.
    fn listen_and_obey(&mut self) -> Result<bool> {
        self.listen()?;
        loop {
            match self.messages.try_recv() {
                Ok(Message::Add(job, reply)) => {
                    let _ = reply.send(self.add(job));
                }
                Ok(Message::Remove(slot, reply)) => self.leaving.push((slot, reply)),
                Ok(Message::Resize(slot, geometry, reply)) => {
                    let found = self.queue(slot).map(|queue| queue.set_geometry(geometry));
                    let _ = reply.send(found);
                }
                Ok(Message::Replace(slot, image, reply)) => {
                    let _ = reply.send(self.replace(slot, image));
                }
                Ok(Message::Stats(slot, reply)) => {
                    let stats = self.queue(slot).map(|queue| queue.stats());
                    let _ = reply.send(stats);
                }
                Err(TryRecvError::Empty) => return Ok(true),
                Ok(Message::Stop) | Err(TryRecvError::Disconnected) => return Ok(false),
            }
        }
    }

    fn queue(&mut self, slot: SlotId) -> Result<&mut DeviceQueue<T>> {
        self.queues
            .get_mut(usize::from(slot.index))
            .and_then(Option::as_mut)
            .filter(|queue| queue.place().slot == slot)
            .ok_or_else(|| Error::new(Kind::NotFound, "no such device on this worker"))
    }

    fn replace(&mut self, slot: SlotId, image: std::sync::Arc<crate::image::Image>) -> Result<()> {
        let queue = self.queues.get_mut(usize::from(slot.index)).and_then(Option::as_mut);
        match queue.filter(|queue| queue.place().slot == slot) {
            Some(queue) => queue.replace(image, &mut self.ring),
            None => Err(Error::new(Kind::NotFound, "no such device on this worker")),
        }
    }

    fn add(&mut self, job: Job<T>) -> Result<()> {
        let index = usize::from(job.slot.index);
        if self.queues.len() <= index {
            self.queues.resize_with(index + 1, || None);
        }
        if self.queues[index].is_some() {
            return Err(Error::new(Kind::Internal, "the slot is taken"));
        }
        let place = Place { slot: job.slot };
        let linked = self.switches.linked_commit;
        match DeviceQueue::new(place, job.transport, job.image, linked, &mut self.ring) {
            Ok(queue) => self.queues[index] = Some(queue),
            Err(error) => {
                // What stays there is replaced by the slot's next device.
                let _ = self.ring.clear_file(place.frontend().0);
                let _ = self.ring.clear_file(place.image().0);
                return Err(error);
            }
        }
        Ok(())
    }

    /// Closes queues that were to go and of which nothing is in flight any more.
    fn see_off(&mut self) {
        let (queues, ring) = (&mut self.queues, &mut self.ring);
        self.leaving.retain(|(slot, reply)| {
            let Some(place) = queues.get_mut(usize::from(slot.index)) else {
                let _ = reply.send(Ok(()));
                return false;
            };
            match place {
                Some(queue) if queue.place().slot == *slot && !queue.is_idle() => return true,
                Some(queue) if queue.place().slot == *slot => {
                    let closed = place.take().map_or(Ok(()), |queue| queue.close(ring));
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

/// A read of the eventfd that cannot work would be sent again and again.
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

/// What a failure means. Of our own books (a tag twice, no room on the ring): nothing is certain
/// any more, and the worker ends. Of the driver: this queue is not to be trusted.
fn judge<T: Transport>(queue: &mut DeviceQueue<T>, error: Error) -> Result<()> {
    if error.kind() == Kind::Internal {
        return Err(error);
    }
    tracing::error!(slot = queue.place().slot.index, %error, "a queue has failed");
    queue.set_failed();
    Ok(())
}

impl<T> Drop for Worker<T> {
    fn drop(&mut self) {
        // The eventfd read may still be in flight when the ring is closed; the kernel ends it
        // then, but not before this returns. Eight bytes are leaked rather than written to late.
        Box::leak(std::mem::take(&mut self.wake_buffer));
        let _ = &self.wake;
    }
}
