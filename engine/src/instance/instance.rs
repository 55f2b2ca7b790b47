//! An instance: a private pool of devices with its own workers, numbers and quota.
//!
//! Knows how a device comes and goes, and what is undone when that fails; who may have which
//! number is the table's business.

use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use super::attached::AttachedDevice;
use super::claims::Claims;
use super::claims::sharing::{self, Sharing};
use super::in_use::user_of;
use super::links::{DevLinks, Links};
use super::names::parse_cpus;
use super::served::{Served, StartMode, Workers};
use super::spec::*;
use super::state::{DeviceRecord, StateDir};
use super::table::DeviceMap;
use super::{MAX_DEVICES, Tuning};
use crate::error::{Error, Kind, Result};
use crate::frontend::{Backend, DeviceParameters, Frontend, StopMode};
use crate::image::{Image, ImageSpec};
use crate::ring::RingSizes;
use crate::sys;
use crate::worker::{WorkerHandle, WorkerOptions};

/// Queue depth where none is asked for, and the most that can be.
const DEFAULT_DEPTH: u32 = 128;
const MAX_DEPTH: u32 = 1024;
/// Workers that an instance can have.
const MAX_WORKERS: u32 = 256;

impl Tuning {
    pub(super) fn options(self, partscan: bool) -> WorkerOptions {
        let poll = std::time::Duration::from_micros(u64::from(self.poll_us));
        WorkerOptions { linked_commit: self.linked_commit, poll, partscan }
    }
}

/// What all instances of a daemon share.
#[derive(Clone, Debug)]
pub struct EngineContext {
    /// See `EngineConfig`.
    pub run_dir: PathBuf,
    /// How devices are shown to their users.
    pub frontend: Frontend,
    /// Upper half of the mark of devices of this run directory.
    pub owner_hash: u32,
    /// Images in use.
    pub claims: Claims,
    /// State that outlives the daemon.
    pub state: StateDir,
    /// Names below /dev, if devices have them.
    pub dev_links: Option<Arc<DevLinks>>,
}

impl EngineContext {
    /// A mark for a new device: whose it is, and a number that tells it from the next one with
    /// the same number at the driver.
    pub fn new_owner_cookie(&self) -> u64 {
        let nonce = std::hash::BuildHasher::build_hasher(&std::hash::RandomState::new());
        u64::from(self.owner_hash) << 32 | u64::from(std::hash::Hasher::finish(&nonce) as u32)
    }

    /// Whether a device has such a mark.
    pub fn is_ours(&self, cookie: u64) -> bool {
        (cookie >> 32) as u32 == self.owner_hash
    }
}

/// A private pool of devices.
#[derive(Debug)]
pub struct Instance {
    pub(super) context: EngineContext,
    directory: PathBuf,
    /// None: the door makes the names.
    links: Option<Links>,
    pub(super) backend: Backend,
    pub(super) workers: Workers,
    pub(super) table: DeviceMap<Arc<AttachedDevice>>,
}

impl Instance {
    /// Makes the directory, opens the door and starts the workers.
    pub fn start(context: &EngineContext, spec: &InstanceSpec, tuning: Tuning) -> Result<Instance> {
        let directory = context.run_dir.join(&spec.name);
        let table = DeviceMap::new(spec, &directory)?;
        let cpus = spec.cpus.as_deref().map(parse_cpus).transpose()?.unwrap_or_default();
        check_cpus(&cpus)?;
        let count = worker_count(spec.workers, &cpus)?;
        fs::create_dir(&directory).or_else(|error| match error.kind() {
            std::io::ErrorKind::AlreadyExists if directory.is_dir() => Ok(()),
            _ => Err(Error::os(error, format!("cannot make {}", directory.display()))),
        })?;
        let opened = context.frontend.backend(&directory, count as usize, &cpus).and_then(|backend| {
            let options = tuning.options(true);
            let sizes = RingSizes::for_devices(MAX_DEVICES);
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
        Ok(Instance { context: context.clone(), directory, links, backend, workers: workers.into(), table })
    }

    /// As it is now.
    pub fn info(&self) -> InstanceInfo {
        let (spec, devices) = self.table.spec();
        InstanceInfo {
            name: spec.name,
            max_devices: spec.max_devices,
            devices,
            workers: self.workers.len() as u32,
            cpus: spec.cpus,
            directory: self.directory.display().to_string(),
        }
    }

    /// Changes how many devices it may have; devices that are there stay.
    pub fn set_max_devices(&self, max_devices: u32) -> Result<()> {
        self.context.state.save_instance(&self.table.set_max_devices(max_devices)?)
    }

    /// Serves an image as a new device; with `force`, one that others use as well.
    pub fn attach(&self, spec: &AttachSpec, force: bool, image: OwnedFd) -> Result<DeviceInfo> {
        self.check_not_served_here(&image, &spec.path)?;
        let image_spec = image_spec(spec);
        let image = Image::open(image, &image_spec, &spec.path)?;
        let parameters = self.parameters(spec)?;
        let reservation = self.table.reserve(spec.number)?;
        let (identity, geometry) = (image.identity(), image.geometry());
        let number = reservation.number;
        let sharing = if force { Sharing::Warn } else { Sharing::Refuse };
        let (image, hold) = sharing::claim_image(&self.context.claims, image, spec, number, sharing)?;
        let device = self.backend.add(number, parameters)?;
        let (id, parameters) = (device.id(), device.parameters());
        let (served, begun) = Served::start(device, &self.workers, reservation.slot, image, StartMode::New);
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
                // It may yet come to life: its number, slot and image stay taken.
                tracing::error!(%undo, id, "a device that failed cannot be taken away either");
                reservation.fill(attached);
            }
            return Err(error);
        }
        reservation.fill(attached.clone());
        Ok(self.describe(number, &attached))
    }

