//! The control side of a worker: starts it, sends it messages, waits for its answers with a
//! deadline.
//!
//! The channel carries devices that come and go, never a request.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, Sender, bounded};
use rustix::event::{EventfdFlags, eventfd};

use super::{QueueStats, Switches, Transport, Worker};
use crate::error::{Error, Kind, Result};
use crate::image::{Geometry, Image};
use crate::ring::{Sizes, SlotId};
use crate::{failures, sandbox, sys};

/// How long a worker may take to answer a message. It never waits for anything but work.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);
/// Messages that may wait for a worker.
const BACKLOG: usize = 64;

/// A queue to serve.
#[derive(Debug)]
pub struct Job<T> {
    /// Where on the ring.
    pub slot: SlotId,
    /// The driver's side.
    pub transport: T,
    /// The image.
    pub image: Arc<Image>,
}

pub(super) enum Message<T> {
    Add(Job<T>, Sender<Result<()>>),
    Remove(SlotId, Sender<Result<()>>),
    Resize(SlotId, Geometry, Sender<Result<()>>),
    Replace(SlotId, Arc<Image>, Sender<Result<()>>),
    Stats(SlotId, Sender<Result<QueueStats>>),
    Stop,
}

/// A running worker.
#[derive(Debug)]
pub struct WorkerHandle<T> {
    name: String,
    messages: Sender<Message<T>>,
    wake: OwnedFd,
    thread: Option<JoinHandle<()>>,
}

impl<T: Transport> WorkerHandle<T> {
    /// Starts a worker on the given CPUs (all when there are none) and waits until its ring is up.
    pub fn start(name: String, sizes: Sizes, switches: Switches, cpus: Vec<usize>) -> Result<Self> {
        failures::start_reporter();
        let wake =
            eventfd(0, EventfdFlags::CLOEXEC).map_err(|error| Error::os(error, "cannot make an eventfd"))?;
        let theirs = wake.try_clone().map_err(|error| Error::os(error, "cannot duplicate an eventfd"))?;
        let (messages, inbox) = bounded(BACKLOG);
        let (up, is_up) = bounded(1);
        let thread = std::thread::Builder::new()
            .name(name.chars().take(15).collect())
            .spawn(move || serve(&sizes, switches, &cpus, inbox, theirs, &up))
            .map_err(|error| Error::os(error, "cannot start a worker thread"))?;
        let handle = Self { name, messages, wake, thread: Some(thread) };
        handle.answer(&is_up)?;
        Ok(handle)
    }

    /// Serves one more queue.
    pub fn add(&self, job: Job<T>) -> Result<()> {
        self.ask(|reply| Message::Add(job, reply))
    }

    /// Serves it no more. The driver must have ended it before; returns once nothing of it is in
    /// flight.
    pub fn remove(&self, slot: SlotId) -> Result<()> {
        self.ask(|reply| Message::Remove(slot, reply))
    }

    /// The image has another size now.
    pub fn resize(&self, slot: SlotId, geometry: Geometry) -> Result<()> {
        self.ask(|reply| Message::Resize(slot, geometry, reply))
    }

    /// The device shows another image from now on. What is in flight ends on the old one.
    pub fn replace(&self, slot: SlotId, image: Arc<Image>) -> Result<()> {
        self.ask(|reply| Message::Replace(slot, image, reply))
    }

    /// The figures of a queue.
    pub fn stats(&self, slot: SlotId) -> Result<QueueStats> {
        self.ask(|reply| Message::Stats(slot, reply))
    }

    fn ask<A>(&self, message: impl FnOnce(Sender<Result<A>>) -> Message<T>) -> Result<A> {
        let (reply, answer) = bounded(1);
        self.send(message(reply))?;
        self.answer(&answer)
    }

    fn send(&self, message: Message<T>) -> Result<()> {
        self.messages
            .send_timeout(message, ANSWER_LIMIT)
            .map_err(|_| Error::new(Kind::Deadline, format!("worker {} takes no messages", self.name)))?;
        rustix::io::write(self.wake.as_fd(), &1u64.to_ne_bytes())
            .map(drop)
            .map_err(|error| Error::os(error, format!("cannot wake worker {}", self.name)))
    }

    fn answer<A>(&self, answer: &Receiver<Result<A>>) -> Result<A> {
        answer.recv_timeout(ANSWER_LIMIT).unwrap_or_else(|_| {
            let context = format!("worker {} did not answer within {} s", self.name, ANSWER_LIMIT.as_secs());
            Err(Error::new(Kind::Deadline, context))
        })
    }
}

impl<T> Drop for WorkerHandle<T> {
    /// Ends the worker; one that does not end in time is left behind.
    fn drop(&mut self) {
        // Should either fail, the worker does not end, which is seen below.
        let _ = self.messages.send_timeout(Message::Stop, ANSWER_LIMIT);
        let _ = rustix::io::write(self.wake.as_fd(), &1u64.to_ne_bytes());
        let Some(thread) = self.thread.take() else { return };
        let deadline = Instant::now() + ANSWER_LIMIT;
        while !thread.is_finished() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
        if thread.is_finished() {
            let _ = thread.join();
        } else {
            tracing::error!(worker = self.name, "did not end in time");
        }
    }
}

/// A worker's thread from its first to its last line.
fn serve<T: Transport>(
    sizes: &Sizes,
    switches: Switches,
    cpus: &[usize],
    inbox: Receiver<Message<T>>,
    wake: OwnedFd,
    up: &Sender<Result<()>>,
) {
    if let Err(error) = sys::run_on(cpus) {
        let _ = up.send(Err(error));
        return;
    }
    sys::declare_io_flusher();
    match switches.partscan {
        true => sandbox::prepare_io_thread(),
        false => sandbox::enter_io_thread(),
    }
    let worker = Worker::new(sizes, switches, inbox, wake);
    sandbox::enter_io_thread();
    let mut worker = match worker {
        Ok(worker) => worker,
        Err(error) => {
            let _ = up.send(Err(error));
            return;
        }
    };
    let _ = up.send(Ok(()));
    let served = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| worker.run()));
    let ended = served.unwrap_or_else(|_| Err(Error::new(Kind::Internal, "a worker panicked")));
    if let Err(error) = ended {
        // Its devices would hang for ever. The kernel keeps them and what is in flight for the
        // next daemon, if this one ends now.
        tracing::error!(%error, "a worker cannot go on: the daemon ends; restart it to take the devices back");
        std::process::abort();
    }
}
