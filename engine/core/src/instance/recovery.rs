// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Recovery of the instances and devices of a previous daemon; devices that cannot be recovered are
//! listed as stuck.
//!
//! A device has a record in the state directory and an entry at the driver. The driver is
//! authoritative: a device of ours with users is always listed, even without its record.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::Engine;
use super::Selector;
use super::instance::Instance;
use super::names::{DeviceName, parse_device};
use super::spec::{BackendKind, DEFAULT_INSTANCE, DeviceInfo, InstanceSpec, RecoverSpec};
use super::state::{DeviceRecord, SavedInstance};
use crate::counters::RECOVERED_DEVICES;
use crate::error::{Error, Kind, Result};
use crate::frontend::kernel_loop;
use crate::frontend::{self, DeviceParameters, ExistingDevice, OrphanState, StopMode};
use crate::parallel;

/// First number for devices whose own is lost: attach takes the lowest free one.
const LOST_NUMBER_BASE: u32 = 1_000_000;
/// Devices recovered in parallel: each may have to wait for the dead daemon's last operations.
const RECOVER_PARALLEL: usize = 16;

/// A device that may have users.
#[derive(Debug)]
struct Orphan {
    instance: Arc<Instance>,
    number: u32,
    disk: String,
    found: ExistingDevice,
    /// Its record, or why it was not read.
    record: Result<DeviceRecord>,
}

/// Devices of this run directory at the drivers, by disk, not matched to a record yet.
type DriverDevices = BTreeMap<String, ExistingDevice>;

impl Engine {
    /// Recreates the instances of a previous daemon and recovers their devices. Devices that cannot
    /// be recovered are listed as stuck. An instance keeps the backend of its devices. `defaults`:
    /// limits for instances without readable state. Returns notes for the log.
    pub(super) fn recover_all(&self, defaults: &InstanceSpec) -> Result<Vec<String>> {
        let mut notes = Vec::new();
        let mut driver_devices = self.own_driver_devices()?;
        let unbound = kernel_loop::remove_unbound(|owner_cookie| self.context.is_ours(owner_cookie));
        if unbound > 0 {
            notes.push(format!("removed {unbound} loop devices that a previous daemon left unbound"));
        }
        frontend::update_disk_list(&driver_devices);
        let mut orphans = Vec::new();
        let mut unmatched = Vec::new();
        let saved = self.context.state.load();
        let records = saved.iter().flat_map(|instance| &instance.devices);
        // A link may be older than a record.
        let recorded: Vec<String> =
            records.filter_map(|(_, record)| Some(record.as_ref().ok()?.disk())).collect();
        for SavedInstance { name, spec, devices } in saved {
            let backend = self.backend_of(&name, &devices, &driver_devices);
            let Some(instance) = self.recreate_instance(&name, spec, defaults, backend) else { continue };
            for (number, record) in devices {
                match self.match_record(&instance, number, record, &mut driver_devices, &recorded) {
                    Match::Device(disk, found, record) => {
                        orphans.push(Orphan { instance: instance.clone(), number, disk, found, record })
                    }
                    Match::Unknown(reason) => unmatched.push((instance.clone(), number, reason)),
                    Match::Gone(image) => {
                        self.forget(&name, number);
                        notes.push(format!(
                            "removed the state file of {name}/loop{number} ({image}): its disk does not exist"
                        ));
                    }
                }
            }
        }
        orphans.extend(self.named_by_links(&mut driver_devices, defaults));
        self.delete_unused(&mut driver_devices, unmatched.is_empty(), &mut notes);
        orphans.extend(self.unidentified(driver_devices, unmatched, defaults));
        for some in orphans.chunks(RECOVER_PARALLEL) {
            std::thread::scope(|scope| {
                let threads: Vec<_> =
                    some.iter().map(|orphan| scope.spawn(move || orphan.recover())).collect();
                notes.extend(threads.into_iter().filter_map(|thread| thread.join().ok().flatten()));
            });
        }
        Ok(notes)
    }