    /// Takes a device away.
    pub fn detach(&self, number: u32, when: StopMode) -> Result<String> {
        let attached = self.table.withdraw(number)?;
        let path = self.table.path(number).display().to_string();
        // The names go while the number at the driver is still taken: they must never lead to the
        // device that has it next.
        let stopped = attached.stop(when).inspect(|()| self.unpublish(number));
        if let Err(error) = stopped.and_then(|()| attached.served.release()) {
            self.table.put_back(number, Arc::clone(&attached));
            if error.kind() != Kind::Busy {
                return Err(error);
            }
            let user = user_of(attached.served.device()).map_or(String::new(), |user| format!(": {user}"));
            return Err(Error::new(Kind::Busy, format!("{path} is in use{user}"))
                .hint("unmount it or end what has it open; --force detaches it all the same"));
        }
        let slot = attached.served.slot();
        drop(attached);
        self.table.remove(number, slot);
        Ok(path)
    }

    /// Adapts a device to its image's present size, or both to a size that is given.
    pub fn resize(&self, number: u32, spec: &ResizeSpec) -> Result<DeviceInfo> {
        let attached = self.table.get(number)?;
        let path = self.table.path(number).display().to_string();
        attached.served.resize(spec.size, |now, new| {
            if new < now && !spec.shrink {
                let context = format!("{path} has {now} bytes and would have only {new}");
                return Err(Error::new(Kind::Invalid, context)
                    .hint("shrink the file system on it first, then use --shrink"));
            }
            match user_of(attached.served.device()).filter(|_| new < now && !spec.force) {
                Some(user) => {
                    Err(Error::new(Kind::Busy, format!("{path} is {user}, and would become smaller"))
                        .hint("end that use first; --force shrinks it all the same"))
                }
                None => Ok(()),
            }
        })?;
        Ok(self.describe(number, &attached))
    }

    /// Numbers of its devices.
    pub fn numbers(&self) -> Vec<u32> {
        self.table.numbers()
    }

    /// Its devices.
    pub fn live(&self) -> Vec<Arc<AttachedDevice>> {
        self.table.live().into_iter().map(|(_, attached)| attached).collect()
    }

    /// The device that has this node.
    pub fn number_of(&self, node: &Path) -> Option<u32> {
        let live = self.table.live();
        live.into_iter()
            .find(|(_, attached)| attached.served.device().node() == node)
            .map(|(number, _)| number)
    }

    /// All devices that are served, or the one with this number.
    pub fn devices(&self, only: Option<u32>) -> Result<Vec<DeviceInfo>> {
        self.select(only)
            .map(|select| select.iter().map(|(number, attached)| self.describe(*number, attached)).collect())
    }

    /// Figures of the same.
    pub fn stats(&self, only: Option<u32>) -> Result<Vec<DeviceStats>> {
        let stats = |(number, attached): &(u32, Arc<AttachedDevice>)| {
            let path = self.table.path(*number).display().to_string();
            attached.served.stats(path, attached.record.spec.path.clone())
        };
        let select = self.select(only)?;
        match only {
            Some(_) => select.iter().map(stats).collect(),
            // One that is stuck, or just going, does not hide the others.
            None => Ok(select.iter().filter_map(|device| stats(device).ok()).collect()),
        }
    }

    /// Takes nothing more.
    pub fn close(&self) {
        self.table.close();
    }

    /// Takes nothing more, if it has nothing now; false when it has.
    pub fn close_if_empty(&self) -> bool {
        self.table.close_if_empty()
    }

    /// Its directory and state go. All devices must be gone.
    pub fn erase(&self) {
        self.backend.close();
        self.context.state.remove_instance(&self.table.spec().0.name);
        let _ = fs::remove_dir(&self.directory);
    }

