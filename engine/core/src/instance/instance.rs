// SPDX-License-Identifier: Apache-2.0 OR MIT
//! An instance: a named group of devices with workers, numbers and limits of its own.
//!
//! Knows how a device is attached and detached, and how a failure is undone; the table assigns
//! numbers.

use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use super::attached::AttachedDevice;
use super::claims::Claims;
use super::claims::sharing::{self, Sharing};
use super::cpus::{check_cpus, parse_cpus, worker_count};
use super::in_use::user_of;
use super::links::{DevLinks, Links};
use super::served::{Served, StartMode, Workers};
use super::spec::*;
use super::state::{DeviceRecord, StateDir};
use super::table::DeviceMap;
use super::{MAX_DEVICES, Tuning};
use crate::error::{Error, Kind, Result};
use crate::frontend::{Backend, DeviceParameters, Frontend, Frontends, StopMode};
use crate::image::{Image, ImageSpec};
use crate::ring::RingSizes;
use crate::worker::{WorkerHandle, WorkerOptions};

/// Default and maximum queue depth.
const DEFAULT_DEPTH: u32 = 128;
const MAX_DEPTH: u32 = 1024;

impl Tuning {
    pub(super) fn options(self, partscan: bool) -> WorkerOptions {
        WorkerOptions { linked_commit: self.linked_commit, partscan, blocking_sync: true }
    }
}

/// State shared by all instances and pools of a daemon.
#[derive(Clone, Debug)]
pub struct EngineContext {
    /// See `EngineConfig`.
    pub run_dir: PathBuf,
    /// The frontends that instances and pools can have.
    pub frontends: Frontends,
    /// Upper half of the owner cookies of this run directory.
    pub owner_hash: u32,
    /// Images in use.
    pub claims: Claims,
    /// The state files, which outlive the daemon.
    pub state: StateDir,
    /// Names below /dev, if enabled.
    pub dev_links: Option<Arc<DevLinks>>,
}

impl EngineContext {
    /// An owner cookie for a new device: the owner, and a nonce that distinguishes it from the next
    /// device with the same id.
    pub fn new_owner_cookie(&self) -> u64 {
        let nonce = std::hash::BuildHasher::build_hasher(&std::hash::RandomState::new());
        u64::from(self.owner_hash) << 32 | u64::from(std::hash::Hasher::finish(&nonce) as u32)
    }

    /// Whether a device with this cookie belongs to this run directory.
    pub fn is_ours(&self, cookie: u64) -> bool {
        (cookie >> 32) as u32 == self.owner_hash
    }
}

/// A named group of devices with its own workers.
#[derive(Debug)]
pub struct Instance {
    pub(super) context: EngineContext,
    directory: PathBuf,
    /// None: the backend makes the names.
    links: Option<Links>,
    pub(super) frontend: Frontend,
    pub(super) backend: Backend,
    pub(super) workers: Workers,
    pub(super) table: DeviceMap<Arc<AttachedDevice>>,
}

impl Instance {
    /// Creates the directory and the backend, and starts the workers. `backend`: that of its
    /// devices, which wait for it; none: as specified.
    pub fn start(
        context: &EngineContext,
        spec: &InstanceSpec,
        backend: Option<BackendKind>,
        tuning: Tuning,
    ) -> Result<Instance> {
        let frontend = context.frontends.get(backend.or(spec.backend))?;
        let directory = context.run_dir.join(&spec.name);
        let table = DeviceMap::new(spec, &directory)?;
        let cpus = spec.cpus.as_deref().map(parse_cpus).transpose()?.unwrap_or_default();
        check_cpus(&cpus)?;
        let count = worker_count(spec.workers, &cpus)?;
        fs::create_dir(&directory).or_else(|error| match error.kind() {
            std::io::ErrorKind::AlreadyExists if directory.is_dir() => Ok(()),
            _ => Err(Error::os(error, format!("cannot create {}", directory.display()))),
        })?;
        let opened = frontend.backend(&directory, count as usize, &cpus).and_then(|backend| {
            let options = tuning.options(true);
            let sizes = RingSizes::for_devices(MAX_DEVICES);
            let count = if backend.uses_workers() { count } else { 0 };
            let workers = (0..count)
                .map(|q| WorkerHandle::start(format!("{}/{q}", spec.name), sizes, options, cpus.clone()))
                .collect::<Result<Vec<_>>>()?;
            let links =
                backend.uses_links().then(|| Links::new(&directory, &spec.name, context.dev_links.is_some()));
            Ok((backend, workers, links.transpose()?))
        });
        let (backend, workers, links) = opened.inspect_err(|_| {
            let _ = fs::remove_dir(&directory);
        })?;
        context.state.save_instance(spec).inspect_err(|_| {
            backend.close();
            let _ = fs::remove_dir(&directory);
        })?;
        let (context, workers) = (context.clone(), workers.into());
        Ok(Instance { context, directory, links, frontend, backend, workers, table })
    }