    /// Recovers a stuck device with an image that the administrator gives: the checks of a restart
    /// are skipped, but the image must be large enough.
    pub fn recover(&self, spec: &RecoverSpec, image: std::os::fd::OwnedFd) -> Result<DeviceInfo> {
        match &self.select(&Selector::Device(spec.device.clone()))?[..] {
            [(instance, Some(number))] => instance.recover_with_image(*number, spec, image),
            _ => Err(Error::new(Kind::Internal, "the device name selected several devices")),
        }
    }

    /// Fails if a device waits for a daemon with a backend that this one does not have.
    fn own_driver_devices(&self) -> Result<DriverDevices> {
        let mut own = DriverDevices::new();
        for (disk, found) in frontend::lasting() {
            let Some(found) = found.ok().filter(|found| self.context.is_ours(found.parameters.owner_cookie))
            else {
                continue;
            };
            let kind = found.parameters.io_mode.backend();
            if self.context.frontends.has(kind) {
                own.insert(disk, found);
            } else if found.parameters.recoverable {
                let context = format!("/dev/{disk} of a previous daemon waits for its recovery");
                let next_step = format!("start with --backend {}, or give another --run-dir", kind.as_str());
                return Err(Error::new(Kind::Busy, context).hint(next_step));
            }
        }
        Ok(own)
    }

    /// The backend of an instance's devices that wait for it. None: there are none.
    fn backend_of(
        &self,
        instance: &str,
        devices: &[(u32, Result<DeviceRecord>)],
        driver_devices: &DriverDevices,
    ) -> Option<BackendKind> {
        let disk = |(number, record): &(u32, Result<DeviceRecord>)| match record {
            Ok(record) => Some(record.disk()),
            Err(_) => linked_disk(&self.link(instance, *number)),
        };
        let mut disks = devices.iter().filter_map(disk).filter(|disk| driver_devices.contains_key(disk));
        disks.find_map(|disk| Some(BackendKind::of_disk(&disk)?.0))
    }

    /// Where the name of a device is.
    fn link(&self, instance: &str, number: u32) -> PathBuf {
        self.context.run_dir.join(instance).join(format!("loop{number}"))
    }

    /// Recreates an instance of a previous daemon, with the default limits if its own cannot be
    /// read. `backend`: that of its devices, if it has any.
    fn recreate_instance(
        &self,
        name: &str,
        spec: Result<InstanceSpec>,
        defaults: &InstanceSpec,
        backend: Option<BackendKind>,
    ) -> Option<Arc<Instance>> {
        if let Ok(present) = self.instance(name) {
            return Some(present);
        }
        let usual = InstanceSpec { name: name.to_owned(), ..defaults.clone() };
        let made = spec
            .and_then(|spec| self.start_instance(&InstanceSpec { name: name.to_owned(), ..spec }, backend));
        let made = made.or_else(|error| {
            tracing::error!("instance {name} was recovered with default limits: {error}");
            self.start_instance(&usual, backend)
        });
        match made {
            Ok(info) if backend.is_some() && info.backend != self.context.frontends.default_kind() => {
                tracing::info!("instance {name} has the backend {}, as its devices", info.backend.as_str());
            }
            Ok(_) => {}
            Err(error) => tracing::error!("instance {name} was not recovered: {error}"),
        }
        self.instance(name).ok()
    }

