//! One pool: its numbers, its limits, and who is told when something changes.
//!
//! Knows which loopN there are and hands operations to them, one at a time each. A device whose backing
//! file does not answer holds up itself only: every wait for another's operation has a limit.

mod fixed;

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use super::binding::check_kind;
use super::device::Device;
use super::maker::Maker;
use super::quota::Quotas;
use super::reaper::Reaper;
use super::{Answer, Caller, Configure, Entry, Errno, Info, NUMBER_MAX, PoolSpec, Status, Watcher, errno};
use crate::frontend::Stop;

/// How long an operation waits for another on the same device.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long a disk may take to make way for its successor, before its name leads nowhere after all.
const SETTLED_SOON: Duration = Duration::from_secs(1);
/// How long somebody who wants any free device waits for one that is shown unbound: the reaper may be
/// putting its old disks away, and another that is being bound hangs only if its file does.
const SHORT_PATIENCE: Duration = Duration::from_secs(1);
/// Disks above two for each device: partitions, and what is open still of those before.
const PARTS_MAX: usize = 64;
/// Devices that are ended at a time, where one may hang.
const ENDED_TOGETHER: usize = 64;
/// How deep loop devices may be stacked on each other.
const STACK_MAX: usize = 8;

/// A place for one loopN.
#[derive(Debug)]
pub(super) struct Place {
    pub(super) device: Mutex<Device>,
    /// What is shown of it; never held while something is waited for.
    entry: Mutex<Option<Entry>>,
    /// Its disk may be making way for the next just now: its name leads nowhere for a moment.
    moving: Mutex<bool>,
    moved: Condvar,
}

/// A private pool of loop devices.
#[derive(Debug)]
pub struct Pool {
    spec: PoolSpec,
    pub(super) maker: Maker,
    quotas: Quotas,
    places: Mutex<BTreeMap<u32, Arc<Place>>>,
    generations: AtomicU64,
    ending: AtomicBool,
    /// Its end does not wait for its users.
    forced: AtomicBool,
    watchers: Mutex<Watchers>,
    pub(super) reaper: Reaper,
}

#[derive(Default)]
struct Watchers(Vec<Arc<dyn Watcher>>);

