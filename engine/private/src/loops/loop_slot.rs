// SPDX-License-Identifier: Apache-2.0 OR MIT
//! One loopN of a pool: the lock of its device, and the state that others see meanwhile.
//!
//! Knows when that state may be read: not before all watchers know the device, and not while its
//! disk is being replaced. Does not know what an operation does.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use super::device::{OPEN_GRACE, PoolDevice, RelatedNumbers};
use super::{Answer, DeviceEntry, Errno};

/// How long an operation waits for the lock of its device: longer than a control command of the
/// driver may take, during which the close watcher holds the lock.
const LOCK_TIMEOUT: Duration = Duration::from_secs(15);
/// How long the end of a pool waits for the lock of a device.
pub(super) const END_LOCK_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a lookup waits for a disk that is being replaced, before it fails.
const REPLACE_TIMEOUT: Duration = Duration::from_secs(1);

/// A loopN of a pool.
#[derive(Debug)]
pub(super) struct LoopSlot {
    pub(super) device: Mutex<PoolDevice>,
    /// Never held across a wait.
    state: Mutex<PublishedState>,
    published: Condvar,
}

/// How a device number belongs to a device; the better match first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum NumberMatch {
    /// It is the number of its disk.
    Current,
    /// It was, or its disk is being replaced. Another device may have the number by now; then this
    /// match does not count.
    Former,
}

#[derive(Debug, Default)]
struct PublishedState {
    entry: Option<DeviceEntry>,
    numbers: RelatedNumbers,
    /// Its disk is being replaced: lookups wait.
    replacing: bool,
    /// The replacement was deferred once, because a process was about to open the disk.
    deferred: bool,
    /// See [`PoolDevice::is_in_rundown`](super::device::PoolDevice::is_in_rundown).
    in_rundown: bool,
    /// See [`PoolDevice::awaits_close`](super::device::PoolDevice::awaits_close).
    awaits_close: bool,
    /// All watchers know the device: LOOP_CTL_GET_FREE may return it.
    announced: bool,
    /// Notifications of watchers that are on their way.
    notifications: usize,
    /// The last lookup that an open follows.
    last_lookup: Option<Instant>,
}

impl PublishedState {
    fn recent_lookup(&self) -> Option<Duration> {
        OPEN_GRACE.checked_sub(self.last_lookup?.elapsed())
    }

    fn is(&self, rdev: u64) -> bool {
        self.entry.as_ref().is_some_and(|entry| entry.rdev == rdev)
    }

