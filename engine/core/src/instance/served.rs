// SPDX-License-Identifier: Apache-2.0 OR MIT
//! One served device: an image, a frontend's device, a queue on each worker.
//!
//! Assembles and disassembles these in the right order; does not know names, quotas or other
//! devices.

mod observed;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

pub use observed::Traffic;

use crate::error::{Error, Kind, Result};
use crate::frontend::ublk::StartLock;
use crate::frontend::{FrontendDevice, FrontendQueue, StopMode};
use crate::image::{Geometry, Image};
use crate::ring::SlotId;
use crate::worker::{IoLimits, NewQueue, Throttle, WorkerHandle};

/// The workers of an instance, shared by its devices.
pub type Workers = Arc<[WorkerHandle<FrontendQueue>]>;

/// A device with its queues on the workers.
#[derive(Debug)]
pub struct Served {
    device: FrontendDevice,
    workers: Workers,
    slot: SlotId,
    /// None: the image was not found, and the device is not served.
    image: Mutex<Option<Arc<Image>>>,
    geometry: Mutex<Geometry>,
    throttle: Arc<Throttle>,
    lifecycle: Mutex<Lifecycle>,
}

/// The lifecycle state of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lifecycle {
    Serving,
    /// It is being removed, or cannot be used.
    Stuck,
    /// A stop passed its deadline and goes on in the kernel: the time of the next attempt, and the
    /// pause before it.
    Stopping(Instant, Duration),
}

/// First pause after a stop that passed its deadline.
const STOP_RETRY: Duration = Duration::from_secs(10);
/// How long a user's own file system may make no progress before a stop.
const HANG_TIMEOUT: Duration = Duration::from_secs(2);

/// How a device is started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StartMode {
    /// It is new.
    New,
    /// A previous daemon served it.
    Recovered,
    /// It is new, and starts only when it replaces another.
    Deferred,
}

impl Served {
    /// Serves a new or existing device. On failure the device is returned all the same, for the
    /// caller to remove or to keep as stuck.
    pub fn start(
        device: FrontendDevice,
        workers: &Workers,
        slot: SlotId,
        image: Image,
        limits: IoLimits,
        how: StartMode,
    ) -> (Served, Result<()>) {
        let (geometry, image) = (image.geometry(), Arc::new(image));
        let served = Served {
            device,
            workers: workers.clone(),
            slot,
            image: Mutex::new(Some(image.clone())),
            geometry: Mutex::new(geometry),
            throttle: Arc::new(Throttle::new(limits)),
            lifecycle: Mutex::new(Lifecycle::Serving),
        };
        let outcome = served.bring_up(&image, how);
        match &outcome {
            Ok(()) => served.take_geometry(geometry),
            Err(_) => *served.lifecycle() = Lifecycle::Stuck,
        }
        (served, outcome)
    }

    /// A device that cannot be served now: it can only be removed.
    pub fn unserved(device: FrontendDevice, workers: &Workers, slot: SlotId, geometry: Geometry) -> Served {
        Served {
            device,
            workers: workers.clone(),
            slot,
            image: Mutex::new(None),
            geometry: Mutex::new(geometry),
            throttle: Arc::default(),
            lifecycle: Mutex::new(Lifecycle::Stuck),
        }
    }

    fn bring_up(&self, image: &Arc<Image>, how: StartMode) -> Result<()> {
        match how {
            StartMode::New | StartMode::Deferred => self.device.describe(image)?,
            StartMode::Recovered => self.device.begin_recovery()?,
        }
        let queues = self.device.queues()?;
        if queues.len() > self.workers.len() {
            return Err(Error::new(
                Kind::Unsupported,
                "it has more queues than the instance has workers now",
            ));
        }
        for (worker, transport) in self.workers.iter().zip(queues) {
            let (image, throttle) = (image.clone(), self.throttle.clone());
            worker.add(NewQueue { slot: self.slot, transport, image, throttle })?;
        }
        match how {
            StartMode::New => self.device.start(),
            StartMode::Recovered => self.device.end_recovery(),
            StartMode::Deferred => Ok(()),
        }
    }

    /// Stores the new geometry. The kernel's loop driver derives its own from the image.
    fn take_geometry(&self, wanted: Geometry) {
        let actual = match &self.device {
            FrontendDevice::Loop(_) => self.device.driver_geometry(wanted.offset).unwrap_or(wanted),
            FrontendDevice::Ublk(_) | FrontendDevice::Fuse(_) => wanted,
        };
        *self.geometry.lock().unwrap_or_else(PoisonError::into_inner) = actual;
    }

