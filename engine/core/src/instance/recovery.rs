// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Recovery of the instances and devices of a previous daemon; devices that cannot be recovered are
//! listed as stuck.
//!
//! A device has a record in the state directory and an entry at the driver. The driver is
//! authoritative: a device of ours with users is always listed, even without its record.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use super::Engine;
use super::Selector;
use super::instance::Instance;
use super::names::{DeviceName, parse_device};
use super::spec::{DEFAULT_INSTANCE, DeviceInfo, InstanceSpec, IoMode, RecoverSpec};
use super::state::{DeviceRecord, SavedInstance};
use crate::error::{Error, Kind, Result};
use crate::frontend::{ExistingDevice, OrphanState, StopMode};

/// First number for devices whose own is lost: attach takes the lowest free one.
const LOST_NUMBER_BASE: u32 = 1_000_000;
/// Devices recovered in parallel: each may have to wait for the dead daemon's last operations.
const RECOVER_PARALLEL: usize = 16;

/// A device that may have users.
#[derive(Debug)]
struct Orphan {
    instance: Arc<Instance>,
    number: u32,
    id: u32,
    found: ExistingDevice,
    /// Its record, or why it was not read.
    record: Result<DeviceRecord>,
}

/// Devices of this run directory at the driver, by id, not matched to a record yet.
type DriverDevices = BTreeMap<u32, ExistingDevice>;

