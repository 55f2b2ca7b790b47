//! One pool: its numbers, its limits, and who is told when something changes.
//!
//! Knows which loopN there are and hands operations to them, one at a time each. A device whose backing
//! file does not answer holds up itself only: every wait for another's operation has a limit.

mod fixed;
mod forced;
mod lookup;
mod operation;
mod stacks;

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::binding::check_kind;
use super::device::Device;
use super::maker::Maker;
use super::place::{END_PATIENCE, Place};
use super::quota::Quotas;
use super::reaper::{Reaper, Round};
use super::{Answer, Configure, Entry, Errno, NUMBER_MAX, PoolSpec, Status, Watcher, errno};
use crate::frontend::StopMode;
use crate::sys::stack::Stack;
pub use operation::{LoopOp, LoopReply};

/// How long somebody who wants any free device waits for one that is shown unbound: the reaper may be
/// putting its old disks away, and another that is being bound hangs only if its file does.
const SHORT_PATIENCE: Duration = Duration::from_secs(1);
/// Disks above two for each device: partitions, and what is open still of those before.
const PARTS_MAX: usize = 64;
/// Devices whose names are there from the start, as with the kernel's driver.
const PROMISED: usize = 8;
/// How deep loop devices may be stacked on each other.
const STACK_MAX: usize = 8;