    /// Locked while the device changes.
    fn lifecycle(&self) -> MutexGuard<'_, Lifecycle> {
        self.lifecycle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Stops the device. `release` must follow.
    pub fn stop(&self, when: StopMode) -> Result<()> {
        let mut lifecycle = self.lifecycle();
        let mut pause = STOP_RETRY;
        if let Lifecycle::Stopping(again, last) = *lifecycle {
            // It would block behind the previous stop, and occupy a ring.
            if self.device.is_present() && Instant::now() < again {
                return Err(Error::new(Kind::Deadline, "the device is still being stopped"));
            }
            pause = last.saturating_mul(2);
        }
        if when == StopMode::Always && self.is_hung() {
            let message = "the device cannot be stopped: the file system of its image does not answer";
            return Err(Error::new(Kind::Deadline, message).hint("unmount or kill that file system"));
        }
        // The driver waits for requests in flight. Before Linux 7.0 it stops a device that is open, but
        // not claimed, too.
        let limits = self.throttle.limits();
        self.throttle.set(IoLimits::default());
        match self.device.stop(when) {
            // The previous stop has ended after all.
            Err(error) if error.kind() == Kind::NotFound => {}
            Err(error) => {
                match error.kind() {
                    Kind::Deadline => *lifecycle = Lifecycle::Stopping(Instant::now() + pause, pause),
                    _ => self.throttle.set(limits),
                }
                return Err(error);
            }
            Ok(()) => {}
        }
        // It cannot be used any more.
        *lifecycle = Lifecycle::Stuck;
        Ok(())
    }

    /// Quiesces the device for the next daemon: new requests are held, those in flight are
    /// completed. The driver reissues what is not completed by `until`; a write may be repeated
    /// then, as after a crash.
    pub fn quiesce(&self, until: Instant) -> Result<()> {
        // A stuck device is not served: it waits already.
        if *self.lifecycle() != Lifecycle::Serving {
            return Ok(());
        }
        let left = until.saturating_duration_since(Instant::now());
        if !self.device.quiesce(left)? {
            return Ok(());
        }
        // At most a queue full of requests waits for them.
        self.throttle.set(IoLimits::default());
        loop {
            match self.traffic()?.in_flight {
                0 => return Ok(()),
                requests if Instant::now() >= until => {
                    let context = format!("{requests} requests are still in flight");
                    return Err(Error::new(Kind::Deadline, context));
                }
                _ => std::thread::sleep(Duration::from_millis(1)),
            }
        }
    }

    /// Whether requests in flight on a file that may hang make no progress. A stop would wait for
    /// them in the kernel, uninterruptibly, and so would the daemon's end.
    fn is_hung(&self) -> bool {
        let Ok(image) = self.image() else { return false };
        let until = Instant::now() + HANG_TIMEOUT;
        let ended =
            || self.traffic().ok().filter(|traffic| traffic.in_flight > 0).map(|traffic| traffic.ended);
        let Some(before) = ended().filter(|_| image.may_block()) else { return false };
        while Instant::now() < until {
            std::thread::sleep(Duration::from_millis(20));
            if ended() != Some(before) {
                return false;
            }
        }
        true
    }

    /// Starts a deferred device.
    pub fn start_deferred(&self) -> Result<()> {
        self.device.start()
    }

    /// Starts a deferred device under the start lock: it gets the lowest free number.
    pub fn start_exclusively(&self, lock: &StartLock) -> Result<()> {
        self.device.start_exclusively(lock)
    }

    /// Stops this device if it is not open, so that a replacement can start. After any other error
    /// it must not be used again.
    pub fn try_stop(&self, _lock: &StartLock) -> Result<()> {
        let mut lifecycle = self.lifecycle();
        if *lifecycle != Lifecycle::Serving {
            return Err(Error::new(Kind::Deadline, "the device is stuck"));
        }
        let outcome = self.device.stop(StopMode::IfUnusedNow);
        match &outcome {
            Err(error) if error.kind() == Kind::Busy => {}
            _ => *lifecycle = Lifecycle::Stuck,
        }
        outcome
    }

    /// Removes the queues of a stopped device from the workers, and deletes it.
    pub fn release(&self) -> Result<()> {
        self.remove_queues()?;
        self.delete()
    }

    /// Removes the queues of a stopped device from the workers.
    pub fn remove_queues(&self) -> Result<()> {
        let _life = self.lifecycle();
        for worker in self.workers.iter().take(usize::from(self.device.parameters().queues)) {
            ignore_missing(worker.remove(self.slot))?;
        }
        Ok(())
    }

