// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The engine: all instances of one daemon.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::companion::Companion;
use super::instance::{EngineContext, Instance};
use super::links::{DEV_DIR, DevLinks};
use super::names::{DeviceName, check_instance_name, parse_device};
use super::spec::*;
use super::state::StateDir;
use super::{MAX_INSTANCES, write_back};
use crate::error::{Error, Kind, Result};
use crate::frontend::{self, Frontends, StopMode, ublk};
use crate::hash::fnv1a;
use crate::{broken_kernels, kernels, sys};

/// Files that a daemon may have open: some for each of several thousand devices.
const OPEN_FILES: u64 = 1 << 18;

/// The configuration of the engine.
#[derive(Clone, Debug)]
pub struct EngineConfig {
    /// Directory of instances, device names and state, e.g. `/run/loopengine`.
    pub run_dir: PathBuf,
    /// The limits of the instance `default`.
    pub default_instance: InstanceSpec,
    /// The backend of instances by default, and others that they and pools can ask for.
    pub backends: Vec<BackendKind>,
    /// Options of all workers.
    pub tuning: Tuning,
    /// Devices also have names below /dev.
    pub dev_links: bool,
}

/// Options of the workers; the defaults measured best.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tuning {
    /// Submit transfer and commit as one linked chain where possible.
    pub linked_commit: bool,
}

/// The devices that a call selects.
#[derive(Clone, Debug)]
pub enum Selector {
    /// One device, by a path that leads to it (`/run/loopengine/default/loop0`, `/dev/ublkb3`), as
    /// `NAME/loopN`, or as `loopN` for the instance `default`.
    Device(String),
    /// All devices of one instance.
    Instance(String),
    /// All devices of all instances.
    All,
}

/// All instances and pools of one daemon.
#[derive(Debug)]
pub struct Engine {
    pub(super) context: EngineContext,
    pub(super) tuning: Tuning,
    instances: Mutex<BTreeMap<String, Arc<Instance>>>,
    companions: Mutex<Vec<Arc<dyn Companion>>>,
}

impl Engine {
    /// Checks the frontend, recovers the devices of a previous daemon with the same run directory,
    /// and creates the instance `default`. Logs what was and was not recovered.
    pub fn start(config: EngineConfig) -> Result<Engine> {
        sys::raise_file_limit(OPEN_FILES);
        let frontends = Frontends::open(&config.backends)?;
        let dev_links = match (config.dev_links, frontends.default_kind()) {
            (true, BackendKind::Ublk | BackendKind::Loop) => Some(Arc::new(DevLinks::take(&config.run_dir)?)),
            (true, BackendKind::Fuse) => {
                tracing::warn!("--dev-links is ignored: only block devices have names in {DEV_DIR}");
                None
            }
            (false, _) => None,
        };
        if dev_links.is_none() {
            DevLinks::forget(&config.run_dir);
        }
        let context = EngineContext {
            owner_hash: owner_hash(&config.run_dir),
            state: StateDir::new(&config.run_dir),
            claims: Default::default(),
            run_dir: config.run_dir,
            frontends,
            dev_links,
        };
        let engine = Engine {
            context,
            tuning: config.tuning,
            instances: Mutex::default(),
            companions: Mutex::default(),
        };
        match engine.context.frontends.of_pool(None).map(|frontend| frontend.kind()) {
            Ok(BackendKind::Loop) if engine.context.frontends.default_kind() != BackendKind::Loop => {
                let why = kernels::PRIVATE_UBLK.missing().map(|missing| format!(": {missing}"));
                tracing::info!("private pools use the kernel's loop driver{}", why.unwrap_or_default());
            }
            Ok(_) => {}
            Err(error) => tracing::info!("{error}"),
        }
        engine.recover_all(&config.default_instance)?.iter().for_each(|note| tracing::info!("{note}"));
        if !engine.instances().iter().any(|instance| instance.name == config.default_instance.name) {
            engine.create_instance(&config.default_instance)?;
        }
        Ok(engine)
    }

