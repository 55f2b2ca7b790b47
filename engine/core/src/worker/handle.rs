// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The control side of a worker: starts it, sends messages, waits for replies with a deadline.
//!
//! The channel carries device changes, never requests.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, Sender, bounded};
use rustix::event::{EventfdFlags, eventfd};

use super::{QueueStats, Throttle, Transport, Worker, WorkerOptions};
use crate::error::{Error, Kind, Result};
use crate::image::{Geometry, Image};
use crate::ring::{RingSizes, SlotId};
use crate::{failures, sandbox, sys};

/// Deadline for the reply to a message. A worker blocks only for work.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);
/// Capacity of a worker's message channel.
const BACKLOG: usize = 64;

/// A queue to serve.
#[derive(Debug)]
pub struct NewQueue<T> {
    /// Its slot on the ring.
    pub slot: SlotId,
    /// The driver's side.
    pub transport: T,
    /// The image.
    pub image: Arc<Image>,
    /// The limits of the device.
    pub throttle: Arc<Throttle>,
}

pub(super) enum WorkerMessage<T> {
    Add(NewQueue<T>, Sender<Result<()>>),
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
    messages: Sender<WorkerMessage<T>>,
    wake: OwnedFd,
    thread: Option<JoinHandle<()>>,
}

impl<T: Transport> WorkerHandle<T> {
    /// Starts a worker on the given CPUs (all if empty) and waits until its ring is ready.
    pub fn start(name: String, sizes: RingSizes, options: WorkerOptions, cpus: Vec<usize>) -> Result<Self> {
        failures::start_reporter();
        let wake = eventfd(0, EventfdFlags::CLOEXEC)
            .map_err(|error| Error::os(error, "cannot create an eventfd"))?;
        let worker_wake =
            wake.try_clone().map_err(|error| Error::os(error, "cannot duplicate an eventfd"))?;
        let (sender, messages) = bounded(BACKLOG);
        let (started, is_started) = bounded(1);
        let thread = std::thread::Builder::new()
            .name(name.chars().take(15).collect())
            .spawn(move || serve(&sizes, options, &cpus, messages, worker_wake, &started))
            .map_err(|error| Error::os(error, "cannot start a worker thread"))?;
        let handle = Self { name, messages: sender, wake, thread: Some(thread) };
        handle.answer(&is_started)?;
        Ok(handle)
    }

    /// Adds a queue.
    pub fn add(&self, queue: NewQueue<T>) -> Result<()> {
        self.ask(|reply| WorkerMessage::Add(queue, reply))
    }

    /// Removes a queue that the driver has ended. Returns when nothing of it is in flight.
    pub fn remove(&self, slot: SlotId) -> Result<()> {
        self.ask(|reply| WorkerMessage::Remove(slot, reply))
    }

    /// Changes a queue's geometry.
    pub fn resize(&self, slot: SlotId, geometry: Geometry) -> Result<()> {
        self.ask(|reply| WorkerMessage::Resize(slot, geometry, reply))
    }

    /// Replaces the image. Operations in flight end on the old one.
    pub fn replace(&self, slot: SlotId, image: Arc<Image>) -> Result<()> {
        self.ask(|reply| WorkerMessage::Replace(slot, image, reply))
    }

    /// The statistics of a queue.
    pub fn stats(&self, slot: SlotId) -> Result<QueueStats> {
        self.ask(|reply| WorkerMessage::Stats(slot, reply))
    }

    fn ask<A>(&self, message: impl FnOnce(Sender<Result<A>>) -> WorkerMessage<T>) -> Result<A> {
        let (reply, answer) = bounded(1);
        self.send(message(reply))?;
        self.answer(&answer)
    }

    fn send(&self, message: WorkerMessage<T>) -> Result<()> {
        self.messages
            .send_timeout(message, ANSWER_LIMIT)
            .map_err(|_| Error::new(Kind::Deadline, format!("worker {} accepts no messages", self.name)))?;
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
    /// Stops the worker. One that does not stop in time is left behind.
    fn drop(&mut self) {
        // If either fails the worker does not stop, which the loop below detects.
        let _ = self.messages.send_timeout(WorkerMessage::Stop, ANSWER_LIMIT);
        let _ = rustix::io::write(self.wake.as_fd(), &1u64.to_ne_bytes());
        let Some(thread) = self.thread.take() else { return };
        let deadline = Instant::now() + ANSWER_LIMIT;
        while !thread.is_finished() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
        if thread.is_finished() {
            let _ = thread.join();
        } else {
            tracing::error!(worker = self.name, "the worker did not stop in time");
        }
    }
}

/// The main function of a worker thread.
fn serve<T: Transport>(
    sizes: &RingSizes,
    options: WorkerOptions,
    cpus: &[usize],
    messages: Receiver<WorkerMessage<T>>,
    wake: OwnedFd,
    started: &Sender<Result<()>>,
) {
    if let Err(error) = sys::run_on(cpus) {
        let _ = started.send(Err(error));
        return;
    }
    sys::declare_io_flusher();
    match options.partscan {
        true => sandbox::prepare_io_thread(),
        false => sandbox::enter_io_thread(),
    }
    let worker = Worker::new(sizes, options, messages, wake);
    sandbox::enter_io_thread();
    let mut worker = match worker {
        Ok(worker) => worker,
        Err(error) => {
            let _ = started.send(Err(error));
            return;
        }
    };
    let _ = started.send(Ok(()));
    let served = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| worker.run()));
    let ended = served.unwrap_or_else(|_| Err(Error::new(Kind::Internal, "a worker panicked")));
    if let Err(error) = ended {
        // Its devices would hang forever. If the daemon ends now, the kernel keeps them and the
        // requests in flight for the next daemon.
        tracing::error!(%error, "a worker failed: the daemon aborts; restart it to recover its devices");
        std::process::abort();
    }
}