    /// Its present state.
    pub fn info(&self) -> InstanceInfo {
        let (spec, devices) = self.table.spec();
        InstanceInfo {
            name: spec.name,
            max_devices: spec.max_devices,
            devices,
            backend: self.frontend.kind(),
            workers: self.workers.len() as u32,
            cpus: spec.cpus,
            directory: self.directory.display().to_string(),
        }
    }

    /// Changes its device limit; existing devices stay.
    pub fn set_max_devices(&self, max_devices: u32) -> Result<()> {
        self.context.state.save_instance(&self.table.set_max_devices(max_devices)?)
    }

    /// Attaches an image as a new device; with `force`, even if the image is in use.
    pub fn attach(&self, spec: &AttachSpec, force: bool, image: OwnedFd) -> Result<DeviceInfo> {
        self.check_not_served_here(&image, &spec.path)?;
        self.backend.check_durable(spec.durable, spec.read_only || spec.buffered)?;
        self.backend.check_io_limits(spec.io_limits())?;
        let image = Image::open(image, &image_spec(spec), &spec.path)?;
        let parameters = self.parameters(spec)?;
        let reservation = self.table.reserve(spec.number)?;
        let identity = image.identity();
        let number = reservation.number;
        let sharing = if force { Sharing::Warn } else { Sharing::Refuse };
        let (image, hold) = sharing::claim_image(
            &self.context.claims,
            image,
            spec,
            number,
            parameters.owner_cookie,
            sharing,
        )?;
        let device = self.backend.add(number, parameters)?;
        let (served, begun) =
            Served::start(device, &self.workers, reservation.slot, image, spec.io_limits(), StartMode::New);
        let (id, parameters) = (served.device().id(), served.device().parameters());
        let geometry = served.geometry();
        let record = DeviceRecord {
            spec: AttachSpec { number: Some(number), io_mode: Some(parameters.io_mode), ..spec.clone() },
            id,
            owner_cookie: parameters.owner_cookie,
            identity,
            io_mode: parameters.io_mode,
            queues: parameters.queues,
            depth: parameters.depth,
            block_size: geometry.block_size,
            size: geometry.size,
            since: SystemTime::now().duration_since(UNIX_EPOCH).ok().map(|since| since.as_secs()),
        };
        let outcome = begun.and_then(|()| self.publish(number, &record, &served));
        let attached = Arc::new(AttachedDevice { record, served, reason: None, hold: Some(hold) });
        if let Err(error) = outcome {
            let undone = attached.served.stop(StopMode::Always);
            self.unpublish(number);
            if let Err(undo) = undone.and_then(|()| attached.served.release()) {
                // It may still start: its number, slot and image stay in use.
                tracing::error!(%undo, id, "cannot remove a device that failed to start");
                reservation.fill(attached);
            }
            return Err(error);
        }
        reservation.fill(attached.clone());
        Ok(self.describe(number, &attached))
    }

    /// Detaches a device.
    pub fn detach(&self, number: u32, when: StopMode) -> Result<String> {
        let attached = self.table.withdraw(number)?;
        let path = self.table.path(number).display().to_string();
        // Removes the names while the driver's id is still in use: they must never lead to its next
        // device.
        let stopped = attached.stop(when).inspect(|()| self.unpublish(number));
        if let Err(error) = stopped.and_then(|()| attached.served.release()) {
            self.table.put_back(number, Arc::clone(&attached));
            if error.kind() != Kind::Busy {
                return Err(error);
            }
            let user = user_of(attached.served.device()).map_or(String::new(), |user| format!(": {user}"));
            return Err(Error::new(Kind::Busy, format!("{path} is in use{user}"))
                .hint("unmount it, run swapoff or close it, or use --force"));
        }
        let slot = attached.served.slot();
        drop(attached);
        self.table.remove(number, slot);
        Ok(path)
    }

