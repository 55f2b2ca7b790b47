// SPDX-License-Identifier: Apache-2.0 OR MIT
//! One pool: its numbers, limits and watchers.
//!
//! Knows which loopN exist, and passes operations to them, one at a time per device. A device whose
//! backing file does not answer blocks only itself: every wait for a device has a timeout.

mod activity;
mod backing;
mod fixed;
mod force_end;
mod lookup;
mod operation;
mod signs;
mod stacks;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::close_watcher::{CloseWatcher, PollResult};
use super::deletion_queue::END_HELPERS;
use super::device::PoolDevice;
use super::disk_allocator::DiskAllocator;
use super::loop_slot::{END_LOCK_TIMEOUT, LoopSlot};
use super::quota::Quotas;
use super::{Answer, DeviceEntry, Errno, LoopStatus, NUMBER_MAX, PoolSpec, PoolWatcher, errno};
use crate::frontend::StopMode;
use crate::parallel::Helpers;
use crate::sys::stack::Stack;
use force_end::RemovalTurn;
pub use operation::{LoopOp, LoopReply};

/// How long a search for a free device waits for the lock of one that is published as unbound: the
/// close watcher may be releasing its disks. A device that is being bound hangs only if its file
/// does.
const SHORT_LOCK_TIMEOUT: Duration = Duration::from_secs(1);
/// Disks of a pool beside two per device: for partitions and outgoing disks.
const EXTRA_DISKS_MAX: usize = 64;
/// Names that exist from the start, as with the kernel's driver.
const PREALLOCATED_NAMES: usize = 8;

/// A private pool of loop devices.
#[derive(Debug)]
pub struct Pool {
    spec: PoolSpec,
    pub(crate) allocator: DiskAllocator,
    quotas: Quotas,
    slots: Mutex<BTreeMap<u32, Arc<LoopSlot>>>,
    /// Held while a device is created, so that no number is taken twice.
    creating: Mutex<()>,
    generations: AtomicU64,
    ending: AtomicBool,
    /// The pool ends without waiting for users of its devices.
    forced: AtomicBool,
    /// Held while the devices of an ending pool are removed. A poll does not compete for them.
    pub(super) removing: Mutex<()>,
    watchers: Mutex<WatcherList>,
    /// Numbers of devices that have names, and are created by the first lookup.
    preallocated: Mutex<BTreeSet<u32>>,
    /// Published stacked disks, and whether each has existed since: an array's node precedes the
    /// array.
    stacks: Mutex<BTreeMap<Stack, bool>>,
    pub(super) close_watcher: CloseWatcher,
}

#[derive(Default)]
struct WatcherList(Vec<Arc<dyn PoolWatcher>>);