    /// The features of this kernel. Works without an engine.
    pub fn features() -> Result<Features> {
        let backends = frontend::present();
        let granted = match ublk::DriverFeatures::query() {
            // The ublk driver is not loaded; report the other features.
            Err(error) if error.kind() == Kind::Unavailable && !backends.is_empty() => {
                ublk::DriverFeatures(0)
            }
            asked => asked?,
        };
        let kernel = kernels::release();
        Ok(Features {
            driver_fault: broken_kernels::find(&kernel).map(|broken| broken.fault.to_owned()),
            kernel,
            backends,
            flags: granted.names(),
            io_modes: granted.io_modes(),
            recovery: granted.supports_recovery(),
            resize: granted.supports_resize(),
        })
    }

    pub(super) fn table(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Instance>>> {
        self.instances.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Creates an instance.
    pub fn create_instance(&self, spec: &InstanceSpec) -> Result<InstanceInfo> {
        self.start_instance(spec, None)
    }

    /// Likewise. `backend`: that of devices which wait for it, whatever is specified.
    pub(super) fn start_instance(
        &self,
        spec: &InstanceSpec,
        backend: Option<BackendKind>,
    ) -> Result<InstanceInfo> {
        check_instance_name(&spec.name)?;
        // Held while the workers start (milliseconds), so that names stay unique.
        let mut table = self.table();
        if table.contains_key(&spec.name) {
            return Err(Error::new(Kind::Exists, format!("instance {} exists", spec.name))
                .hint("choose another name; 'loopengine instance list' lists all"));
        }
        if table.len() >= MAX_INSTANCES {
            return Err(Error::new(
                Kind::Quota,
                format!("the limit of {MAX_INSTANCES} instances is reached"),
            ));
        }
        let instance = Arc::new(Instance::start(&self.context, spec, backend, self.tuning)?);
        let info = instance.info();
        table.insert(spec.name.clone(), instance);
        Ok(info)
    }

    /// From now on `companion` ends with this engine.
    pub fn add_companion(&self, companion: Arc<dyn Companion>) {
        self.companions.lock().unwrap_or_else(PoisonError::into_inner).push(companion);
    }

    pub(super) fn companions(&self) -> Vec<Arc<dyn Companion>> {
        self.companions.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// All instances, by name.
    pub fn instances(&self) -> Vec<InstanceInfo> {
        self.table().values().map(|instance| instance.info()).collect()
    }

    /// Changes the device limit of an instance.
    pub fn set_max_devices(&self, name: &str, max_devices: u32) -> Result<()> {
        self.instance(name)?.set_max_devices(max_devices)
    }

    /// Removes an instance; with `force`, detaches its devices even if they are in use.
    pub fn remove_instance(&self, name: &str, force: bool) -> Result<()> {
        if name == DEFAULT_INSTANCE {
            return Err(Error::new(Kind::Invalid, "the instance 'default' cannot be removed")
                .hint("detach its devices with 'loopengine detach --all --instance default'"));
        }
        let instance = self.instance(name)?;
        let numbers: Vec<String> = instance.numbers().iter().map(|number| format!("loop{number}")).collect();
        if !force && !numbers.is_empty() {
            return Err(Error::new(
                Kind::Busy,
                format!("instance {name} has devices: {}", numbers.join(", ")),
            )
            .hint(format!("detach them with 'loopengine detach --all --instance {name}', or use --force")));
        }
        self.detach(&Selector::Instance(name.to_owned()), force)?;
        if !instance.close_if_empty() {
            return Err(Error::new(Kind::Busy, format!("instance {name} has devices")).hint("try again"));
        }
        let mut table = self.table();
        if table.get(name).is_some_and(|present| Arc::ptr_eq(present, &instance)) {
            instance.remove_files();
            table.remove(name);
        }
        drop(table);
        // Stops its workers, without holding the table's lock.
        drop(instance);
        Ok(())
    }

    /// Attaches `image` (opened by the caller, for writing unless the device is read-only) and
    /// returns once the device is usable; with `force`, even if the image is in use. Undoes
    /// everything on failure.
    pub fn attach(&self, spec: &AttachSpec, force: bool, image: OwnedFd) -> Result<DeviceInfo> {
        let name = &spec.instance;
        let instance = self.instance(name).map_err(|error| match error.kind() {
            Kind::NotFound => error.hint(format!("create it with 'loopengine instance create {name}'")),
            _ => error,
        });
        instance?.attach(spec, force, image)
    }

    /// Detaches devices. Without `force` a device in use stays, and the error says so. With
    /// [`Selector::All`] or `Instance`, continues after a failure and reports the first one.
    /// Returns the paths of the detached devices.
    pub fn detach(&self, which: &Selector, force: bool) -> Result<Vec<String>> {
        let when = if force { StopMode::Always } else { StopMode::IfUnused };
        let selected = self.select(which)?;
        if force {
            write_back::write_back(
                selected.iter().flat_map(|(instance, _)| write_back::nodes_of(instance)).collect(),
            );
        }
        let mut gone = Vec::new();
        let mut first = None;
        for (instance, only) in selected {
            let numbers = only.map_or_else(|| instance.numbers(), |number| vec![number]);
            for number in numbers {
                match instance.detach(number, when) {
                    Ok(path) => gone.push(path),
                    Err(error) => first = first.or(Some(error)),
                }
            }
        }
        first.map_or(Ok(gone), Err)
    }

    /// Resizes a device to the present size of its image, or both to a given size.
    pub fn resize(&self, spec: &ResizeSpec) -> Result<DeviceInfo> {
        match &self.select(&Selector::Device(spec.device.clone()))?[..] {
            [(instance, Some(number))] => instance.resize(*number, spec),
            _ => Err(Error::new(Kind::Internal, "the device name selected several devices")),
        }
    }

    /// Changes the limits of a device's I/O.
    pub fn set_io_limits(&self, spec: &IoLimitsSpec) -> Result<DeviceInfo> {
        match &self.select(&Selector::Device(spec.device.clone()))?[..] {
            [(instance, Some(number))] => instance.set_io_limits(*number, spec),
            _ => Err(Error::new(Kind::Internal, "the device name selected several devices")),
        }
    }

    /// Devices, by instance and number.
    pub fn devices(&self, which: &Selector) -> Result<Vec<DeviceInfo>> {
        let mut devices = Vec::new();
        for (instance, only) in self.select(which)? {
            devices.extend(instance.devices(only)?);
        }
        Ok(devices)
    }

    /// Updates the names of partitions, and the pools' view of disks stacked on their devices.
    pub fn update_nodes(&self) {
        self.companions().iter().for_each(|companion| companion.update_nodes());
        let instances: Vec<_> = self.table().values().cloned().collect();
        instances.iter().for_each(|instance| instance.update_partition_links());
    }

    /// Statistics of devices.
    pub fn stats(&self, which: &Selector) -> Result<Vec<DeviceStats>> {
        let mut stats = Vec::new();
        for (instance, only) in self.select(which)? {
            stats.extend(instance.stats(only)?);
        }
        Ok(stats)
    }

    pub(super) fn instance(&self, name: &str) -> Result<Arc<Instance>> {
        check_instance_name(name)?;
        self.table().get(name).cloned().ok_or_else(|| {
            Error::new(Kind::NotFound, format!("there is no instance {name:?}"))
                .hint("'loopengine instance list' lists all")
        })
    }

    /// The selected instances, each with one number or all of its devices.
    pub(super) fn select(&self, which: &Selector) -> Result<Vec<(Arc<Instance>, Option<u32>)>> {
        match which {
            Selector::All => Ok(self.table().values().map(|instance| (instance.clone(), None)).collect()),
            Selector::Instance(name) => Ok(vec![(self.instance(name)?, None)]),
            Selector::Device(name) => match parse_device(name, &self.context.run_dir)? {
                DeviceName::Number(instance, number) => Ok(vec![(self.instance(&instance)?, Some(number))]),
                DeviceName::Node(node) => {
                    let table = self.table();
                    let found = table
                        .values()
                        .find_map(|instance| Some((instance.clone(), instance.number_of(&node)?)));
                    found.map(|(instance, number)| vec![(instance, Some(number))]).ok_or_else(|| {
                        Error::new(Kind::NotFound, format!("{name} is not a device of this daemon"))
                            .hint("'loopengine list' shows all")
                    })
                }
            },
        }
    }
}

/// The upper half of the owner cookie of ublk devices: a hash of the run directory, by which a
/// later daemon recognizes its own devices.
pub(super) fn owner_hash(run_dir: &Path) -> u32 {
    use std::os::unix::ffi::OsStrExt;
    let hash = fnv1a(run_dir.as_os_str().as_bytes());
    (hash ^ hash >> 32) as u32
}