    fn select(&self, only: Option<u32>) -> Result<Vec<(u32, Arc<AttachedDevice>)>> {
        let select = match only {
            Some(number) => vec![(number, self.table.get(number)?)],
            None => self.table.live(),
        };
        // A worker that has to leave direct I/O must not log: it is said when somebody looks next.
        for (number, AttachedDevice { record, served, .. }) in
            select.iter().map(|(n, attached)| (n, &**attached))
        {
            if served.take_direct_io_disabled() {
                let (instance, path) = (&record.spec.instance, &record.spec.path);
                tracing::warn!(
                    "{instance}/loop{number} ({path}) uses the page cache: direct I/O was refused"
                );
            }
        }
        Ok(select)
    }

    pub(super) fn describe(&self, number: u32, attached: &AttachedDevice) -> DeviceInfo {
        attached.info(number, &self.table.path(number))
    }

    fn parameters(&self, spec: &AttachSpec) -> Result<DeviceParameters> {
        let workers = self.workers.len() as u32;
        let queues = if spec.queues == 0 { workers } else { spec.queues };
        if queues > workers {
            let context = format!("{queues} queues, but instance {} has {workers} workers", spec.instance);
            return Err(Error::new(Kind::Invalid, context)
                .hint("make an instance with more: instance create --workers"));
        }
        let depth = if spec.depth == 0 { DEFAULT_DEPTH } else { spec.depth };
        if depth > MAX_DEPTH {
            return Err(Error::new(Kind::Invalid, format!("a queue depth of {depth} is too large"))
                .hint(format!("use 1 to {MAX_DEPTH}")));
        }
        if spec.partscan && !self.backend.uses_links() {
            return Err(Error::new(Kind::Unsupported, "files (FUSE) have no partitions")
                .hint("attach a part of the image with --offset and --size-limit"));
        }
        let io_mode = spec.io_mode.unwrap_or_else(|| self.backend.best_io_mode());
        self.backend.check_io_mode(io_mode)?;
        Ok(DeviceParameters {
            io_mode,
            queues: queues as u16,
            depth: depth as u16,
            owner_cookie: self.context.new_owner_cookie(),
            recoverable: true,
            partscan: spec.partscan,
        })
    }

    /// Refuses an image that this very daemon serves: to read it, a worker would wait for itself.
    pub(super) fn check_not_served_here(&self, image: &OwnedFd, name: &str) -> Result<()> {
        let stat = rustix::fs::fstat(image.as_fd())
            .map_err(|error| Error::os(error, format!("cannot examine {name}")))?;
        if !self.context.frontend.serves(stat.st_dev) {
            return Ok(());
        }
        Err(Error::new(Kind::Invalid, format!("{name} is itself served by this daemon"))
            .hint("attach the image behind it; 'loopengine list' shows which one that is"))
    }

    /// Makes a device known under its name, and to a later daemon.
    pub(super) fn publish(&self, number: u32, record: &DeviceRecord, served: &Served) -> Result<()> {
        self.context.state.save_device(number, record)?;
        self.link(number, served)
    }

    pub(super) fn link(&self, number: u32, served: &Served) -> Result<()> {
        self.links.as_ref().map_or(Ok(()), |links| links.make(number, &served.device().node()))
    }

    /// Has the names of partitions follow those that its disks have by now.
    pub fn update_partition_links(&self) {
        let Some(links) = &self.links else { return };
        for (number, attached) in self.table.live() {
            let there = || self.table.get(number).is_ok_and(|now| Arc::ptr_eq(&now, &attached));
            if let Err(error) = links.follow(number, &attached.node(), there) {
                tracing::warn!("partitions of {} have no names: {error}", self.table.path(number).display());
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
    }
}

/// Refuses CPUs that this machine lacks: workers would silently run on fewer.
fn check_cpus(cpus: &[usize]) -> Result<()> {
    let present = fs::read_to_string("/sys/devices/system/cpu/present").unwrap_or_default();
    let present = present.trim();
    let Ok(known) = parse_cpus(present) else { return Ok(()) };
    match cpus.iter().find(|cpu| !known.contains(cpu)) {
        None => Ok(()),
        Some(cpu) => Err(Error::new(Kind::Invalid, format!("this machine has no CPU {cpu}"))
            .hint(format!("choose from {present}"))),
    }
}

/// One worker a CPU that may be used, two at least; but no more than the machine has CPUs, for the
/// driver allows no more queues.
fn worker_count(wanted: u32, cpus: &[usize]) -> Result<u32> {
    if wanted > MAX_WORKERS {
        return Err(Error::new(Kind::Invalid, format!("an instance can have 1 to {MAX_WORKERS} workers")));
    }
    let allowed = sys::allowed_cpus().len() as u32;
    let usable = if cpus.is_empty() { allowed } else { cpus.len() as u32 };
    Ok(match wanted {
        0 => usable.max(2).min(allowed.max(1)).min(MAX_WORKERS),
        wanted => wanted,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_cpus_that_the_machine_lacks() {
        assert!(check_cpus(&[]).is_ok() && check_cpus(&[0]).is_ok());
        let error = check_cpus(&[0, 8191]).unwrap_err();
        assert!(error.kind() == Kind::Invalid && error.to_string().contains("no CPU 8191"), "{error}");
    }
}