impl std::fmt::Debug for WatcherList {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} watchers", self.0.len())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Pool {
    /// Starts an empty pool.
    pub fn start(spec: PoolSpec, mut allocator: DiskAllocator, quotas: Quotas) -> crate::Result<Arc<Pool>> {
        allocator.set_closer(quotas.closer(spec.uid));
        let close_watcher = CloseWatcher::default();
        allocator.notices.waker = close_watcher.waker();
        let most = PREALLOCATED_NAMES.min(spec.max as usize);
        let pool = Arc::new(Pool {
            preallocated: Mutex::new(spec.numbers().take(most).collect()),
            spec,
            allocator,
            quotas,
            slots: Mutex::default(),
            creating: Mutex::default(),
            generations: AtomicU64::new(1),
            ending: AtomicBool::new(false),
            forced: AtomicBool::new(false),
            removing: Mutex::default(),
            watchers: Mutex::default(),
            stacks: Mutex::default(),
            close_watcher,
        });
        pool.close_watcher.start(&pool)?;
        Ok(pool)
    }

    /// Its properties.
    pub fn spec(&self) -> &PoolSpec {
        &self.spec
    }

    /// Notifies `watcher` of changes from now on.
    pub fn watch(&self, watcher: Arc<dyn PoolWatcher>) {
        lock(&self.watchers).0.push(watcher);
    }

    /// Numbers of devices that their first lookup creates.
    pub fn preallocated(&self) -> Vec<u32> {
        lock(&self.preallocated).iter().copied().collect()
    }

    /// All devices, by number.
    pub fn entries(&self) -> Vec<DeviceEntry> {
        self.all_slots().iter().filter_map(|(_, slot)| slot.snapshot()).collect()
    }

    /// One device, for a lookup that an open follows. Waits for a running replacement of its disk,
    /// with a timeout, and delays the next one.
    pub fn entry(&self, number: u32) -> Option<DeviceEntry> {
        let slot = self.slot(number).or_else(|_| self.create_preallocated(number)).ok()?;
        if slot.is_in_rundown() || self.has_lost_file(&slot) {
            self.unbind_unused(number, &slot);
        }
        slot.entry_for_open()
    }

    /// Whether its disk has lost its file: its last close has unbound it, or a process past the
    /// interception. The close watcher may not have noticed it yet.
    fn has_lost_file(&self, slot: &LoopSlot) -> bool {
        slot.snapshot().is_some_and(|entry| !self.allocator.is_intact(entry.rdev))
    }

    /// With the kernel's driver a device is unbound right after the last close.
    fn unbind_unused(&self, number: u32, slot: &LoopSlot) {
        let Ok(mut device) = slot.lock_within(SHORT_LOCK_TIMEOUT) else { return };
        if device.is_in_rundown() || device.has_lost_file() {
            slot.begin_replacing();
            if !device.unbind(&self.allocator) {
                tracing::debug!(number, "cannot unbind a device after its last close: it is in use again");
            }
        }
        self.publish(number, slot, device);
    }

    fn create_preallocated(&self, number: u32) -> Answer<Arc<LoopSlot>> {
        if !lock(&self.preallocated).contains(&number) {
            return Err(Errno::NXIO);
        }
        match self.create(Some(number)) {
            Ok(_) | Err(Errno::EXIST) => self.slot(number),
            Err(errno) => Err(errno),
        }
    }

    /// One device as last published, without a wait: for watchers.
    pub fn snapshot(&self, number: u32) -> Option<DeviceEntry> {
        self.slot(number).ok()?.snapshot()
    }

    /// LOOP_CTL_GET_FREE.
    fn get_free(&self) -> Answer<u32> {
        for (number, slot) in self.all_slots() {
            let preallocated = lock(&self.preallocated).first().copied();
            if let Some(lower) = preallocated.filter(|preallocated| *preallocated < number)
                && self.create_preallocated(lower).is_ok()
            {
                return Ok(lower);
            }
            if self.has_lost_file(&slot) {
                self.unbind_unused(number, &slot);
            }
            // A device that is being bound is not free; one that was just unbound is.
            let timeout = if slot.is_published_bound() { Duration::ZERO } else { SHORT_LOCK_TIMEOUT };
            let Ok(mut device) = slot.lock_within(timeout) else { continue };
            if device.is_free() {
                drop(device);
                slot.wait_until_announced();
                return Ok(number);
            }
            // After LOOP_CLR_FD: check whether it was the last user.
            if device.is_cleared() && device.finish_clear(&self.allocator, SHORT_LOCK_TIMEOUT) {
                self.publish(number, &slot, device);
                slot.wait_until_announced();
                return Ok(number);
            }
        }
        self.create(None)
    }

    /// LOOP_CTL_ADD.
    fn add(&self, number: i32) -> Answer<u32> {
        match u32::try_from(number) {
            // As in the kernel: a negative number means the next.
            Err(_) => self.create(None),
            Ok(wanted) if number <= NUMBER_MAX => self.create(Some(wanted)),
            _ => Err(Errno::INVAL),
        }
    }

    fn create(&self, wanted: Option<u32>) -> Answer<u32> {
        let creating = lock(&self.creating);
        let present = self.all_slots();
        let is_there = |number: u32| present.binary_search_by_key(&number, |(number, _)| *number);
        if self.is_ending() {
            return Err(Errno::NODEV);
        }
        if let Some(Ok(at)) = wanted.map(is_there) {
            drop(creating);
            present[at].1.wait_until_announced();
            return Err(Errno::EXIST);
        }
        if wanted.is_some_and(|number| self.spec.reserved.contains(&number)) {
            return Err(Errno::EXIST);
        }
        let free = || self.spec.numbers().find(|number| is_there(*number).is_err());
        let number = wanted.or_else(free).ok_or(Errno::NOSPC)?;
        let held: usize = present.iter().map(|(_, slot)| slot.disks()).sum();
        // Outgoing disks count too.
        if present.len() >= self.spec.max as usize || held > 2 * self.spec.max as usize + EXTRA_DISKS_MAX {
            return Err(Errno::NOSPC);
        }
        let charge = self.quotas.charge(self.spec.uid)?;
        let disk = self.allocator.allocate().map_err(|error| {
            tracing::warn!(%error, pool = self.spec.name, "cannot allocate a disk for a loop device");
            errno(&error)
        })?;
        let generation = self.generations.fetch_add(1 << 20, Ordering::Relaxed);
        let slot = Arc::new(LoopSlot::new(PoolDevice::new(number, disk, generation, charge)));
        lock(&self.slots).insert(number, Arc::clone(&slot));
        lock(&self.preallocated).remove(&number);
        drop(creating);
        self.notify(number);
        slot.announce();
        Ok(number)
    }

    /// LOOP_CTL_REMOVE. Returns 0.
    fn remove(&self, number: i32) -> Answer<u32> {
        let number = u32::try_from(number).map_err(|_| Errno::INVAL)?;
        let Ok(slot) = self.slot(number) else {
            let preallocated = lock(&self.preallocated).remove(&number);
            self.notify(number);
            return if preallocated { Ok(0) } else { Err(Errno::NODEV) };
        };
        let mut device = slot.lock()?;
        slot.begin_replacing();
        if device.is_cleared() {
            device.finish_clear(&self.allocator, SHORT_LOCK_TIMEOUT);
        }
        if let Err(error) = device.retire(&self.allocator) {
            self.publish(number, &slot, device);
            return Err(error);
        }
        slot.withdraw();
        lock(&self.slots).remove(&number);
        drop(device);
        self.notify(number);
        Ok(0)
    }

    /// LOOP_GET_STATUS64.
    fn status(&self, number: u32) -> Answer<LoopStatus> {
        let slot = self.slot(number)?;
        let device = slot.lock()?;
        device.status()
    }

    /// A close is near, for instance after an unmount: the close watcher polls often for a while.
    pub fn expect_close(&self) {
        self.close_watcher.wake();
    }

    /// Ends the pool. Removes unused devices at once, used ones at their last close, or at once
    /// with `force`.
    pub fn end(&self, force: bool) {
        self.forced.fetch_or(force, Ordering::AcqRel);
        // A poll that saw the end before would remove the devices itself, one after the other.
        let removing = lock(&self.removing);
        self.ending.store(true, Ordering::Release);
        for stack in self.end_stacks() {
            tracing::info!("{} ends with private pool {}", stack.name, self.spec.name);
        }
        let removing = (removing, RemovalTurn::take());
        self.allocator.deletion_queue.begin_end();
        // Unused devices do not wait for those in use.
        if !self.remove_devices(StopMode::IfUnusedNow, END_LOCK_TIMEOUT, &END_HELPERS) && force {
            self.remove_devices_in_parallel();
            self.allocator.end();
        }
        drop(removing);
        self.close_watcher.wake();
    }

    /// Whether it has ended, or is ending.
    pub fn is_ending(&self) -> bool {
        self.ending.load(Ordering::Acquire)
    }

    /// One poll of the close watcher. `names`: also detects renamed backing files.
    pub(super) fn poll_closes(&self, names: bool) -> PollResult {
        if self.is_ending() {
            let over = self.poll_end();
            return PollResult {
                awaited: if over { 0 } else { self.all_slots().len().max(1) },
                bound: 0,
                ending: true,
                over,
            };
        }
        if names {
            self.withdraw_gone_stacks();
        }
        let mut round = PollResult::default();
        for (number, slot) in self.all_slots() {
            let Ok(mut device) = slot.device.try_lock() else {
                round.awaited += 1;
                continue;
            };
            round.bound += usize::from(device.is_bound());
            let lost = names && device.has_lost_file() && slot.try_begin_replacing();
            if lost {
                device.unbind(&self.allocator);
            }
            if !device.awaits_close() {
                if lost || names && device.is_bound() {
                    self.publish_without_wake(number, &slot, device);
                }
                continue;
            }
            device.release_unused(&self.allocator);
            if device.should_rebind() && slot.try_begin_replacing() {
                device.rebind_cleared(&self.allocator);
            }
            if self.allocator.is_kernel_loop() {
                device.apply_autoclear();
            }
            if device.is_autoclear() && device.may_be_unused() && slot.try_begin_replacing() {
                device.unbind(&self.allocator);
            }
            round.awaited += usize::from(device.needs_poll(self.allocator.reports_changes()));
            self.publish_without_wake(number, &slot, device);
        }
        round
    }

    /// Removes all devices that can be removed. True: none is left.
    fn remove_devices(&self, when: StopMode, timeout: Duration, helpers: &Helpers) -> bool {
        helpers.for_each("end", &self.all_slots(), |(number, slot)| {
            self.end_device(*number, slot, when, timeout);
        });
        // A device that was being created exists by now. The next call removes it.
        let _none_comes = lock(&self.creating);
        let over = self.all_slots().is_empty();
        // Free disks are removed at once, also where a device stays.
        self.allocator.end();
        over
    }

    /// Removes a device, unless it is in use or its lock is held.
    fn end_device(&self, number: u32, slot: &LoopSlot, when: StopMode, timeout: Duration) {
        let Ok(mut device) = slot.lock_within(timeout) else { return };
        if !device.end(when, &self.allocator) {
            return;
        }
        slot.withdraw();
        lock(&self.slots).remove(&number);
        drop(device);
        self.notify(number);
    }

    pub(super) fn all_slots(&self) -> Vec<(u32, Arc<LoopSlot>)> {
        lock(&self.slots).iter().map(|(number, slot)| (*number, slot.clone())).collect()
    }

    fn slot(&self, number: u32) -> Answer<Arc<LoopSlot>> {
        lock(&self.slots).get(&number).cloned().ok_or(Errno::NXIO)
    }

    /// Runs one operation on one device, and publishes the result.
    pub(super) fn change(
        &self,
        number: u32,
        operation: impl FnOnce(&mut PoolDevice) -> Answer<()>,
    ) -> Answer<()> {
        self.change_replacing(number, false, operation)
    }

    /// The same. `moves`: the operation may replace its disk without replacing the caller's
    /// descriptor.
    pub(super) fn change_replacing(
        &self,
        number: u32,
        moves: bool,
        operation: impl FnOnce(&mut PoolDevice) -> Answer<()>,
    ) -> Answer<()> {
        let slot = self.slot(number)?;
        let mut device = slot.lock()?;
        if self.is_ending() {
            return Err(Errno::NXIO);
        }
        if moves {
            slot.begin_replacing();
        }
        let answer = operation(&mut device);
        self.publish(number, &slot, device);
        answer
    }

    /// Publishes the state of a device, unlocks it, notifies the watchers, and wakes the close
    /// watcher.
    fn publish(&self, number: u32, slot: &LoopSlot, device: MutexGuard<'_, PoolDevice>) {
        let was_bound = slot.is_published_bound();
        let (awaited, bound) = (device.awaits_close(), device.is_bound());
        self.publish_without_wake(number, slot, device);
        if awaited || bound && !was_bound {
            self.close_watcher.wake();
        }
    }

    /// The same for the close watcher itself.
    fn publish_without_wake(&self, number: u32, slot: &LoopSlot, device: MutexGuard<'_, PoolDevice>) {
        // A notified watcher may read the entry.
        let notify = slot.publish(&device);
        if let Some(disk) = &device.disk {
            self.allocator.record_device(disk.rdev, number);
        }
        drop(device);
        if notify {
            self.notify(number);
            slot.notified();
        }
    }

    fn notify(&self, number: u32) {
        let watchers = lock(&self.watchers).0.clone();
        watchers.iter().for_each(|watcher| watcher.changed(self, number));
    }
}