    /// Matches a state file to a device at the driver.
    fn match_record(
        &self,
        instance: &Instance,
        number: u32,
        record: Result<DeviceRecord>,
        driver_devices: &mut DriverDevices,
        recorded: &[String],
    ) -> Match {
        let name = instance.info().name;
        match record {
            Ok(record) if record.io_mode.backend() == BackendKind::Fuse => {
                let path = &record.spec.path;
                tracing::error!(
                    "{name}/loop{number} ({path}) was not recovered: FUSE files do not outlive the daemon"
                );
                Match::Gone(record.spec.path)
            }
            Ok(record) => match driver_devices.get(&record.disk()).copied() {
                Some(found)
                    if found.parameters.owner_cookie == record.owner_cookie && waits(instance, &found) =>
                {
                    driver_devices.remove(&record.disk());
                    Match::Device(record.disk(), found, Ok(record))
                }
                None if is_unknown(&record.disk()) => {
                    let parameters = record.parameters();
                    Match::Device(
                        record.disk(),
                        ExistingDevice { state: OrphanState::Waiting, parameters },
                        Ok(record),
                    )
                }
                // Never started, stopped, or replaced: it has no users.
                _ => Match::Gone(record.spec.path),
            },
            Err(reason) => {
                let disk = linked_disk(&self.link(&name, number)).filter(|disk| !recorded.contains(disk));
                let found = disk.and_then(|disk| Some((driver_devices.get(&disk).copied()?, disk)));
                match found.filter(|(found, _)| waits(instance, found)) {
                    Some((found, disk)) => {
                        driver_devices.remove(&disk);
                        Match::Device(disk, found, Err(reason))
                    }
                    None => Match::Unknown(reason),
                }
            }
        }
    }

    /// Devices without a state file that still have names.
    fn named_by_links(&self, driver_devices: &mut DriverDevices, defaults: &InstanceSpec) -> Vec<Orphan> {
        let entries = |dir: &Path| std::fs::read_dir(dir).into_iter().flatten().flatten();
        let mut named = Vec::new();
        for link in entries(&self.context.run_dir).flat_map(|dir| entries(&dir.path())) {
            let path = link.path();
            let Some(disk) = linked_disk(&path) else { continue };
            let name = path.to_str().and_then(|path| parse_device(path, &self.context.run_dir).ok());
            let Some(DeviceName::Number(instance, number)) = name else { continue };
            let Some(found) = driver_devices.get(&disk).copied() else { continue };
            let backend = Some(found.parameters.io_mode.backend());
            let recreated = self.recreate_instance(&instance, Ok(defaults.clone()), defaults, backend);
            let Some(instance) = recreated.filter(|instance| waits(instance, &found)) else { continue };
            let missing = Error::new(Kind::NotFound, "its state file is missing");
            driver_devices.remove(&disk);
            named.push(Orphan { instance, number, disk, found, record: Err(missing) });
        }
        named
    }

    /// Deletes devices that a previous daemon had begun to create or to remove; never one with
    /// users. A device that waits for a daemon is deleted only if the driver finds it unused and no
    /// state file can refer to it (`complete`).
    fn delete_unused(&self, driver_devices: &mut DriverDevices, complete: bool, notes: &mut Vec<String>) {
        let found: Vec<_> = std::mem::take(driver_devices).into_iter().collect();
        let (kept, deleted) = (Mutex::new(driver_devices), Mutex::new(Vec::new()));
        parallel::for_each("delete", kernel_loop::REMOVED_AT_A_TIME, &found, |(disk, found)| {
            match self.delete_if_unused(disk, found, complete) {
                Some(Ok(())) => lock(&deleted).push(disk),
                Some(Err(error)) => tracing::error!("cannot delete the leftover disk {disk}: {error}"),
                None => drop(lock(&kept).insert(disk.clone(), *found)),
            }
        });
        let mut deleted = std::mem::take(&mut *lock(&deleted));
        deleted.sort();
        notes.extend(deleted.iter().map(|disk| format!("deleted the leftover disk {disk}")));
    }

    /// None: it may have users.
    fn delete_if_unused(&self, disk: &str, found: &ExistingDevice, complete: bool) -> Option<Result<()>> {
        let (kind, id) = BackendKind::of_disk(disk)?;
        let frontend = self.context.frontends.get(Some(kind)).ok()?;
        let ended = found.state == OrphanState::Unused || !found.parameters.recoverable;
        if !(ended || complete && frontend.can_stop_if_unused()) {
            return None;
        }
        let when = if ended { StopMode::Always } else { StopMode::IfUnused };
        let deleted = frontend.leftover(id, found.parameters).and_then(|device| {
            device.stop(when)?;
            device.delete()
        });
        Some(deleted)
            .filter(|deleted| ended || !deleted.as_ref().is_err_and(|error| error.kind() == Kind::Busy))
    }

