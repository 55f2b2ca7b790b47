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
use super::{MAX_INSTANCES, stop};
use crate::error::{Error, Kind, Result};
use crate::frontend::{self, Frontend, StopMode, ublk};
use crate::sys;

/// Files that a daemon may have open: some for each of several thousand devices.
const OPEN_FILES: u64 = 1 << 18;

/// What the engine needs to know to start.
#[derive(Clone, Debug)]
pub struct EngineConfig {
    /// Where instance directories, device names and state live, e.g. `/run/loopengine`.
    pub run_dir: PathBuf,
    /// What the instance `default` may have.
    pub default_instance: InstanceSpec,
    /// How devices are shown to their users.
    pub frontend: FrontendKind,
    /// Worker switches.
    pub tuning: Tuning,
    /// Devices have names below /dev as well.
    pub dev_links: bool,
}

/// Switches of the workers; the defaults are the measured best.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tuning {
    /// Read or write and its commit go to the kernel as one chain where that is possible.
    pub linked_commit: bool,
    /// Microseconds for which a worker looks for more after a lone request; 0: never.
    pub poll_us: u32,
}

/// Which devices a call is about.
#[derive(Clone, Debug)]
pub enum Selector {
    /// One device, by a path that leads to it (`/run/loopengine/default/loop0`, `/dev/ublkb3`), or
    /// as `NAME/loopN`, or `loopN` for the instance `default`.
    Device(String),
    /// All devices of one instance.
    Instance(String),
    /// All devices of all instances.
    All,
}

/// All instances of one daemon.
#[derive(Debug)]
pub struct Engine {
    pub(super) context: EngineContext,
    pub(super) tuning: Tuning,
    instances: Mutex<BTreeMap<String, Arc<Instance>>>,
    companions: Mutex<Vec<Arc<dyn Companion>>>,
}