/// A private pool of loop devices.
#[derive(Debug)]
pub struct Pool {
    spec: PoolSpec,
    pub(super) maker: Maker,
    quotas: Quotas,
    places: Mutex<BTreeMap<u32, Arc<Place>>>,
    /// Held while a device is made, so that no number is taken twice.
    creating: Mutex<()>,
    generations: AtomicU64,
    ending: AtomicBool,
    /// Its end does not wait for its users.
    forced: AtomicBool,
    watchers: Mutex<Watchers>,
    /// Numbers whose names are there, and whose devices come when somebody looks a name up.
    promised: Mutex<BTreeSet<u32>>,
    /// Those that are shown, and whether the kernel had them since: an array's node is made before there is one.
    stacks: Mutex<BTreeMap<Stack, bool>>,
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
    pub fn start(spec: PoolSpec, mut maker: Maker, quotas: Quotas) -> crate::Result<Arc<Pool>> {
        maker.close_with(quotas.closer(spec.uid));
        let most = PROMISED.min(spec.max as usize);
        let pool = Arc::new(Pool {
            promised: Mutex::new(spec.numbers().take(most).collect()),
            spec,
            maker,
            quotas,
            places: Mutex::default(),
            creating: Mutex::default(),
            generations: AtomicU64::new(1),
            ending: AtomicBool::new(false),
            forced: AtomicBool::new(false),
            watchers: Mutex::default(),
            stacks: Mutex::default(),
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

    /// Numbers of devices that will be there when somebody looks their names up.
    pub fn promised(&self) -> Vec<u32> {
        lock(&self.promised).iter().copied().collect()
    }

    /// All devices, by number.
    pub fn entries(&self) -> Vec<Entry> {
        self.all().iter().filter_map(|(_, place)| place.shown()).collect()
    }

    /// One device, for somebody who opens it next. If its disk is being replaced just now, waits for
    /// that, not long; and the disk is not replaced right after.
    pub fn entry(&self, number: u32) -> Option<Entry> {
        let place = self.place(number).or_else(|_| self.keep_promise(number)).ok()?;
        // After its last close the kernel's driver opens none that is bound still; the reaper may come later.
        if place.is_leaving()
            && let Ok(mut device) = place.lock_within(SHORT_PATIENCE)
        {
            if device.is_leaving() {
                place.begin_replacing();
                if !device.unbind(&self.maker) {
                    tracing::debug!(number, "a device whose name is looked up is bound still");
                }
            }
            self.settle(number, &place, device);
        }
        place.entry_to_open()
    }

    fn keep_promise(&self, number: u32) -> Answer<Arc<Place>> {
        if !lock(&self.promised).contains(&number) {
            return Err(Errno::NXIO);
        }
        match self.create(Some(number)) {
            Ok(_) | Err(Errno::EXIST) => self.place(number),
            Err(errno) => Err(errno),
        }
    }

    /// One device as it was shown last, without any wait: for who is told of the next change too.
    pub fn shown(&self, number: u32) -> Option<Entry> {
        self.place(number).ok()?.shown()
    }

    /// LOOP_CTL_GET_FREE.
    fn get_free(&self) -> Answer<u32> {
        for (number, place) in self.all() {
            let promised = lock(&self.promised).first().copied();
            if let Some(lower) = promised.filter(|promised| *promised < number)
                && self.keep_promise(lower).is_ok()
            {
                return Ok(lower);
            }
            // One that is being bound is not free, one that was just unbound is.
            let patience = if place.is_shown_bound() { Duration::ZERO } else { SHORT_PATIENCE };
            let Ok(mut device) = place.lock_within(patience) else { continue };
            if device.is_free() {
                drop(device);
                place.wait_until_announced();
                return Ok(number);
            }
            // LOOP_CLR_FD came, and nobody has looked yet whether that was its last user.
            if device.is_cleared() && device.finish_clearing(&self.maker, SHORT_PATIENCE) {
                self.settle(number, &place, device);
                place.wait_until_announced();
                return Ok(number);
            }
        }
        self.create(None)
    }

    /// LOOP_CTL_ADD.
    fn add(&self, number: i32) -> Answer<u32> {
        match u32::try_from(number) {
            // As the kernel: any of them means the next.
            Err(_) => self.create(None),
            Ok(wanted) if number <= NUMBER_MAX => self.create(Some(wanted)),
            _ => Err(Errno::INVAL),
        }
    }

    fn create(&self, wanted: Option<u32>) -> Answer<u32> {
        let creating = lock(&self.creating);
        let present = self.all();
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
        let held: usize = present.iter().map(|(_, place)| place.disks()).sum();
        // Disks that are no longer anybody's loopN, but open still, count too.
        if present.len() >= self.spec.max as usize || held > 2 * self.spec.max as usize + PARTS_MAX {
            return Err(Errno::NOSPC);
        }
        let charge = self.quotas.charge(self.spec.uid)?;
        let disk = self.maker.make(512).map_err(|error| {
            tracing::warn!(%error, pool = self.spec.name, "no disk for a loop device");
            errno(&error)
        })?;
        let generation = self.generations.fetch_add(1 << 20, Ordering::Relaxed);
        let place = Arc::new(Place::new(Device::new(number, disk, generation, charge)));
        lock(&self.places).insert(number, Arc::clone(&place));
        lock(&self.promised).remove(&number);
        drop(creating);
        self.tell(number);
        place.announce();
        Ok(number)
    }

    /// LOOP_CTL_REMOVE. Answers 0.
    fn remove(&self, number: i32) -> Answer<u32> {
        let number = u32::try_from(number).map_err(|_| Errno::INVAL)?;
        let Ok(place) = self.place(number) else {
            let promised = lock(&self.promised).remove(&number);
            self.tell(number);
            return if promised { Ok(0) } else { Err(Errno::NODEV) };
        };
        let mut device = place.lock()?;
        place.begin_replacing();
        if device.is_cleared() {
            device.finish_clearing(&self.maker, SHORT_PATIENCE);
        }
        if let Err(error) = device.retire(&self.maker) {
            self.settle(number, &place, device);
            return Err(error);
        }
        place.withdraw();
        lock(&self.places).remove(&number);
        drop(device);
        self.tell(number);
        Ok(0)
    }

    /// Refuses a file that this device is not to be bound to.
    fn check_file(&self, number: u32, with: &Configure) -> Answer<()> {
        check_kind(&with.file, &self.maker.shared().claims)?;
        if self.place(number)?.is_shown_bound() {
            return Err(Errno::BUSY);
        }
        self.check_closing()?;
        self.check_stack(number, &with.file)
    }

    fn check_closing(&self) -> Answer<()> {
        if self.maker.is_closing_many() { Err(Errno::BUSY) } else { Ok(()) }
    }

    /// LOOP_GET_STATUS64.
    fn status(&self, number: u32) -> Answer<Status> {
        let place = self.place(number)?;
        let device = place.lock()?;
        device.status()
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
        for stack in self.end_stacks() {
            tracing::info!("{} ends with private pool {}", stack.name, self.spec.name);
        }
        // What nobody uses does not wait for what somebody does.
        if !self.sweep_away(StopMode::IfUnusedNow, END_PATIENCE) && force {
            self.sweep_away_together();
        }
        self.reaper.wake();
    }

    /// It has ended, or is about to.
    pub fn is_ending(&self) -> bool {
        self.ending.load(Ordering::Acquire)
    }

    /// A round of the reaper; `names`: looks also for bound files that are called something else by now.
    pub(super) fn reap(&self, names: bool) -> Round {
        if self.is_ending() {
            self.end_stacks();
            let when =
                if self.forced.load(Ordering::Acquire) { StopMode::Always } else { StopMode::IfUnusedNow };
            let over = self.sweep_away(when, Duration::ZERO);
            if over {
                let watchers = lock(&self.watchers).0.clone();
                watchers.iter().for_each(|watcher| watcher.ended(self));
            }
            return Round { awaited: if over { 0 } else { self.all().len().max(1) }, bound: 0, over };
        }
        if names {
            self.look_after_stacks();
        }
        let mut round = Round::default();
        for (number, place) in self.all() {
            let Ok(mut device) = place.device.try_lock() else {
                round.awaited += 1;
                continue;
            };
            round.bound += usize::from(device.is_bound());
            if !device.is_awaited() {
                if names && device.is_bound() {
                    self.publish(number, &place, device);
                }
                continue;
            }
            device.reap(&self.maker);
            if device.is_to_be_bound_again() && place.try_begin_replacing() {
                device.bind_again(&self.maker);
            }
            if device.is_to_be_unbound() && place.try_begin_replacing() {
                device.unbind(&self.maker);
            }
            round.awaited += usize::from(device.is_awaited());
            self.publish(number, &place, device);
        }
        round
    }

    /// Gives all disks away that can be had; true when none is left.
    fn sweep_away(&self, when: StopMode, patience: Duration) -> bool {
        let mut clean = true;
        for (number, place) in self.all() {
            clean &= self.end_one(number, &place, when, patience);
        }
        // What was being made is there by now, and ends with the next sweep.
        let _none_comes = lock(&self.creating);
        let over = clean && self.all().is_empty();
        // Disks that no device has go at once, also where a device stays.
        self.maker.end();
        over
    }

    fn end_one(&self, number: u32, place: &Place, when: StopMode, patience: Duration) -> bool {
        let Ok(mut device) = place.lock_within(patience) else { return false };
        if !device.end(when, &self.maker) {
            return false;
        }
        place.withdraw();
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
        if moves {
            place.begin_replacing();
        }
        let answer = operation(&mut device);
        self.settle(number, &place, device);
        answer
    }

    /// Shows what became of a device, lets go of it, and tells those who watch.
    fn settle(&self, number: u32, place: &Place, device: MutexGuard<'_, Device>) {
        let was_bound = place.is_shown_bound();
        let (awaited, bound) = (device.is_awaited(), device.is_bound());
        self.publish(number, place, device);
        if awaited || bound && !was_bound {
            self.reaper.wake();
        }
    }

    /// The same for the reaper.
    fn publish(&self, number: u32, place: &Place, device: MutexGuard<'_, Device>) {
        // Before anybody is told, who may ask for the entry.
        let changed = place.publish(&device);
        drop(device);
        if changed {
            self.tell(number);
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
