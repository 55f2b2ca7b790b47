// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The devices of an instance: allocates numbers and worker slots within the limit.
//!
//! Knows numbers, not devices. Locked briefly only: slow work (attach, stop) happens outside, with
//! the number reserved.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::spec::InstanceSpec;
use super::{MAX_DEVICES, NUMBER_MAX};
use crate::error::{Error, Kind, Result};
use crate::ring::{SlotAllocator, SlotId};

/// A number's entry.
#[derive(Clone, Debug)]
enum MapEntry<D> {
    /// Being attached or detached.
    Reserved,
    /// Served.
    Live(D),
}

#[derive(Debug)]
struct MapState<D> {
    spec: InstanceSpec,
    devices: BTreeMap<u32, MapEntry<D>>,
    closed: bool,
}

/// Devices by number.
#[derive(Debug)]
pub struct DeviceMap<D> {
    /// The directory of their names.
    directory: PathBuf,
    state: Mutex<MapState<D>>,
    slots: SlotAllocator,
}

impl<D: Clone> DeviceMap<D> {
    /// An empty one.
    pub fn new(spec: &InstanceSpec, directory: &Path) -> Result<Self> {
        check_quota(spec.max_devices)?;
        let state = MapState { spec: spec.clone(), devices: BTreeMap::new(), closed: false };
        Ok(Self {
            directory: directory.to_owned(),
            state: Mutex::new(state),
            slots: SlotAllocator::default(),
        })
    }

    fn state(&self) -> MutexGuard<'_, MapState<D>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The path of the device with this number.
    pub fn path(&self, number: u32) -> PathBuf {
        self.directory.join(format!("loop{number}"))
    }

    /// The limits of the instance, and its number of devices.
    pub fn spec(&self) -> (InstanceSpec, u32) {
        let state = self.state();
        (state.spec.clone(), state.devices.len() as u32)
    }

    /// Changes the device limit; existing devices stay.
    pub fn set_max_devices(&self, max_devices: u32) -> Result<InstanceSpec> {
        check_quota(max_devices)?;
        let mut state = self.state();
        state.spec.max_devices = max_devices;
        Ok(state.spec.clone())
    }

    /// The numbers in use.
    pub fn numbers(&self) -> Vec<u32> {
        self.state().devices.keys().copied().collect()
    }

    /// All devices that are served.
    pub fn live(&self) -> Vec<(u32, D)> {
        let state = self.state();
        let live = state.devices.iter().filter_map(|(number, entry)| match entry {
            MapEntry::Live(device) => Some((*number, device.clone())),
            MapEntry::Reserved => None,
        });
        live.collect()
    }

    /// The device with this number.
    pub fn get(&self, number: u32) -> Result<D> {
        match self.state().devices.get(&number) {
            Some(MapEntry::Live(device)) => Ok(device.clone()),
            _ => Err(self.no_such_device(number)),
        }
    }

    /// Accepts no more devices.
    pub fn close(&self) {
        self.state().closed = true;
    }

    /// Closes it if it is empty; false if it is not.
    pub fn close_if_empty(&self) -> bool {
        let mut state = self.state();
        state.closed |= state.devices.is_empty();
        state.devices.is_empty()
    }

    /// Reserves a device's number while it is detached; `put_back` or `remove` must follow.
    pub fn withdraw(&self, number: u32) -> Result<D> {
        let mut state = self.state();
        let entry = state.devices.get_mut(&number).ok_or_else(|| self.no_such_device(number))?;
        match std::mem::replace(entry, MapEntry::Reserved) {
            MapEntry::Live(device) => Ok(device),
            MapEntry::Reserved => {
                let context = format!("{} is being attached or detached", self.path(number).display());
                Err(Error::new(Kind::Busy, context).hint("try again"))
            }
        }
    }

    /// Puts a withdrawn device back.
    pub fn put_back(&self, number: u32, device: D) {
        self.state().devices.insert(number, MapEntry::Live(device));
    }

    /// Frees the number and the slot of a device.
    pub fn remove(&self, number: u32, slot: SlotId) {
        self.state().devices.remove(&number);
        self.slots.free(slot);
    }