    /// Resizes a device to its image's present size, or both to a given size.
    pub fn resize(&self, number: u32, spec: &ResizeSpec) -> Result<DeviceInfo> {
        let attached = self.table.get(number)?;
        let path = self.table.path(number).display().to_string();
        attached.served.resize(spec.size, |now, new| {
            if new < now && !spec.shrink {
                let context = format!("{path} would shrink from {now} to {new} bytes");
                return Err(Error::new(Kind::Invalid, context)
                    .hint("shrink the file system on it first, then use --shrink"));
            }
            match user_of(attached.served.device()).filter(|_| new < now && !spec.force) {
                Some(user) => Err(Error::new(Kind::Busy, format!("{path} is {user} and would shrink"))
                    .hint("end that use first, or use --force")),
                None => Ok(()),
            }
        })?;
        Ok(self.describe(number, &attached))
    }

    /// Changes the limits of a device's I/O, also for the next daemon.
    pub fn set_io_limits(&self, number: u32, new: &IoLimitsSpec) -> Result<DeviceInfo> {
        let attached = self.table.get(number)?;
        let now = attached.served.io_limits();
        let limits =
            IoLimits { iops: new.iops.unwrap_or(now.iops), bytes: new.bytes_per_second.unwrap_or(now.bytes) };
        self.backend.check_io_limits(limits)?;
        attached.served.set_io_limits(limits)?;
        let saved = attached.record.clone();
        let spec = AttachSpec { iops: limits.iops, bytes_per_second: limits.bytes, ..saved.spec };
        self.context.state.save_device(number, &DeviceRecord { spec, ..saved })?;
        Ok(self.describe(number, &attached))
    }

    /// The numbers of its devices.
    pub fn numbers(&self) -> Vec<u32> {
        self.table.numbers()
    }

    /// Its devices.
    pub fn live(&self) -> Vec<Arc<AttachedDevice>> {
        self.table.live().into_iter().map(|(_, attached)| attached).collect()
    }

    /// The number of the device with this node.
    pub fn number_of(&self, node: &Path) -> Option<u32> {
        let live = self.table.live();
        live.into_iter()
            .find(|(_, attached)| attached.served.device().node() == node)
            .map(|(number, _)| number)
    }

    /// All devices that are served, or the one with this number.
    pub fn devices(&self, only: Option<u32>) -> Result<Vec<DeviceInfo>> {
        self.select(only).map(|selected| {
            selected.iter().map(|(number, attached)| self.describe(*number, attached)).collect()
        })
    }

    /// Statistics of all served devices, or of the one with this number.
    pub fn stats(&self, only: Option<u32>) -> Result<Vec<DeviceStats>> {
        let stats = |(number, attached): &(u32, Arc<AttachedDevice>)| {
            let path = self.table.path(*number).display().to_string();
            attached.served.stats(path, attached.record.spec.path.clone())
        };
        let selected = self.select(only)?;
        match only {
            Some(_) => selected.iter().map(stats).collect(),
            // A stuck or ending device does not hide the others.
            None => Ok(selected.iter().filter_map(|device| stats(device).ok()).collect()),
        }
    }

    /// Accepts no more devices.
    pub fn close(&self) {
        self.table.close();
    }

    /// Closes it if it has no devices; false if it has.
    pub fn close_if_empty(&self) -> bool {
        self.table.close_if_empty()
    }

    /// Removes its directory and state. All devices must be gone.
    pub fn remove_files(&self) {
        self.backend.close();
        self.context.state.remove_instance(&self.table.spec().0.name);
        let _ = fs::remove_dir(&self.directory);
    }

    fn select(&self, only: Option<u32>) -> Result<Vec<(u32, Arc<AttachedDevice>)>> {
        let selected = match only {
            Some(number) => vec![(number, self.table.get(number)?)],
            None => self.table.live(),
        };
        // A worker must not log that it disabled direct I/O: the next query does.
        for (number, AttachedDevice { record, served, .. }) in
            selected.iter().map(|(n, attached)| (n, &**attached))
        {
            if served.take_direct_io_disabled() {
                let (instance, path) = (&record.spec.instance, &record.spec.path);
                tracing::warn!(
                    "{instance}/loop{number} ({path}) uses the page cache: direct I/O was refused"
                );
            }
        }
        Ok(selected)
    }