    /// Devices without record and name. If exactly one is left, with exactly one unreadable record,
    /// they belong together; others get unique names.
    fn unidentified(
        &self,
        driver_devices: DriverDevices,
        mut unmatched: Vec<(Arc<Instance>, u32, Error)>,
        defaults: &InstanceSpec,
    ) -> Vec<Orphan> {
        let alone = driver_devices.len() == 1 && unmatched.len() == 1;
        let named = |(disk, found): (String, ExistingDevice)| {
            if let Some((instance, number, reason)) =
                unmatched.pop().filter(|(instance, ..)| alone && waits(instance, &found))
            {
                return Some(Orphan { instance, number, disk, found, record: Err(reason) });
            }
            let (kind, id) = BackendKind::of_disk(&disk)?;
            let recreate = |name: &str| {
                let recreated = self.recreate_instance(name, Ok(defaults.clone()), defaults, Some(kind));
                recreated.filter(|instance| instance.backend.kind() == kind)
            };
            // The instance `default` may have another backend.
            let instance = recreate(DEFAULT_INSTANCE)
                .or_else(|| recreate(&format!("{DEFAULT_INSTANCE}-{}", kind.as_str())))?;
            let lost = Error::new(Kind::NotFound, "its state file and its name are missing");
            let number = LOST_NUMBER_BASE.saturating_add(id);
            Some(Orphan { instance, number, disk, found, record: Err(lost) })
        };
        let orphans = driver_devices.into_iter().filter_map(named).collect();
        for (instance, number, reason) in unmatched {
            let name = instance.info().name;
            tracing::error!(
                "cannot read the state file of {name}/loop{number} (loop{number}.json), and no remaining disk \
                 can belong to it: {}",
                reason.message()
            );
        }
        orphans
    }

    /// Removes the state file and the name of a device that does not exist any more.
    fn forget(&self, instance: &str, number: u32) {
        self.context.state.remove_device(instance, number);
        let link = self.link(instance, number);
        if std::fs::read_link(&link).is_ok() {
            let _ = std::fs::remove_file(link);
        }
    }
}

/// The result of matching a state file.
enum Match {
    /// This device.
    Device(String, ExistingDevice, Result<DeviceRecord>),
    /// Possibly a device: the file cannot be read.
    Unknown(Error),
    /// No existing device.
    Gone(String),
}

impl Orphan {
    /// Recovers it, or lists it as stuck. Returns a note.
    fn recover(&self) -> Option<String> {
        let Orphan { instance, number, disk, found, record } = self;
        let name = format!("{}/loop{number}", instance.info().name);
        match record {
            Ok(record) => match instance.recover(*number, record.clone(), *found) {
                Ok(()) => {
                    RECOVERED_DEVICES.count();
                    return Some(format!("{name} ({}) was recovered", record.spec.path));
                }
                Err(error) => {
                    tracing::error!("{name} ({}) was not recovered and is stuck: {error}", record.spec.path)
                }
            },
            Err(reason) => {
                let reason = reason.message();
                let (_, id) = BackendKind::of_disk(disk)?;
                tracing::error!("{name} (disk {disk}) was not recovered and is stuck: {reason}");
                if let Err(error) = instance.list_stuck(*number, id, *found, reason) {
                    tracing::error!("{name} (disk {disk}) is not listed: {error}");
                }
            }
        }
        None
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The disk that a link points to.
fn linked_disk(link: &Path) -> Option<String> {
    let node = std::fs::read_link(link).ok()?;
    let disk = node.to_str()?.strip_prefix("/dev/")?;
    BackendKind::of_disk(disk).map(|_| disk.to_owned())
}

/// Whether a device waits for a daemon, and this instance can serve it.
fn waits(instance: &Instance, found: &ExistingDevice) -> bool {
    let DeviceParameters { recoverable, io_mode, .. } = found.parameters;
    found.state == OrphanState::Waiting && recoverable && instance.backend.kind() == io_mode.backend()
}

/// Whether the driver cannot describe this disk, which may exist.
fn is_unknown(disk: &str) -> bool {
    frontend::examine_disk(disk).is_err_and(|error| error.kind() != Kind::NotFound)
}
