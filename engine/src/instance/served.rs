//! One device that is served: an image, a ublk device, a queue on each of the workers.
//!
//! Knows how the three are put together and taken apart, and in which order; does not know names,
//! quotas or other devices.

use std::sync::{Arc, Mutex, PoisonError};

use super::spec::{DeviceState, DeviceStats, LatencySummary};
use crate::error::{Error, Kind, Result};
use crate::frontend::ublk::{Device, Stop, UblkQueue};
use crate::image::{Geometry, Image};
use crate::ring::SlotId;
use crate::worker::{Job, QueueStats, WorkerHandle};

/// The workers of an instance, shared by its devices.
pub type Workers = Arc<[WorkerHandle<UblkQueue>]>;

/// A device with its queues on the workers.
#[derive(Debug)]
pub struct Served {
    device: Device,
    workers: Workers,
    slot: SlotId,
    /// None: the image could not be found again, and nobody serves the device.
    image: Option<Arc<Image>>,
    geometry: Mutex<Geometry>,
    stuck: Mutex<bool>,
}

/// How a ublk device becomes one that works.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Begin {
    /// It is new.
    Fresh,
    /// A daemon before us served it.
    Recovered,
}

impl Served {
    /// Serves a device that was added, or is there already. On failure nothing of it is left,
    /// except that a device to be recovered still waits for a daemon.
    pub fn begin(device: Device, workers: &Workers, slot: SlotId, image: Image, how: Begin) -> Result<Served> {
        let geometry = image.geometry();
        let served = Served {
            device,
            workers: workers.clone(),
            slot,
            image: Some(Arc::new(image)),
            geometry: Mutex::new(geometry),
            stuck: Mutex::new(false),
        };
        match served.bring_up(&geometry, how) {
            Ok(()) => Ok(served),
            Err(error) if how == Begin::Fresh => {
                if let Err(undo) = served.end(Stop::Always) {
                    tracing::error!(%undo, id = served.device.id(), "a failed device could not be taken away");
                }
                Err(error)
            }
            Err(error) => Err(error),
        }
    }

    /// A device that nobody can serve now: it can only be taken away.
    pub fn abandoned(device: Device, workers: &Workers, slot: SlotId, geometry: Geometry) -> Served {
        let (geometry, stuck) = (Mutex::new(geometry), Mutex::new(true));
        Served { device, workers: workers.clone(), slot, image: None, geometry, stuck }
    }

    fn bring_up(&self, geometry: &Geometry, how: Begin) -> Result<()> {
        match how {
            Begin::Fresh => self.device.describe(geometry)?,
            Begin::Recovered => self.device.begin_recovery()?,
        }
        let image = self.image.as_ref().ok_or_else(|| Error::new(Kind::Internal, "no image"))?;
        for (worker, transport) in self.workers.iter().zip(self.device.queues()?) {
            worker.add(Job { slot: self.slot, transport, image: image.clone() })?;
        }
        match how {
            Begin::Fresh => self.device.start(),
            Begin::Recovered => self.device.end_recovery(),
        }
    }

    /// Takes the device away: the block device first, then its queues, then its number.
    pub fn end(&self, when: Stop) -> Result<()> {
        self.device.stop(when)?;
        if let Err(error) = self.release() {
            *self.stuck.lock().unwrap_or_else(PoisonError::into_inner) = true;
            return Err(error);
        }
        Ok(())
    }

    fn release(&self) -> Result<()> {
        let queues = usize::from(self.device.parameters().queues);
        if self.image.is_some() {
            for worker in self.workers.iter().take(queues) {
                match worker.remove(self.slot) {
                    Err(error) if error.kind() != Kind::NotFound => return Err(error),
                    _ => {}
                }
            }
        }
        self.device.delete()
    }

    /// Adapts to the image's present size. Returns the new one.
    pub fn resize(&self) -> Result<u64> {
        let image = self.image.as_ref().ok_or_else(|| Error::new(Kind::Io, "the image is gone"))?;
        let mut geometry = self.geometry.lock().unwrap_or_else(PoisonError::into_inner);
        let new = image.refreshed()?;
        // Requests up to the larger size must be served while the two sides disagree.
        if new.size >= geometry.size {
            self.tell_workers(new)?;
            self.device.resize(new.size)?;
        } else {
            self.device.resize(new.size)?;
            self.tell_workers(new)?;
        }
        *geometry = new;
        Ok(new.size)
    }

    fn tell_workers(&self, geometry: Geometry) -> Result<()> {
        let queues = usize::from(self.device.parameters().queues);
        self.workers.iter().take(queues).try_for_each(|worker| worker.resize(self.slot, geometry))
    }

    /// The ublk device.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Its place on the workers.
    pub fn slot(&self) -> SlotId {
        self.slot
    }

    /// Its shape now.
    pub fn geometry(&self) -> Geometry {
        *self.geometry.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// State, as far as it can be known without asking the workers long.
    pub fn state(&self) -> DeviceState {
        if *self.stuck.lock().unwrap_or_else(PoisonError::into_inner) {
            return DeviceState::Stuck;
        }
        match self.queue_stats() {
            Ok(queues) if queues.iter().any(|queue| queue.degraded) => DeviceState::Degraded,
            Ok(_) => DeviceState::Live,
            Err(_) => DeviceState::Stuck,
        }
    }

    fn queue_stats(&self) -> Result<Vec<QueueStats>> {
        let queues = usize::from(self.device.parameters().queues);
        self.workers.iter().take(queues).map(|worker| worker.stats(self.slot)).collect()
    }

    /// Figures over all queues.
    pub fn stats(&self, path: String, image: String) -> Result<DeviceStats> {
        let queues = self.queue_stats()?;
        let sum = |figure: fn(&QueueStats) -> u64| queues.iter().map(figure).sum();
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
        Ok(DeviceStats {
            path,
            image,
            at_ns: now.tv_sec.unsigned_abs() * 1_000_000_000 + now.tv_nsec.unsigned_abs(),
            reads: sum(|queue| queue.reads),
            read_bytes: sum(|queue| queue.read_bytes),
            writes: sum(|queue| queue.writes),
            written_bytes: sum(|queue| queue.written_bytes),
            flushes: sum(|queue| queue.flushes),
            discards: sum(|queue| queue.discards),
            errors: sum(|queue| queue.errors),
            resubmits: sum(|queue| queue.resubmits),
            punts: sum(|queue| queue.punts),
            fallbacks: sum(|queue| queue.fallbacks),
            requests: sum(|queue| queue.requests),
            batches: sum(|queue| queue.batches),
            in_flight: sum(|queue| queue.in_flight),
            latency: summarise(&queues),
        })
    }
}

fn summarise(queues: &[QueueStats]) -> LatencySummary {
    let mut histograms = queues.iter().filter_map(QueueStats::latency);
    let Some(mut all) = histograms.next().cloned() else { return LatencySummary::default() };
    for other in histograms {
        // Same bounds everywhere, so that nothing can fail to fit.
        let _ = all.add(other);
    }
    LatencySummary {
        samples: all.len(),
        p50_ns: all.value_at_quantile(0.5),
        p90_ns: all.value_at_quantile(0.9),
        p99_ns: all.value_at_quantile(0.99),
        p999_ns: all.value_at_quantile(0.999),
        max_ns: all.max(),
    }
}
