//! An instance: a private pool of devices with its own workers, numbers and quota.
//!
//! Knows its devices by number. The table is locked for moments only: what takes time (attaching,
//! stopping) happens outside, with the number reserved.

use std::collections::BTreeMap;
use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::claims::{Claim, Claims};
use super::names::parse_cpus;
use super::served::{Begin, Served, Workers};
use super::spec::{AttachSpec, DataPath, DeviceInfo, DeviceStats, InstanceInfo, InstanceSpec};
use super::state::{DeviceRecord, StateDir};
use super::{MAX_DEVICES, Tuning};
use crate::error::{Error, Kind, Result};
use crate::frontend::ublk::{Device, Granted, Parameters, Stop};
use crate::image::{Geometry, Image, Source};
use crate::ring::{Sizes, SlotId};
use crate::sys;
use crate::worker::{Switches, WorkerHandle};

/// Queue depth where none is asked for, and the most that can be.
const DEFAULT_DEPTH: u32 = 128;
const MAX_DEPTH: u32 = 1024;
/// Workers that an instance can have.
const MAX_WORKERS: u32 = 256;

/// What all instances of a daemon share.
#[derive(Clone, Debug)]
pub struct Shared {
    /// See `EngineConfig`.
    pub run_dir: PathBuf,
    /// What the driver grants.
    pub granted: Granted,
    /// Upper half of the mark of ublk devices of this run directory.
    pub owner: u32,
    /// Images in use.
    pub claims: Claims,
    /// State that outlives the daemon.
    pub state: StateDir,
}

impl Shared {
    /// A mark for a new device: whose it is, and a number that tells it from the next one with
    /// the same number at the driver.
    fn new_mark(&self) -> u64 {
        let nonce = std::hash::BuildHasher::build_hasher(&std::hash::RandomState::new());
        u64::from(self.owner) << 32 | u64::from(std::hash::Hasher::finish(&nonce) as u32)
    }

    /// Whether a device has such a mark.
    pub fn is_ours(&self, mark: u64) -> bool {
        (mark >> 32) as u32 == self.owner
    }
}

/// A device's entry in its instance's table.
#[derive(Clone, Debug)]
enum Entry {
    /// Being attached or taken away.
    Reserved,
    /// Served.
    Live(Arc<Attached>),
}

/// A served device and what it was attached with.
#[derive(Debug)]
pub struct Attached {
    record: DeviceRecord,
    served: Served,
    _claim: Option<Claim>,
}

#[derive(Debug)]
struct Table {
    spec: InstanceSpec,
    devices: BTreeMap<u32, Entry>,
    /// How often each slot of the workers was let; `None` while it is free is kept in `free`.
    generations: Vec<u32>,
    free: Vec<u16>,
    closed: bool,
}

/// A private pool of devices.
#[derive(Debug)]
pub struct Instance {
    shared: Shared,
    directory: PathBuf,
    workers: Workers,
    table: Mutex<Table>,
}