impl Engine {
    /// Checks that the frontend can be used, recovers the devices of a previous daemon that used the same
    /// run directory, and creates the instance `default`. Logs what was and was not recovered.
    pub fn start(config: EngineConfig) -> Result<Engine> {
        sys::raise_file_limit(OPEN_FILES);
        let frontend = Frontend::open(config.frontend)?;
        let dev_links = match (config.dev_links, frontend.kind()) {
            (true, FrontendKind::Ublk) => Some(Arc::new(DevLinks::take(&config.run_dir)?)),
            (true, FrontendKind::Fuse) => {
                tracing::warn!("files have no names in {DEV_DIR}: --dev-links is for block devices");
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
            run_dir: config.run_dir,
            frontend,
            claims: Default::default(),
            dev_links,
        };
        let engine = Engine {
            context,
            tuning: config.tuning,
            instances: Mutex::default(),
            companions: Mutex::default(),
        };
        engine.check_no_other_frontend()?;
        engine.recover_all(&config.default_instance).iter().for_each(|note| tracing::info!("{note}"));
        if !engine.instances().iter().any(|instance| instance.name == config.default_instance.name) {
            engine.create_instance(&config.default_instance)?;
        }
        Ok(engine)
    }

    /// What the kernel grants. Works without an engine.
    pub fn features() -> Result<Features> {
        let frontends = frontend::present();
        let granted = match ublk::DriverFeatures::query() {
            // Not everything that could be there is; what is there is worth showing.
            Err(error) if error.kind() == Kind::Unavailable && !frontends.is_empty() => {
                ublk::DriverFeatures(0)
            }
            asked => asked?,
        };
        Ok(Features {
            kernel: rustix::system::uname().release().to_string_lossy().into_owned(),
            frontends,
            flags: granted.names(),
            io_modes: granted.io_modes(),
            recovery: granted.supports_recovery(),
            resize: granted.supports_resize(),
        })
    }

    /// Block devices that wait for a daemon must not lose their names and numbers to files.
    fn check_no_other_frontend(&self) -> Result<()> {
        if self.context.frontend.kind() == FrontendKind::Ublk || !Path::new(ublk::CONTROL_NODE).exists() {
            return Ok(());
        }
        let waits = |id: &u32| {
            let found = ublk::UblkDevice::examine(*id);
            found.is_ok_and(|found| {
                found.parameters.recoverable && self.context.is_ours(found.parameters.owner_cookie)
            })
        };
        if !ublk::present_devices().iter().any(waits) {
            return Ok(());
        }
        let context = "block devices of a daemon before this one wait to be recovered";
        Err(Error::new(Kind::Busy, context).hint("start with --frontend ublk, or give another --run-dir"))
    }

    pub(super) fn table(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Instance>>> {
        self.instances.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Creates an instance.
    pub fn create_instance(&self, spec: &InstanceSpec) -> Result<InstanceInfo> {
        check_instance_name(&spec.name)?;
        // Held while the workers start (milliseconds), so that no name is taken twice.
        let mut table = self.table();
        if table.contains_key(&spec.name) {
            return Err(Error::new(Kind::Exists, format!("instance {} exists", spec.name)));
        }
        if table.len() >= MAX_INSTANCES {
            return Err(Error::new(Kind::Quota, format!("there are {MAX_INSTANCES} instances already")));
        }
        let instance = Arc::new(Instance::start(&self.context, spec, self.tuning)?);
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

    /// Changes how many devices an instance may have.
    pub fn set_max_devices(&self, name: &str, max_devices: u32) -> Result<()> {
        self.instance(name)?.set_max_devices(max_devices)
    }

    /// Removes an instance; with `force`, detaches its devices even if they are in use.
    pub fn remove_instance(&self, name: &str, force: bool) -> Result<()> {
        if name == DEFAULT_INSTANCE {
            return Err(Error::new(Kind::Invalid, "the instance 'default' cannot be removed"));
        }
        let instance = self.instance(name)?;
        if !force && !instance.numbers().is_empty() {
            return Err(Error::new(Kind::Busy, format!("instance {name} has devices"))
                .hint("detach them first; --force detaches them all the same"));
        }
        self.detach(&Selector::Instance(name.to_owned()), force)?;
        if !instance.close_if_empty() {
            return Err(Error::new(Kind::Busy, format!("instance {name} has devices")).hint("try again"));
        }
        let mut table = self.table();
        if table.get(name).is_some_and(|present| Arc::ptr_eq(present, &instance)) {
            instance.erase();
            table.remove(name);
        }
        drop(table);
        // Its workers end here, where nobody waits for the table.
        drop(instance);
        Ok(())
    }

    /// Serves `image` (opened by the caller, for writing unless the device is read-only) as a device, and
    /// returns once it can be used; with `force`, also one that others use. Nothing is left when it fails.
    pub fn attach(&self, spec: &AttachSpec, force: bool, image: OwnedFd) -> Result<DeviceInfo> {
        self.instance(&spec.instance)?.attach(spec, force, image)
    }

    /// Takes devices away. Without `force` a device in use is left alone, and the error says so.
    /// With [`Selector::All`] or `Instance` goes on after a failure and reports the first.
    /// Returns the paths of the devices that are gone.
    pub fn detach(&self, which: &Selector, force: bool) -> Result<Vec<String>> {
        let when = if force { StopMode::Always } else { StopMode::IfUnused };
        let selected = self.select(which)?;
        if force {
            stop::write_back(selected.iter().flat_map(|(instance, _)| stop::nodes_of(instance)).collect());
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

    /// Adapts a device to the present size of its image, or both to a size that is given.
    pub fn resize(&self, spec: &ResizeSpec) -> Result<DeviceInfo> {
        match &self.select(&Selector::Device(spec.device.clone()))?[..] {
            [(instance, Some(number))] => instance.resize(*number, spec),
            _ => Err(Error::new(Kind::Internal, "a device's name selected something else")),
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

    /// Has the names of partitions, and what pools show of disks that lie upon theirs, follow what the kernel has by now.
    pub fn update_nodes(&self) {
        self.companions().iter().for_each(|companion| companion.update_nodes());
        let instances: Vec<_> = self.table().values().cloned().collect();
        instances.iter().for_each(|instance| instance.update_partition_links());
    }

    /// Figures of devices.
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
                .hint(format!("create it with 'loopengine instance create {name}'"))
        })
    }

    /// Instances, each with one number or all of its devices.
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
                        Error::new(Kind::NotFound, format!("{name} is none of this daemon's devices"))
                            .hint("'loopengine list' shows all")
                    })
                }
            },
        }
    }
}

/// Half of the mark of ublk devices, by which a later daemon with the same run directory knows its
/// own: an FNV-1a hash of the directory.
pub(super) fn owner_hash(run_dir: &Path) -> u32 {
    use std::os::unix::ffi::OsStrExt;
    let hash = |hash: u32, byte: &u8| (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193);
    run_dir.as_os_str().as_bytes().iter().fold(0x811c_9dc5, hash)
}