impl std::fmt::Debug for Watchers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} watchers", self.0.len())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Pool {
    /// An empty one.
    pub fn start(spec: PoolSpec, maker: Maker, quotas: Quotas) -> crate::Result<Arc<Pool>> {
        let pool = Arc::new(Pool {
            spec,
            maker,
            quotas,
            places: Mutex::default(),
            generations: AtomicU64::new(1),
            ending: AtomicBool::new(false),
            forced: AtomicBool::new(false),
            watchers: Mutex::default(),
            reaper: Reaper::default(),
        });
        pool.reaper.start(&pool)?;
        Ok(pool)
    }

    /// What it is.
    pub fn spec(&self) -> &PoolSpec {
        &self.spec
    }

    /// Has changes told to `watcher`.
    pub fn watch(&self, watcher: Arc<dyn Watcher>) {
        lock(&self.watchers).0.push(watcher);
    }

    /// All devices, by number.
    pub fn entries(&self) -> Vec<Entry> {
        self.all().iter().filter_map(|(_, place)| lock(&place.entry).clone()).collect()
    }

    /// One device. If it makes way for its successor just now, waits for that, not long: whoever opens
    /// the device next is to find the successor.
    pub fn entry(&self, number: u32) -> Option<Entry> {
        let place = lock(&self.places).get(&number).cloned()?;
        place.wait_until_settled();
        lock(&place.entry).clone()
    }

    /// One device as it was shown last, without any wait: for who is told of the next change too.
    pub fn shown(&self, number: u32) -> Option<Entry> {
        let place = lock(&self.places).get(&number).cloned()?;
        lock(&place.entry).clone()
    }

    /// Which device (not partition) is the block device with this number.
    pub fn find(&self, rdev: u64) -> Option<u32> {
        self.find_entry(|entry| entry.rdev == rdev).map(|entry| entry.number)
    }

    /// The device that is like this. What is shown of one whose disk makes way is not true for the moment:
    /// the number may be another's by now. So that is looked at last, when it has settled.
    pub(super) fn find_entry(&self, is_it: impl Fn(&Entry) -> bool) -> Option<Entry> {
        let (moving, settled): (Vec<_>, Vec<_>) =
            self.all().into_iter().partition(|(_, place)| *lock(&place.moving));
        settled.into_iter().chain(moving).find_map(|(_, place)| {
            place.wait_until_settled();
            lock(&place.entry).clone().filter(&is_it)
        })
    }

    /// LOOP_CTL_GET_FREE.
    pub fn get_free(&self) -> Answer<u32> {
        for (number, place) in self.all() {
            // One that is being bound is not free, one that was just unbound is.
            let patience = if place.is_shown_bound() { Duration::ZERO } else { SHORT_PATIENCE };
            let Ok(mut device) = place.lock_within(patience) else { continue };
            if device.is_free() {
                return Ok(number);
            }
            // Its last user has closed it, and nobody has looked yet.
            if device.is_cleared() {
                place.set_moving(true);
                let unbound = device.unbind(&self.maker);
                self.settle(number, &place, device);
                if unbound {
                    return Ok(number);
                }
            }
        }
        self.create(None)
    }

    /// LOOP_CTL_ADD.
    pub fn add(&self, number: i32) -> Answer<u32> {
        match u32::try_from(number) {
            // As the kernel: any of them means the next.
            Err(_) => self.create(None),
            Ok(wanted) if number <= NUMBER_MAX => self.create(Some(wanted)),
            _ => Err(Errno::INVAL),
        }
    }

    fn create(&self, wanted: Option<u32>) -> Answer<u32> {
        // Held while the disk appears (milliseconds), so that no number is taken twice.
        let mut places = lock(&self.places);
        if self.ending.load(Ordering::Acquire) {
            return Err(Errno::NODEV);
        }
        let number = match wanted {
            Some(number) if places.contains_key(&number) || self.spec.reserved.contains(&number) => {
                return Err(Errno::EXIST);
            }
            Some(number) => number,
            None => self.spec.numbers().find(|number| !places.contains_key(number)).ok_or(Errno::NOSPC)?,
        };
        let held: usize = places.values().map(|place| place.disks()).sum();
        // Disks that are no longer anybody's loopN, but open still, count too.
        if places.len() >= self.spec.max as usize || held > 2 * self.spec.max as usize + PARTS_MAX {
            return Err(Errno::NOSPC);
        }
        let charge = self.quotas.charge(self.spec.uid)?;
        let disk = self.maker.make(512).map_err(|error| {
            tracing::warn!(%error, pool = self.spec.name, "no disk for a loop device");
            errno(&error)
        })?;
        let generation = self.generations.fetch_add(1 << 20, Ordering::Relaxed);
        let device = Device::new(number, disk, generation, charge);
        let entry = Mutex::new(device.entry());
        let device = Mutex::new(device);
        let place = Place { device, entry, moving: Mutex::default(), moved: Condvar::default() };
        places.insert(number, Arc::new(place));
        drop(places);
        self.tell(number);
        Ok(number)
    }

    /// LOOP_CTL_REMOVE. Answers 0.
    pub fn remove(&self, number: i32) -> Answer<u32> {
        let number = u32::try_from(number).map_err(|_| Errno::INVAL)?;
        let place = lock(&self.places).get(&number).cloned().ok_or(Errno::NODEV)?;
        let mut device = place.lock()?;
        place.set_moving(true);
        if device.is_cleared() {
            device.unbind(&self.maker);
        }
        if let Err(error) = device.retire(&self.maker) {
            self.settle(number, &place, device);
            return Err(error);
        }
        *lock(&place.entry) = None;
        place.set_moving(false);
        lock(&self.places).remove(&number);
        drop(device);
        self.tell(number);
        Ok(0)
    }

    /// LOOP_CONFIGURE and LOOP_SET_FD.
    pub fn configure(&self, number: u32, with: Configure, caller: &dyn Caller) -> Answer<()> {
        check_kind(&with.file, &self.maker.shared().claims)?;
        if self.place(number)?.is_shown_bound() {
            return Err(Errno::BUSY);
        }
        self.check_stack(number, &with.file)?;
        let moves = !caller.has_descriptor();
        self.change_and_move(number, moves, |device| device.configure(with, caller, &self.maker))
    }

    /// LOOP_CLR_FD.
    pub fn clear(&self, number: u32, _caller: &dyn Caller) -> Answer<()> {
        self.change(number, Device::clear)
    }

    /// LOOP_GET_STATUS64.
    pub fn status(&self, number: u32) -> Answer<Status> {
        let place = self.place(number)?;
        let device = place.lock()?;
        device.status()
    }

    /// LOOP_SET_STATUS64.
    pub fn set_status(&self, number: u32, info: &Info, caller: &dyn Caller) -> Answer<()> {
        self.change(number, |device| device.set_status(info, caller, &self.maker))
    }

    /// LOOP_SET_CAPACITY.
    pub fn set_capacity(&self, number: u32, caller: &dyn Caller) -> Answer<()> {
        self.change(number, |device| device.set_capacity(caller))
    }

    /// LOOP_SET_DIRECT_IO.
    pub fn set_direct_io(&self, number: u32, on: bool, caller: &dyn Caller) -> Answer<()> {
        self.change(number, |device| device.set_direct_io(on, caller))
    }

    /// LOOP_SET_BLOCK_SIZE.
    pub fn set_block_size(&self, number: u32, bytes: u64, caller: &dyn Caller) -> Answer<()> {
        let moves = !caller.has_descriptor();
        self.change_and_move(number, moves, |device| device.set_block_size(bytes, caller, &self.maker))
    }

    /// LOOP_CHANGE_FD.
    pub fn change_fd(&self, number: u32, file: OwnedFd, caller: &dyn Caller) -> Answer<()> {
        self.check_stack(number, &file)?;
        self.change(number, |device| device.change_fd(file, caller, &self.maker))
    }

    /// Somebody has unmounted something, or is about to close a device: the reaper looks soon.
    pub fn expect_close(&self) {
        self.reaper.wake();
    }

    /// Takes nothing more; unused devices go at once, used ones at their last close, or at once too
    /// with `force`.
    pub fn end(&self, force: bool) {
        self.ending.store(true, Ordering::Release);
        self.forced.fetch_or(force, Ordering::AcqRel);
        // What nobody uses does not wait for what somebody does.
        if !self.sweep_away(Stop::IfUnusedNow, PATIENCE) && force {
            self.sweep_away_together();
        }
        self.reaper.wake();
    }

    /// It has ended, or is about to.
    pub fn is_ending(&self) -> bool {
        self.ending.load(Ordering::Acquire)
    }

    /// A round of the reaper. Answers how many devices are waited for, and whether the pool is over.
    pub(super) fn reap(&self) -> (usize, bool) {
        if self.is_ending() {
            let when = if self.forced.load(Ordering::Acquire) { Stop::Always } else { Stop::IfUnusedNow };
            let over = self.sweep_away(when, Duration::ZERO);
            if over {
                let watchers = lock(&self.watchers).0.clone();
                watchers.iter().for_each(|watcher| watcher.ended(self));
            }
            return (if over { 0 } else { self.all().len().max(1) }, over);
        }
        let mut waiting = 0;
        for (number, place) in self.all() {
            let Ok(mut device) = place.device.try_lock() else {
                waiting += 1;
                continue;
            };
            if !device.is_awaited() {
                continue;
            }
            let before = device.is_bound();
            place.set_moving(true);
            let changed = device.reap(&self.maker);
            waiting += usize::from(device.is_awaited());
            // What looked unbound and is still open is shown again after a while.
            if changed || before != lock(&place.entry).as_ref().is_some_and(|entry| entry.bound.is_some()) {
                self.settle(number, &place, device);
            } else {
                place.set_moving(false);
            }
        }
        (waiting, false)
    }

    /// Gives all disks away that can be had; true when none is left.
    fn sweep_away(&self, when: Stop, patience: Duration) -> bool {
        let mut clean = true;
        for (number, place) in self.all() {
            clean &= self.end_one(number, &place, when, patience);
        }
        if clean {
            self.maker.end();
        }
        clean
    }

    /// The same by force, many at a time: one whose file does not answer holds up no other.
    fn sweep_away_together(&self) {
        for some in self.all().chunks(ENDED_TOGETHER) {
            std::thread::scope(|scope| {
                for (number, place) in some {
                    let end = || self.end_one(*number, place, Stop::Always, PATIENCE);
                    // Without a thread it is left to the reaper.
                    let _ = std::thread::Builder::new().name("end".into()).spawn_scoped(scope, end);
                }
            });
        }
    }

    fn end_one(&self, number: u32, place: &Place, when: Stop, patience: Duration) -> bool {
        let Ok(mut device) = place.lock_within(patience) else { return false };
        if !device.end(when, &self.maker) {
            return false;
        }
        *lock(&place.entry) = None;
        lock(&self.places).remove(&number);
        drop(device);
        self.tell(number);
        true
    }

    pub(super) fn all(&self) -> Vec<(u32, Arc<Place>)> {
        lock(&self.places).iter().map(|(number, place)| (*number, place.clone())).collect()
    }

    fn place(&self, number: u32) -> Answer<Arc<Place>> {
        lock(&self.places).get(&number).cloned().ok_or(Errno::NXIO)
    }

    /// One operation on one device, and the news of it.
    pub(super) fn change(
        &self,
        number: u32,
        operation: impl FnOnce(&mut Device) -> Answer<()>,
    ) -> Answer<()> {
        self.change_and_move(number, false, operation)
    }

    /// The same; `moves`: its disk may go on the way, since no descriptor of it is to be replaced.
    fn change_and_move(
        &self,
        number: u32,
        moves: bool,
        operation: impl FnOnce(&mut Device) -> Answer<()>,
    ) -> Answer<()> {
        let place = self.place(number)?;
        let mut device = place.lock()?;
        if self.is_ending() {
            return Err(Errno::NXIO);
        }
        place.set_moving(moves);
        let answer = operation(&mut device);
        self.settle(number, &place, device);
        answer
    }

    /// Shows what became of a device, lets go of it, and tells those who watch.
    fn settle(&self, number: u32, place: &Place, device: MutexGuard<'_, Device>) {
        let entry = device.entry();
        let awaited = device.is_awaited();
        let changed = {
            let mut shown = lock(&place.entry);
            let changed = *shown != entry;
            *shown = entry;
            changed
        };
        drop(device);
        // Before anybody is told, who may ask for the entry.
        place.set_moving(false);
        if changed {
            self.tell(number);
        }
        if awaited {
            self.reaper.wake();
        }
    }

    fn tell(&self, number: u32) {
        let watchers = lock(&self.watchers).0.clone();
        watchers.iter().for_each(|watcher| watcher.changed(self, number));
    }

    /// Refuses a device as its own backing file, directly or through others of this pool, and towers.
    fn check_stack(&self, number: u32, file: &OwnedFd) -> Answer<()> {
        let stat = rustix::fs::fstat(file.as_fd())?;
        let is_block = rustix::fs::FileType::from_raw_mode(stat.st_mode) == rustix::fs::FileType::BlockDevice;
        let mut below = is_block.then_some(stat.st_rdev);
        let mut seen = BTreeSet::from([number]);
        while let Some(next) = below.and_then(|rdev| self.find(rdev)) {
            if !seen.insert(next) || seen.len() > STACK_MAX {
                return Err(Errno::BADF);
            }
            let place = self.place(next)?;
            let device = place.lock()?;
            // As the kernel: nothing can be read from an unbound one.
            if !device.is_bound() {
                return Err(Errno::INVAL);
            }
            below = device.shows();
        }
        Ok(())
    }
}

impl Place {
    fn set_moving(&self, moving: bool) {
        *lock(&self.moving) = moving;
        self.moved.notify_all();
    }

    fn wait_until_settled(&self) {
        let moving = lock(&self.moving);
        let _ = self.moved.wait_timeout_while(moving, SETTLED_SOON, |moving| *moving);
    }

    fn lock(&self) -> Answer<MutexGuard<'_, Device>> {
        self.lock_within(PATIENCE)
    }

    fn is_shown_bound(&self) -> bool {
        lock(&self.entry).as_ref().is_some_and(|entry| entry.bound.is_some())
    }

    fn lock_within(&self, patience: Duration) -> Answer<MutexGuard<'_, Device>> {
        let deadline = Instant::now() + patience;
        loop {
            match self.device.try_lock() {
                Ok(device) => return Ok(device),
                Err(TryLockError::Poisoned(device)) => return Ok(device.into_inner()),
                Err(TryLockError::WouldBlock) if Instant::now() >= deadline => return Err(Errno::BUSY),
                Err(TryLockError::WouldBlock) => std::thread::sleep(Duration::from_micros(500)),
            }
        }
    }

    fn disks(&self) -> usize {
        self.device.try_lock().map_or(1, |device| device.disks())
    }
}