impl Instance {
    /// Starts the workers and makes the directory.
    pub fn start(shared: &Shared, spec: &InstanceSpec, tuning: Tuning) -> Result<Instance> {
        if !(1..=MAX_DEVICES).contains(&spec.max_devices) {
            return Err(Error::new(
                Kind::Invalid,
                format!("an instance can have 1 to {MAX_DEVICES} devices"),
            ));
        }
        let cpus = spec.cpus.as_deref().map(parse_cpus).transpose()?.unwrap_or_default();
        let count = worker_count(spec.workers, &cpus)?;
        let directory = shared.run_dir.join(&spec.name);
        fs::create_dir(&directory).or_else(|error| match error.kind() {
            std::io::ErrorKind::AlreadyExists if directory.is_dir() => Ok(()),
            _ => Err(Error::os(error, format!("cannot make {}", directory.display()))),
        })?;
        let switches = Switches {
            linked_commit: tuning.linked_commit,
            poll: std::time::Duration::from_micros(u64::from(tuning.poll_us)),
        };
        let sizes = Sizes::for_devices(MAX_DEVICES);
        let workers: Result<Vec<_>> = (0..count)
            .map(|q| WorkerHandle::start(format!("{}/{q}", spec.name), sizes, switches, cpus.clone()))
            .collect();
        let workers = workers.inspect_err(|_| {
            let _ = fs::remove_dir(&directory);
        })?;
        shared.state.save_instance(spec)?;
        let table = Table {
            spec: spec.clone(),
            devices: BTreeMap::new(),
            generations: Vec::new(),
            free: Vec::new(),
            closed: false,
        };
        Ok(Instance { shared: shared.clone(), directory, workers: workers.into(), table: Mutex::new(table) })
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// As it is now.
    pub fn info(&self) -> InstanceInfo {
        let table = self.table();
        InstanceInfo {
            name: table.spec.name.clone(),
            max_devices: table.spec.max_devices,
            devices: table.devices.len() as u32,
            workers: self.workers.len() as u32,
            cpus: table.spec.cpus.clone(),
            directory: self.directory.display().to_string(),
        }
    }

    /// Changes how many devices it may have; devices that are there stay.
    pub fn set_max_devices(&self, max_devices: u32) -> Result<()> {
        if !(1..=MAX_DEVICES).contains(&max_devices) {
            return Err(Error::new(
                Kind::Invalid,
                format!("an instance can have 1 to {MAX_DEVICES} devices"),
            ));
        }
        let mut table = self.table();
        table.spec.max_devices = max_devices;
        self.shared.state.save_instance(&table.spec)
    }

    /// Serves an image as a new device.
    pub fn attach(&self, spec: &AttachSpec, image: OwnedFd) -> Result<DeviceInfo> {
        let source = source(spec);
        let image = Image::open(image, &source, &spec.path)?;
        let claim = self.shared.claims.claim(image.identity(), spec.read_only, &spec.path)?;
        let parameters = self.parameters(spec)?;
        let reservation = self.reserve(spec.number)?;
        let (identity, geometry) = (image.identity(), image.geometry());
        let device = Device::add(self.shared.granted, parameters)?;
        let (id, parameters) = (device.id(), device.parameters());
        let (served, begun) = Served::begin(device, &self.workers, reservation.slot, image, Begin::Fresh);
        let number = reservation.number;
        let record = DeviceRecord {
            spec: AttachSpec { number: Some(number), data_path: Some(parameters.path), ..spec.clone() },
            id,
            mark: parameters.owner,
            identity,
            data_path: parameters.path,
            queues: parameters.queues,
            depth: parameters.depth,
            block_size: geometry.block_size,
            size: geometry.size,
        };
        let outcome = begun.and_then(|()| self.publish(number, &record));
        let attached = Arc::new(Attached { record, served, _claim: Some(claim) });
        if let Err(error) = outcome {
            let undone = attached.served.stop(Stop::Always);
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

    /// Takes a device back that a daemon before this one served. Whatever fails, it keeps its
    /// entry: a device with users is never forgotten.
    pub fn recover(&self, number: u32, record: DeviceRecord) -> Result<()> {
        let parameters = Parameters {
            path: record.data_path,
            queues: record.queues,
            depth: record.depth,
            owner: record.mark,
        };
        let reservation = self.reserve_again(number)?;
        let device = Device::existing(self.shared.granted, record.id, parameters);
        let source = Source { block_size: record.block_size, ..source(&record.spec) };
        let path = Path::new(&record.spec.path);
        let image = Image::reopen(path, &source, &record.identity).and_then(|image| {
            let claim =
                self.shared.claims.claim(image.identity(), record.spec.read_only, &record.spec.path)?;
            Ok((image, claim))
        });
        let slot = reservation.slot;
        let (served, claim, outcome) = match image {
            Ok((image, claim)) => {
                let (served, outcome) = Served::begin(device, &self.workers, slot, image, Begin::Recovered);
                (served, Some(claim), outcome)
            }
            Err(error) => {
                let geometry = last_known(&record);
                (Served::abandoned(device, &self.workers, slot, geometry), None, Err(error))
            }
        };
        let published = self.publish(number, &record);
        reservation.fill(Arc::new(Attached { record, served, _claim: claim }));
        outcome.and(published)
    }

    /// Takes a device away.
    pub fn detach(&self, number: u32, when: Stop) -> Result<String> {
        let attached = {
            let mut table = self.table();
            let entry = table.devices.get_mut(&number).ok_or_else(|| self.no_such_device(number))?;
            match std::mem::replace(entry, Entry::Reserved) {
                Entry::Live(attached) => attached,
                Entry::Reserved => {
                    let context =
                        format!("{} is being attached or detached", self.device_path(number).display());
                    return Err(Error::new(Kind::Busy, context).hint("try again"));
                }
            }
        };
        let path = self.device_path(number).display().to_string();
        // The names go while the number at the driver is still taken: they must never lead to the
        // device that has it next.
        let stopped = attached.served.stop(when).inspect(|()| self.unpublish(number));
        if let Err(error) = stopped.and_then(|()| attached.served.release()) {
            self.table().devices.insert(number, Entry::Live(attached));
            return Err(match error.kind() {
                Kind::Busy => Error::new(Kind::Busy, format!("{path} is in use"))
                    .hint("unmount it or end what has it open; --force detaches it all the same"),
                _ => error,
            });
        }
        let slot = attached.served.slot();
        drop(attached);
        let mut table = self.table();
        table.devices.remove(&number);
        table.free.push(slot.index);
        Ok(path)
    }

    /// Adapts a device to its image's present size.
    pub fn resize(&self, number: u32) -> Result<DeviceInfo> {
        let attached = self.attached(number)?;
        attached.served.resize()?;
        Ok(self.describe(number, &attached))
    }

    /// Numbers of its devices.
    pub fn numbers(&self) -> Vec<u32> {
        self.table().devices.keys().copied().collect()
    }

    /// The device that is this ublk device.
    pub fn number_of(&self, id: u32) -> Option<u32> {
        self.live().into_iter().find(|(_, attached)| attached.record.id == id).map(|(number, _)| number)
    }

    /// All devices that are served, or the one with this number.
    pub fn devices(&self, only: Option<u32>) -> Result<Vec<DeviceInfo>> {
        self.chosen(only)
            .map(|chosen| chosen.iter().map(|(number, attached)| self.describe(*number, attached)).collect())
    }

    /// Figures of the same.
    pub fn stats(&self, only: Option<u32>) -> Result<Vec<DeviceStats>> {
        let figures = |(number, attached): &(u32, Arc<Attached>)| {
            let path = self.device_path(*number).display().to_string();
            attached.served.stats(path, attached.record.spec.path.clone())
        };
        let chosen = self.chosen(only)?;
        match only {
            Some(_) => chosen.iter().map(figures).collect(),
            // One that is stuck, or just going, does not hide the others.
            None => Ok(chosen.iter().filter_map(|device| figures(device).ok()).collect()),
        }
    }

    /// Takes nothing more.
    pub fn close(&self) {
        self.table().closed = true;
    }

    /// Takes nothing more, if it has nothing now; false when it has.
    pub fn close_if_empty(&self) -> bool {
        let mut table = self.table();
        table.closed |= table.devices.is_empty();
        table.devices.is_empty()
    }

    /// Its directory and state go. All devices must be gone.
    pub fn erase(&self) {
        let name = self.table().spec.name.clone();
        self.shared.state.remove_instance(&name);
        let _ = fs::remove_dir(&self.directory);
    }

    fn chosen(&self, only: Option<u32>) -> Result<Vec<(u32, Arc<Attached>)>> {
        match only {
            Some(number) => Ok(vec![(number, self.attached(number)?)]),
            None => Ok(self.live()),
        }
    }

    fn live(&self) -> Vec<(u32, Arc<Attached>)> {
        let table = self.table();
        let live = table.devices.iter().filter_map(|(number, entry)| match entry {
            Entry::Live(attached) => Some((*number, attached.clone())),
            Entry::Reserved => None,
        });
        live.collect()
    }

    fn attached(&self, number: u32) -> Result<Arc<Attached>> {
        match self.table().devices.get(&number) {
            Some(Entry::Live(attached)) => Ok(attached.clone()),
            _ => Err(self.no_such_device(number)),
        }
    }

    fn no_such_device(&self, number: u32) -> Error {
        Error::new(Kind::NotFound, format!("there is no device {}", self.device_path(number).display()))
            .hint("'loopengine list' shows all")
    }

    fn device_path(&self, number: u32) -> PathBuf {
        self.directory.join(format!("loop{number}"))
    }

    fn describe(&self, number: u32, attached: &Attached) -> DeviceInfo {
        let Attached { record, served, .. } = attached;
        let geometry = served.geometry();
        DeviceInfo {
            instance: record.spec.instance.clone(),
            number,
            path: self.device_path(number).display().to_string(),
            node: served.device().node().display().to_string(),
            image: record.spec.path.clone(),
            state: served.state(),
            size: geometry.size,
            offset: geometry.offset,
            size_limit: record.spec.size_limit,
            block_size: geometry.block_size,
            read_only: geometry.read_only,
            buffered: record.spec.buffered,
            queues: u32::from(record.queues),
            depth: u32::from(record.depth),
            data_path: record.data_path,
        }
    }

    fn parameters(&self, spec: &AttachSpec) -> Result<Parameters> {
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
        let path = match spec.data_path {
            Some(path) if self.shared.granted.allows(path) => path,
            Some(path) => {
                let context = format!("this kernel does not grant path {}", path.as_str());
                return Err(
                    Error::new(Kind::Unsupported, context).hint("'loopengine features' shows what it grants")
                );
            }
            None => self.shared.granted.paths().first().copied().unwrap_or(DataPath::Copy),
        };
        Ok(Parameters { path, queues: queues as u16, depth: depth as u16, owner: self.shared.new_mark() })
    }

    /// Makes a device known under its name, and to a later daemon.
    fn publish(&self, number: u32, record: &DeviceRecord) -> Result<()> {
        self.shared.state.save_device(number, record)?;
        let path = self.device_path(number);
        let _ = fs::remove_file(&path);
        symlink(format!("/dev/ublkb{}", record.id), &path)
            .map_err(|error| Error::os(error, format!("cannot make {}", path.display())))
    }

    fn unpublish(&self, number: u32) {
        let _ = fs::remove_file(self.device_path(number));
        let name = self.table().spec.name.clone();
        self.shared.state.remove_device(&name, number);
    }

    /// Takes a number and a slot, within the quota.
    fn reserve(&self, wanted: Option<u32>) -> Result<Reservation<'_>> {
        let mut table = self.table();
        let name = table.spec.name.clone();
        if table.closed {
            return Err(Error::new(Kind::NotFound, format!("instance {name} is being removed")));
        }
        let number = match wanted {
            Some(number) if table.devices.contains_key(&number) => {
                return Err(Error::new(
                    Kind::Exists,
                    format!("{} exists", self.device_path(number).display()),
                ));
            }
            Some(number) => number,
            None => (0..).find(|number| !table.devices.contains_key(number)).unwrap_or(u32::MAX),
        };
        if table.devices.len() >= table.spec.max_devices as usize {
            let context = format!("instance {name} has its {} devices already", table.spec.max_devices);
            return Err(
                Error::new(Kind::Quota, context).hint("detach one, or make an instance with a larger --max")
            );
        }
        Ok(self.let_slot(&mut table, number))
    }

    /// The same for a device that exists already: quotas are for new ones.
    fn reserve_again(&self, number: u32) -> Result<Reservation<'_>> {
        let mut table = self.table();
        if table.devices.contains_key(&number) {
            return Err(Error::new(Kind::Exists, format!("{} exists", self.device_path(number).display())));
        }
        Ok(self.let_slot(&mut table, number))
    }

    fn let_slot(&self, table: &mut Table, number: u32) -> Reservation<'_> {
        let index = match table.free.pop() {
            Some(index) => {
                table.generations[usize::from(index)] += 1;
                index
            }
            None => {
                table.generations.push(0);
                (table.generations.len() - 1) as u16
            }
        };
        let slot = SlotId { index, generation: table.generations[usize::from(index)] & 0xff_ffff };
        table.devices.insert(number, Entry::Reserved);
        Reservation { instance: self, number, slot, filled: false }
    }
}

/// A number and a slot that are given back unless they are filled.
struct Reservation<'a> {
    instance: &'a Instance,
    number: u32,
    slot: SlotId,
    filled: bool,
}

impl Reservation<'_> {
    fn fill(mut self, attached: Arc<Attached>) {
        self.filled = true;
        self.instance.table().devices.insert(self.number, Entry::Live(attached));
    }
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        if !self.filled {
            let mut table = self.instance.table();
            table.devices.remove(&self.number);
            table.free.push(self.slot.index);
        }
    }
}

fn source(spec: &AttachSpec) -> Source {
    Source {
        offset: spec.offset,
        size_limit: spec.size_limit,
        block_size: spec.block_size,
        read_only: spec.read_only,
        buffered: spec.buffered,
    }
}

/// What can be said about a device whose image is gone.
fn last_known(record: &DeviceRecord) -> Geometry {
    Geometry {
        size: record.size,
        offset: record.spec.offset,
        block_size: record.block_size,
        physical_block_size: record.block_size,
        dma_align: record.block_size,
        discard_granularity: record.block_size,
        read_only: record.spec.read_only,
        can_discard: false,
        can_write_zeroes: false,
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
