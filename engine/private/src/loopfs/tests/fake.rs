// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A fake pool: entries without devices.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::loopfs::{ChangeListener, DeviceSource};
use crate::loops::{Answer, Bound, DeviceEntry, Errno, LoopOp, PoolSpec};

#[derive(Debug)]
pub(super) struct FakeDevices {
    spec: PoolSpec,
    pub(super) entries: Mutex<BTreeMap<u32, DeviceEntry>>,
    generations: AtomicU64,
    pub(super) changes: Mutex<Option<ChangeListener>>,
    /// Milliseconds that ADD takes.
    pub(super) slow: AtomicU32,
}

impl FakeDevices {
    pub(super) fn new(uid: u32) -> Arc<FakeDevices> {
        let spec = PoolSpec {
            name: "fake".to_owned(),
            max: 8,
            uid,
            gid: uid,
            mode: 0o660,
            fixed: false,
            intercepted: false,
            reserved: BTreeSet::new(),
            backend: None,
        };
        Arc::new(FakeDevices {
            spec,
            entries: Mutex::default(),
            generations: AtomicU64::new(1),
            changes: Mutex::default(),
            slow: AtomicU32::new(0),
        })
    }

    /// Adds a device with this number, or another one in its place.
    pub(super) fn make(&self, number: u32) {
        let generation = self.generations.fetch_add(1, Ordering::Relaxed);
        let rdev = host_device().unwrap();
        let entry = DeviceEntry {
            number,
            rdev,
            generation,
            size: 0,
            block_size: 512,
            bound: None,
            partitions: Vec::new(),
        };
        self.entries.lock().unwrap().insert(number, entry);
        self.notify(number);
    }

    pub(super) fn change(&self, number: u32, change: impl FnOnce(&mut DeviceEntry)) {
        change(self.entries.lock().unwrap().get_mut(&number).unwrap());
        self.notify(number);
    }

    fn notify(&self, number: u32) {
        if let Some(changes) = &*self.changes.lock().unwrap() {
            changes.changed(number);
        }
    }
}

impl DeviceSource for FakeDevices {
    fn spec(&self) -> &PoolSpec {
        &self.spec
    }

    fn entries(&self) -> Vec<DeviceEntry> {
        self.entries.lock().unwrap().values().cloned().collect()
    }

    fn entry(&self, number: u32) -> Option<DeviceEntry> {
        self.entries.lock().unwrap().get(&number).cloned()
    }

    fn control_op(&self, op: LoopOp) -> Answer<u32> {
        match op {
            LoopOp::GetFree => self.get_free(),
            LoopOp::Add(number) => self.add(number),
            LoopOp::Remove(number) => self.remove(number),
            other => panic!("{other:?} is not an operation of loop-control"),
        }
    }

    fn watch(&self, changes: ChangeListener) {
        *self.changes.lock().unwrap() = Some(changes);
    }
}

impl FakeDevices {
    fn get_free(&self) -> Answer<u32> {
        let taken = self.entries();
        if let Some(free) = taken.iter().find(|entry| entry.bound.is_none()) {
            return Ok(free.number);
        }
        let next = (0..).find(|&number| self.entry(number).is_none()).unwrap();
        self.add(next as i32)
    }

    fn add(&self, number: i32) -> Answer<u32> {
        std::thread::sleep(Duration::from_millis(self.slow.load(Ordering::Relaxed).into()));
        let number = u32::try_from(number).map_err(|_| Errno::INVAL)?;
        if self.entry(number).is_some() {
            return Err(Errno::EXIST);
        }
        if self.entries().len() as u32 == self.spec.max {
            return Err(Errno::NOSPC);
        }
        self.make(number);
        Ok(number)
    }

    pub(super) fn remove(&self, number: i32) -> Answer<u32> {
        let number = u32::try_from(number).map_err(|_| Errno::INVAL)?;
        match self.entry(number) {
            None => Err(Errno::NODEV),
            Some(entry) if entry.bound.is_some() => Err(Errno::BUSY),
            Some(_) => {
                self.entries.lock().unwrap().remove(&number);
                self.notify(number);
                Ok(0)
            }
        }
    }
}

/// A block device that can be opened and is probably unused: the last unbound loop device of the
/// host.
pub(super) fn host_device() -> Option<u64> {
    let names =
        std::fs::read_dir("/sys/block").ok()?.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let numbers = names.filter_map(|name| name.strip_prefix("loop")?.parse().ok());
    let unbound =
        numbers.filter(|n: &u32| !std::path::Path::new(&format!("/sys/block/loop{n}/loop")).exists());
    unbound.max().map(|number| rustix::fs::makedev(7, number))
}

/// A backing file.
pub(super) fn bound() -> Bound {
    Bound {
        backing_file: "/a.img".into(),
        image_device: 1,
        image_inode: 2,
        offset: 0,
        size_limit: 0,
        flags: 0,
    }
}