impl Engine {
    /// Recreates the instances of a previous daemon and recovers their devices. Devices that cannot
    /// be recovered are listed as stuck. `defaults`: limits for instances without readable state.
    /// Returns notes for the log.
    pub(super) fn recover_all(&self, defaults: &InstanceSpec) -> Vec<String> {
        let mut notes = Vec::new();
        let mut driver_devices = self.own_driver_devices();
        self.context.frontend.update_disk_list(&driver_devices);
        let mut orphans = Vec::new();
        let mut unmatched = Vec::new();
        let saved = self.context.state.load();
        let records = saved.iter().flat_map(|instance| &instance.devices);
        // A link may be older than a record.
        let recorded_ids: Vec<u32> =
            records.filter_map(|(_, record)| Some(record.as_ref().ok()?.id)).collect();
        for SavedInstance { name, spec, devices } in saved {
            let Some(instance) = self.recreate_instance(&name, spec, defaults) else { continue };
            for (number, record) in devices {
                match self.match_record(&name, number, record, &mut driver_devices, &recorded_ids) {
                    Match::Device(id, found, record) => {
                        orphans.push(Orphan { instance: instance.clone(), number, id, found, record })
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
        notes
    }

    /// Recovers a stuck device with an image that the administrator gives: the checks of a restart
    /// are skipped, but the image must be large enough.
    pub fn recover(&self, spec: &RecoverSpec, image: std::os::fd::OwnedFd) -> Result<DeviceInfo> {
        match &self.select(&Selector::Device(spec.device.clone()))?[..] {
            [(instance, Some(number))] => instance.recover_with_image(*number, spec, image),
            _ => Err(Error::new(Kind::Internal, "the device name selected several devices")),
        }
    }

    fn own_driver_devices(&self) -> DriverDevices {
        let examine = |id| Some((id, self.context.frontend.examine(id).ok()?));
        let ours = |(_, found): &(u32, ExistingDevice)| self.context.is_ours(found.parameters.owner_cookie);
        self.context.frontend.present().into_iter().filter_map(examine).filter(ours).collect()
    }

    /// Whether the driver cannot describe this device, which may exist.
    fn is_unknown(&self, id: u32) -> bool {
        self.context.frontend.examine(id).is_err_and(|error| error.kind() != Kind::NotFound)
    }

    /// Recreates an instance of a previous daemon, with the default limits if its own cannot be
    /// read.
    fn recreate_instance(
        &self,
        name: &str,
        spec: Result<InstanceSpec>,
        defaults: &InstanceSpec,
    ) -> Option<Arc<Instance>> {
        if let Ok(present) = self.instance(name) {
            return Some(present);
        }
        let usual = InstanceSpec { name: name.to_owned(), ..defaults.clone() };
        let made =
            spec.and_then(|spec| self.create_instance(&InstanceSpec { name: name.to_owned(), ..spec }));
        let made = made.or_else(|error| {
            tracing::error!("instance {name} was recovered with default limits: {error}");
            self.create_instance(&usual)
        });
        if let Err(error) = made {
            tracing::error!("instance {name} was not recovered: {error}");
        }
        self.instance(name).ok()
    }

    /// Matches a state file to a device at the driver.
    fn match_record(
        &self,
        instance: &str,
        number: u32,
        record: Result<DeviceRecord>,
        driver_devices: &mut DriverDevices,
        recorded_ids: &[u32],
    ) -> Match {
        let waits =
            |found: &ExistingDevice| found.state == OrphanState::Waiting && found.parameters.recoverable;
        match record {
            Ok(record) if record.io_mode == IoMode::Fuse => {
                let path = &record.spec.path;
                tracing::error!(
                    "{instance}/loop{number} ({path}) was not recovered: FUSE files do not outlive the daemon"
                );
                Match::Gone(record.spec.path)
            }
            Ok(record) => match driver_devices.get(&record.id).copied() {
                Some(found) if found.parameters.owner_cookie == record.owner_cookie && waits(&found) => {
                    driver_devices.remove(&record.id);
                    Match::Device(record.id, found, Ok(record))
                }
                None if self.is_unknown(record.id) => {
                    let parameters = record.parameters();
                    Match::Device(
                        record.id,
                        ExistingDevice { state: OrphanState::Waiting, parameters },
                        Ok(record),
                    )
                }
                // Never started, stopped, or replaced: it has no users.
                _ => Match::Gone(record.spec.path),
            },
            Err(reason) => {
                let id = linked_id(&self.context.run_dir.join(instance).join(format!("loop{number}")));
                let id = id.filter(|id| !recorded_ids.contains(id));
                match id
                    .and_then(|id| driver_devices.get(&id).copied().filter(waits).map(|found| (id, found)))
                {
                    Some((id, found)) => {
                        driver_devices.remove(&id);
                        Match::Device(id, found, Err(reason))
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
            let Some(id) = linked_id(&path) else { continue };
            let name = path.to_str().and_then(|path| parse_device(path, &self.context.run_dir).ok());
            let Some(DeviceName::Number(instance, number)) = name else { continue };
            let waits =
                |found: &ExistingDevice| found.state == OrphanState::Waiting && found.parameters.recoverable;
            let Some(found) = driver_devices.get(&id).copied().filter(waits) else { continue };
            let missing = Error::new(Kind::NotFound, "its state file is missing");
            let Some(instance) = self.recreate_instance(&instance, Ok(defaults.clone()), defaults) else {
                continue;
            };
            driver_devices.remove(&id);
            named.push(Orphan { instance, number, id, found, record: Err(missing) });
        }
        named
    }

    /// Deletes devices that a previous daemon had begun to create or to remove; never one with
    /// users. A device that waits for a daemon is deleted only if the driver finds it unused and no
    /// state file can refer to it (`complete`).
    fn delete_unused(&self, driver_devices: &mut DriverDevices, complete: bool, notes: &mut Vec<String>) {
        driver_devices.retain(|&id, found| {
            let ended = found.state == OrphanState::Unused || !found.parameters.recoverable;
            if !(ended || complete && self.context.frontend.can_stop_if_unused()) {
                return true;
            }
            let when = if ended { StopMode::Always } else { StopMode::IfUnused };
            let deleted = self.context.frontend.leftover(id, found.parameters).and_then(|device| {
                device.stop(when)?;
                device.delete()
            });
            match deleted {
                Ok(()) => notes.push(format!("deleted the leftover disk {}", self.context.frontend.disk(id))),
                Err(error) if !ended && error.kind() == Kind::Busy => return true,
                Err(error) => {
                    let disk = self.context.frontend.disk(id);
                    tracing::error!("cannot delete the leftover disk {disk}: {error}")
                }
            }
            false
        });
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
        let named = |(id, found)| {
            if let Some((instance, number, reason)) = unmatched.pop().filter(|_| alone) {
                return Some(Orphan { instance, number, id, found, record: Err(reason) });
            }
            let instance = self.recreate_instance(DEFAULT_INSTANCE, Ok(defaults.clone()), defaults)?;
            let lost = Error::new(Kind::NotFound, "its state file and its name are missing");
            Some(Orphan {
                instance,
                number: LOST_NUMBER_BASE.saturating_add(id),
                id,
                found,
                record: Err(lost),
            })
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
        let link = self.context.run_dir.join(instance).join(format!("loop{number}"));
        if std::fs::read_link(&link).is_ok() {
            let _ = std::fs::remove_file(link);
        }
    }
}

/// The result of matching a state file.
enum Match {
    /// This device.
    Device(u32, ExistingDevice, Result<DeviceRecord>),
    /// Possibly a device: the file cannot be read.
    Unknown(Error),
    /// No existing device.
    Gone(String),
}

impl Orphan {
    /// Recovers it, or lists it as stuck. Returns a note.
    fn recover(&self) -> Option<String> {
        let Orphan { instance, number, id, found, record } = self;
        let name = format!("{}/loop{number}", instance.info().name);
        match record {
            Ok(record) => match instance.recover(*number, record.clone(), *found) {
                Ok(()) => return Some(format!("{name} ({}) was recovered", record.spec.path)),
                Err(error) => {
                    tracing::error!("{name} ({}) was not recovered and is stuck: {error}", record.spec.path)
                }
            },
            Err(reason) => {
                let (reason, disk) = (reason.message(), instance.context.frontend.disk(*id));
                tracing::error!("{name} (disk {disk}) was not recovered and is stuck: {reason}");
                if let Err(error) = instance.list_stuck(*number, *id, *found, reason) {
                    tracing::error!("{name} (disk {disk}) is not listed: {error}");
                }
            }
        }
        None
    }
}

/// The driver id of the block device that a link points to.
fn linked_id(link: &Path) -> Option<u32> {
    let node = std::fs::read_link(link).ok()?;
    let disk = node.to_str()?.strip_prefix("/dev/")?;
    disk.strip_prefix("ublkb").or_else(|| disk.strip_prefix("loop"))?.parse().ok()
}