    /// Reserves a number and a slot, within the limit.
    pub fn reserve(&self, wanted: Option<u32>) -> Result<Reservation<'_, D>> {
        let mut state = self.state();
        let name = state.spec.name.clone();
        if state.closed {
            return Err(Error::new(Kind::NotFound, format!("instance {name} is being removed")));
        }
        let number = match wanted {
            Some(number) if state.devices.contains_key(&number) => return Err(self.exists_error(number)),
            Some(number) if number > NUMBER_MAX => {
                let context = format!("a device of instance {name} cannot have the number {number}");
                return Err(Error::new(Kind::Invalid, context).hint(format!("give at most {NUMBER_MAX}")));
            }
            Some(number) => number,
            None => (0..).find(|number| !state.devices.contains_key(number)).unwrap_or(u32::MAX),
        };
        if state.devices.len() >= state.spec.max_devices as usize {
            let context =
                format!("instance {name} has reached its limit of {} devices", state.spec.max_devices);
            return Err(Error::new(Kind::Quota, context)
                .hint("detach one, or create an instance with a larger --max"));
        }
        Ok(self.allocate_slot(&mut state, number))
    }

    /// Likewise for an existing device, without a limit.
    pub fn reserve_existing(&self, number: u32) -> Result<Reservation<'_, D>> {
        let mut state = self.state();
        if state.devices.contains_key(&number) {
            return Err(self.exists_error(number));
        }
        Ok(self.allocate_slot(&mut state, number))
    }

    fn allocate_slot(&self, state: &mut MapState<D>, number: u32) -> Reservation<'_, D> {
        state.devices.insert(number, MapEntry::Reserved);
        Reservation { table: self, number, slot: self.slots.allocate(), filled: false }
    }

    fn exists_error(&self, number: u32) -> Error {
        Error::new(Kind::Exists, format!("{} exists", self.path(number).display()))
    }

    fn no_such_device(&self, number: u32) -> Error {
        Error::new(Kind::NotFound, format!("there is no device {}", self.path(number).display()))
            .hint("'loopengine list' shows all")
    }
}

fn check_quota(max_devices: u32) -> Result<()> {
    if (1..=MAX_DEVICES).contains(&max_devices) {
        return Ok(());
    }
    Err(Error::new(Kind::Invalid, format!("an instance can have 1 to {MAX_DEVICES} devices")))
}

/// A reserved number and slot, freed unless filled.
#[derive(Debug)]
pub struct Reservation<'a, D: Clone> {
    table: &'a DeviceMap<D>,
    /// The number.
    pub number: u32,
    /// The slot.
    pub slot: SlotId,
    filled: bool,
}

impl<D: Clone> Reservation<'_, D> {
    /// Enters the device.
    pub fn fill(mut self, device: D) {
        self.filled = true;
        self.table.put_back(self.number, device);
    }
}

impl<D: Clone> Drop for Reservation<'_, D> {
    fn drop(&mut self) {
        if !self.filled {
            self.table.remove(self.number, self.slot);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(max_devices: u32) -> DeviceMap<&'static str> {
        let spec = InstanceSpec { name: "ci".into(), max_devices, workers: 0, cpus: None, backend: None };
        DeviceMap::new(&spec, Path::new("/run/x/ci")).unwrap()
    }

    #[test]
    fn dropping_a_reservation_frees_it() {
        let table = table(1);
        drop(table.reserve(Some(7)).unwrap());
        let again = table.reserve(Some(7)).unwrap();
        assert_eq!((again.slot.index, again.slot.generation), (0, 1));
        assert_eq!(table.reserve(None).unwrap_err().kind(), Kind::Quota);
        assert_eq!(table.withdraw(7).unwrap_err().kind(), Kind::Busy);
        again.fill("a");
        assert_eq!(table.get(7).unwrap(), "a");
    }

    #[test]
    fn rejects_numbers_out_of_range() {
        let table = table(2);
        assert!(table.reserve(Some(NUMBER_MAX)).is_ok());
        assert_eq!(table.reserve(Some(NUMBER_MAX + 1)).unwrap_err().kind(), Kind::Invalid);
    }

    #[test]
    fn a_number_is_free_only_after_its_device_is_removed() {
        let table = table(4);
        let first = table.reserve(None).unwrap();
        let slot = first.slot;
        first.fill("a");
        assert_eq!(table.withdraw(0).unwrap(), "a");
        assert_eq!(table.reserve(Some(0)).unwrap_err().kind(), Kind::Exists);
        assert!(table.live().is_empty());
        table.put_back(0, "a");
        assert_eq!(table.live(), [(0, "a")]);
        table.withdraw(0).unwrap();
        table.remove(0, slot);
        assert_eq!(table.reserve(None).unwrap().number, 0);
        assert!(table.close_if_empty());
        assert_eq!(table.reserve(None).unwrap_err().kind(), Kind::NotFound);
    }
}