    pub(super) fn describe(&self, number: u32, attached: &AttachedDevice) -> DeviceInfo {
        attached.info(number, &self.table.path(number))
    }

    fn parameters(&self, spec: &AttachSpec) -> Result<DeviceParameters> {
        let io_mode = spec.io_mode.unwrap_or_else(|| self.backend.best_io_mode());
        self.backend.check_io_mode(io_mode)?;
        self.backend.check_block_size(spec.block_size)?;
        if !self.backend.uses_workers() && (spec.queues, spec.depth) != (0, 0) {
            let context = "the kernel's loop driver has no queues to configure";
            return Err(Error::new(Kind::Unsupported, context).hint("leave out --queues and --depth"));
        }
        let workers = self.workers.len() as u32;
        let queues = if spec.queues == 0 { workers } else { spec.queues };
        if queues > workers {
            let context =
                format!("{queues} queues exceed the {workers} workers of instance {}", spec.instance);
            return Err(Error::new(Kind::Invalid, context)
                .hint("create an instance with more workers ('instance create --workers')"));
        }
        let depth = if spec.depth == 0 { DEFAULT_DEPTH } else { spec.depth };
        if depth > MAX_DEPTH {
            return Err(Error::new(Kind::Invalid, format!("a queue depth of {depth} is too large"))
                .hint(format!("use 1 to {MAX_DEPTH}")));
        }
        if spec.partscan && !self.backend.uses_links() {
            return Err(Error::new(Kind::Unsupported, "FUSE files do not support partitions")
                .hint("attach a part of the image with --offset and --size-limit"));
        }
        let depth = if self.backend.uses_workers() { depth } else { 0 };
        Ok(DeviceParameters {
            io_mode,
            queues: queues as u16,
            depth: depth as u16,
            owner_cookie: self.context.new_owner_cookie(),
            recoverable: true,
            partscan: spec.partscan,
        })
    }

    /// Rejects an image that this daemon serves itself: its worker would deadlock.
    pub(super) fn check_not_served_here(&self, image: &OwnedFd, name: &str) -> Result<()> {
        let stat = rustix::fs::fstat(image.as_fd())
            .map_err(|error| Error::os(error, format!("cannot examine {name}")))?;
        if !self.context.frontends.serves(stat.st_dev) {
            return Ok(());
        }
        Err(Error::new(Kind::Invalid, format!("{name} is served by this daemon"))
            .hint("attach its image instead, which 'loopengine list' shows"))
    }

    /// Saves a device's state and creates its name.
    pub(super) fn publish(&self, number: u32, record: &DeviceRecord, served: &Served) -> Result<()> {
        self.context.state.save_device(number, record)?;
        self.link(number, served)
    }

    pub(super) fn link(&self, number: u32, served: &Served) -> Result<()> {
        self.links.as_ref().map_or(Ok(()), |links| links.make(number, &served.device().node()))
    }

    /// Updates the names of partitions.
    pub fn update_partition_links(&self) {
        let Some(links) = &self.links else { return };
        for (number, attached) in self.table.live() {
            let there = || self.table.get(number).is_ok_and(|now| Arc::ptr_eq(&now, &attached));
            if let Err(error) = links.follow(number, &attached.node(), there) {
                tracing::warn!(
                    "cannot update the names of the partitions of {}: {error}",
                    self.table.path(number).display()
                );
            }
        }
    }

    fn unpublish(&self, number: u32) {
        if let Some(links) = &self.links {
            links.remove(number);
        }
        self.context.state.remove_device(&self.table.spec().0.name, number);
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        self.backend.close();
    }
}

pub(super) fn image_spec(spec: &AttachSpec) -> ImageSpec {
    ImageSpec {
        offset: spec.offset,
        size_limit: spec.size_limit,
        block_size: spec.block_size,
        read_only: spec.read_only,
        buffered: spec.buffered,
        loop_semantics: false,
        durable: spec.durable,
    }
}