    fn match_number(&self, rdev: u64) -> Option<NumberMatch> {
        if self.is(rdev) && !self.replacing {
            return Some(NumberMatch::Current);
        }
        (self.is(rdev) || self.numbers.outgoing.contains(&rdev)).then_some(NumberMatch::Former)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl LoopSlot {
    /// Creates a slot that is not announced yet.
    pub(super) fn new(device: PoolDevice) -> LoopSlot {
        let state = PublishedState { entry: device.entry(), ..PublishedState::default() };
        LoopSlot { device: Mutex::new(device), state: Mutex::new(state), published: Condvar::new() }
    }

    /// The published state, without a wait.
    pub(super) fn snapshot(&self) -> Option<DeviceEntry> {
        lock(&self.state).entry.clone()
    }

    /// The state for a lookup that an open follows. Waits while the disk is being replaced, and
    /// delays the next replacement.
    pub(super) fn entry_for_open(&self) -> Option<DeviceEntry> {
        let mut state = self.wait_until_published()?;
        state.last_lookup = Some(Instant::now());
        state.entry.clone()
    }

    /// The state for a lookup that no open follows.
    pub(super) fn wait_published(&self) -> Option<DeviceEntry> {
        self.wait_until_published()?.entry.clone()
    }

    /// None: the disk is still being replaced. The last published number may be another disk's by
    /// now.
    fn wait_until_published(&self) -> Option<MutexGuard<'_, PublishedState>> {
        let state = lock(&self.state);
        let waited = self.published.wait_timeout_while(state, REPLACE_TIMEOUT, |state| state.replacing);
        Some(waited.unwrap_or_else(PoisonError::into_inner).0).filter(|state| !state.replacing)
    }

    /// How this device number belongs to the device.
    pub(super) fn match_number(&self, rdev: u64) -> Option<NumberMatch> {
        lock(&self.state).match_number(rdev)
    }

    /// Whether its disk has this number.
    pub(super) fn is(&self, rdev: u64) -> bool {
        lock(&self.state).is(rdev)
    }

    /// Whether a present or former partition has this number.
    pub(super) fn is_partition(&self, rdev: u64) -> bool {
        lock(&self.state).numbers.partitions.contains(&rdev)
    }

    pub(super) fn is_replacing(&self) -> bool {
        lock(&self.state).replacing
    }

    pub(super) fn is_published_bound(&self) -> bool {
        lock(&self.state).entry.as_ref().is_some_and(|entry| entry.bound.is_some())
    }

    /// Whether a last close releases a disk of the device.
    pub(super) fn awaits_close(&self) -> bool {
        lock(&self.state).awaits_close
    }

    /// Whether the device is in rundown; false while its disk is being replaced.
    pub(super) fn is_in_rundown(&self) -> bool {
        self.wait_until_published().is_some_and(|state| state.in_rundown)
    }

    /// Makes lookups wait, and waits for the opens that follow earlier lookups. The caller must
    /// `publish` or `withdraw` afterwards.
    pub(super) fn begin_replacing(&self) {
        let mut state = lock(&self.state);
        state.replacing = true;
        let wait = state.recent_lookup();
        drop(state);
        wait.into_iter().for_each(std::thread::sleep);
    }

    /// The same for a caller that retries. False: deferred, because a process is about to open the
    /// disk.
    pub(super) fn try_begin_replacing(&self) -> bool {
        let mut state = lock(&self.state);
        if !state.deferred && state.recent_lookup().is_some() {
            state.deferred = true;
            return false;
        }
        state.deferred = false;
        drop(state);
        self.begin_replacing();
        true
    }

    /// Publishes the state of the device at once, including the rundown. True: the caller must notify
    /// the watchers, and say so with `notified`: the entry changed, or another thread that has
    /// published it is still about to.
    pub(super) fn publish(&self, device: &PoolDevice) -> bool {
        let (entry, numbers, in_rundown) = (device.entry(), device.related_numbers(), device.is_in_rundown());
        let mut state = lock(&self.state);
        let notify = state.entry != entry || state.notifications > 0;
        state.notifications += usize::from(notify);
        (state.entry, state.numbers, state.in_rundown) = (entry, numbers, in_rundown);
        state.awaits_close = device.awaits_close();
        state.replacing = false;
        drop(state);
        self.published.notify_all();
        notify
    }

    /// The watchers know what the caller has published.
    pub(super) fn notified(&self) {
        lock(&self.state).notifications -= 1;
    }

    /// Publishes that the device is removed.
    pub(super) fn withdraw(&self) {
        let mut state = lock(&self.state);
        (state.entry, state.numbers, state.in_rundown) = (None, RelatedNumbers::default(), false);
        state.replacing = false;
        drop(state);
        self.published.notify_all();
    }

    /// Records that all watchers know the device.
    pub(super) fn announce(&self) {
        lock(&self.state).announced = true;
        self.published.notify_all();
    }

    /// Waits until all watchers know the device; has a timeout.
    pub(super) fn wait_until_announced(&self) {
        let state = lock(&self.state);
        let _ = self.published.wait_timeout_while(state, REPLACE_TIMEOUT, |state| !state.announced);
    }

    pub(super) fn lock(&self) -> Answer<MutexGuard<'_, PoolDevice>> {
        self.lock_within(LOCK_TIMEOUT)
    }

    pub(super) fn lock_within(&self, timeout: Duration) -> Answer<MutexGuard<'_, PoolDevice>> {
        let deadline = Instant::now() + timeout;
        loop {
            match self.device.try_lock() {
                Ok(device) => return Ok(device),
                Err(TryLockError::Poisoned(device)) => return Ok(device.into_inner()),
                Err(TryLockError::WouldBlock) if Instant::now() >= deadline => return Err(Errno::BUSY),
                Err(TryLockError::WouldBlock) => std::thread::sleep(Duration::from_micros(500)),
            }
        }
    }

    pub(super) fn disks(&self) -> usize {
        self.device.try_lock().map_or(1, |device| device.disks())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The kernel gives a new disk the number that another device's disk had before.
    #[test]
    fn prefers_the_device_that_has_the_number_now() {
        let rdev = rustix::fs::makedev(259, 7);
        let former = RelatedNumbers { outgoing: vec![rdev], partitions: Vec::new() };
        let was = PublishedState { numbers: former, ..PublishedState::default() };
        let entry = DeviceEntry {
            number: 1,
            rdev,
            generation: 1,
            size: 0,
            block_size: 512,
            bound: None,
            partitions: Vec::new(),
        };
        let mut is = PublishedState { entry: Some(entry), ..PublishedState::default() };
        let best = |is: &PublishedState| {
            [was.match_number(rdev).zip(Some(0)), is.match_number(rdev).zip(Some(1))]
                .into_iter()
                .flatten()
                .min()
        };
        assert_eq!(best(&is), Some((NumberMatch::Current, 1)));
        // A number published before a replacement does not count as current.
        is.replacing = true;
        assert_eq!(is.match_number(rdev), Some(NumberMatch::Former));
        assert_eq!(is.match_number(rdev + 1), None);
    }
}