    /// Takes the image of a device without queues. Closing its file may block as long as its file
    /// system does.
    pub fn take_image(&self) -> Option<Arc<Image>> {
        self.image.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Deletes a stopped device without queues.
    pub fn delete(&self) -> Result<()> {
        let _life = self.lifecycle();
        ignore_missing(self.device.delete())
    }

    /// Whether no worker has a queue of it: its recovery has not begun.
    pub fn has_no_queues(&self) -> bool {
        let missing = |worker: &WorkerHandle<FrontendQueue>| {
            worker.stats(self.slot).is_err_and(|error| error.kind() == Kind::NotFound)
        };
        self.workers.iter().all(missing)
    }

    /// Whether data goes through the page cache.
    pub fn is_buffered(&self) -> bool {
        match &self.device {
            FrontendDevice::Loop(device) => device.is_buffered(),
            FrontendDevice::Ublk(_) | FrontendDevice::Fuse(_) => {
                self.image().is_ok_and(|image| image.is_buffered())
            }
        }
    }

    /// Whether direct I/O was disabled since the last call.
    pub fn take_direct_io_disabled(&self) -> bool {
        self.image().is_ok_and(|image| image.take_direct_io_disabled())
    }

    /// Resizes to the image's present size, or both to `size`; `check` may reject the change from
    /// the old to the new size. On failure image and device stay unchanged. Returns the new size.
    pub fn resize(&self, size: Option<u64>, check: impl FnOnce(u64, u64) -> Result<()>) -> Result<u64> {
        let lifecycle = self.lifecycle();
        if *lifecycle != Lifecycle::Serving {
            return Err(stuck());
        }
        let image = self.image()?;
        let now = self.geometry();
        let before = image.length()?;
        let (new, length) = match size {
            Some(size) => image.geometry_for_size(size, now.size)?,
            None => (image.current_geometry()?, before),
        };
        check(now.size, new.size)?;
        // The file is never shorter than the device, except where the driver takes over its length.
        let file_first = length > before || matches!(self.device, FrontendDevice::Loop(_));
        if file_first && length != before {
            image.set_length(length)?;
        }
        let mut outcome = self.change(new, |worker| worker.resize(self.slot, new));
        if outcome.is_ok() && length < before && !file_first {
            outcome = image.set_length(length).inspect_err(|_| {
                let _ = self.change(now, |worker| worker.resize(self.slot, now));
            });
        } else if outcome.is_err() && length > before {
            let _ = image.set_length(before);
        }
        outcome.map(|()| self.geometry().size)
    }

    /// Replaces the image. Operations in flight end on the old one and may be retried on the new
    /// one. It must be the same file, or read-only, or the old image must have size 0.
    pub fn replace(&self, image: Image) -> Result<()> {
        let lifecycle = self.lifecycle();
        if *lifecycle != Lifecycle::Serving {
            return Err(Error::new(Kind::Busy, "the device is stuck or being removed"));
        }
        let image = Arc::new(image);
        self.change(image.geometry(), |worker| worker.replace(self.slot, image.clone()))?;
        *self.image.lock().unwrap_or_else(PoisonError::into_inner) = Some(image);
        Ok(())
    }

    /// Changes the geometry of workers and driver, in the order that keeps requests up to the
    /// larger size served meanwhile.
    fn change(&self, new: Geometry, tell: impl Fn(&WorkerHandle<FrontendQueue>) -> Result<()>) -> Result<()> {
        if new.durable_writes != self.geometry().durable_writes {
            // The kernel would not flush what is written from now on.
            return Err(Error::new(Kind::Internal, "durable writes cannot be switched"));
        }
        let queues = usize::from(self.device.parameters().queues);
        let tell_workers = || self.workers.iter().take(queues).try_for_each(&tell);
        if new.size >= self.geometry().size {
            tell_workers()?;
            self.device.resize(new.size)?;
        } else {
            self.device.resize(new.size)?;
            tell_workers()?;
        }
        self.take_geometry(new);
        Ok(())
    }

    /// Changes the limits of its I/O.
    pub fn set_io_limits(&self, limits: IoLimits) -> Result<()> {
        let lifecycle = self.lifecycle();
        if *lifecycle != Lifecycle::Serving {
            return Err(stuck());
        }
        self.throttle.set(limits);
        Ok(())
    }

    /// The limits of its I/O.
    pub fn io_limits(&self) -> IoLimits {
        self.throttle.limits()
    }

    fn image(&self) -> Result<Arc<Image>> {
        let image = self.image.lock().unwrap_or_else(PoisonError::into_inner).clone();
        image.ok_or_else(|| Error::new(Kind::Io, "the device has no image"))
    }

    /// The frontend's device.
    pub fn device(&self) -> &FrontendDevice {
        &self.device
    }

    /// Its slot on the workers.
    pub fn slot(&self) -> SlotId {
        self.slot
    }

    /// Its present geometry.
    pub fn geometry(&self) -> Geometry {
        *self.geometry.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn stuck() -> Error {
    Error::new(Kind::Busy, "the device is stuck or being detached").hint("'loopengine list' says why")
}

fn ignore_missing(outcome: Result<()>) -> Result<()> {
    match outcome {
        Err(error) if error.kind() == Kind::NotFound => Ok(()),
        outcome => outcome,
    }
}
