//! One loopN of a pool: the lock of its device, and what others are told of it meanwhile.
//!
//! Knows when it may be looked at: not before all who watch know of it, and not while its disk is being
//! replaced. Does not know what an operation does.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use super::device::Device;
use super::{Answer, Entry, Errno};

/// How long an operation waits for its device: longer than a control command of the driver may take, during
/// which the reaper has the device.
const OPERATION_PATIENCE: Duration = Duration::from_secs(15);
/// How long the end of a pool waits for one of its devices.
pub(super) const END_PATIENCE: Duration = Duration::from_secs(5);
/// How long a disk may take to be replaced, before its name leads nowhere after all.
const REPLACED_SOON: Duration = Duration::from_secs(1);
/// Who was told a device number opens it within this time: the kernel asks for it first.
pub(super) const QUIET: Duration = Duration::from_millis(15);

/// See the module.
#[derive(Debug)]
pub(super) struct Place {
    pub(super) device: Mutex<Device>,
    /// Never held while something is waited for.
    shown: Mutex<Shown>,
    published: Condvar,
}

/// Device numbers that lead to a device beside its own.
#[derive(Debug, Default)]
pub(super) struct Numbers {
    /// Of disks that it was, and that somebody may have open still.
    pub(super) outgoing: Vec<u64>,
    /// Of disks that are or were its partitions.
    pub(super) parts: Vec<u64>,
}

/// How surely a device number leads to a device, the surest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Lead {
    /// It is that of its disk.
    Present,
    /// It was, or its disk is being replaced. The number may be another device's by now, and only then be told as gone.
    Former,
}

#[derive(Debug, Default)]
struct Shown {
    entry: Option<Entry>,
    numbers: Numbers,
    /// Its disk is being replaced: its name leads nowhere for a moment.
    replacing: bool,
    /// The replacement was put off, since somebody was about to open the disk.
    put_off: bool,
    /// See [`Device::is_leaving`].
    leaving: bool,
    /// All who watch know of it: its number may be given out.
    announced: bool,
    /// When somebody was last told its device number, to open it.
    named: Option<Instant>,
}

impl Shown {
    fn named_lately(&self) -> Option<Duration> {
        QUIET.checked_sub(self.named?.elapsed())
    }

    fn is(&self, rdev: u64) -> bool {
        self.entry.as_ref().is_some_and(|entry| entry.rdev == rdev)
    }

    fn lead(&self, rdev: u64) -> Option<Lead> {
        if self.is(rdev) && !self.replacing {
            return Some(Lead::Present);
        }
        (self.is(rdev) || self.numbers.outgoing.contains(&rdev)).then_some(Lead::Former)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Place {
    /// Not announced yet.
    pub(super) fn new(device: Device) -> Place {
        let shown = Shown { entry: device.entry(), ..Shown::default() };
        Place { device: Mutex::new(device), shown: Mutex::new(shown), published: Condvar::new() }
    }

    /// What it is now, without any wait.
    pub(super) fn shown(&self) -> Option<Entry> {
        lock(&self.shown).entry.clone()
    }

    /// What it is, for somebody who opens it next: not while its disk is being replaced, and that disk
    /// is then left alone for a while.
    pub(super) fn entry_to_open(&self) -> Option<Entry> {
        let mut shown = self.wait_until_published()?;
        shown.named = Some(Instant::now());
        shown.entry.clone()
    }

    /// The same for somebody who does not.
    pub(super) fn published(&self) -> Option<Entry> {
        self.wait_until_published()?.entry.clone()
    }

    /// None: a disk of it is still being replaced. What was published last may name another's disk by now.
    fn wait_until_published(&self) -> Option<MutexGuard<'_, Shown>> {
        let shown = lock(&self.shown);
        let waited = self.published.wait_timeout_while(shown, REPLACED_SOON, |shown| shown.replacing);
        Some(waited.unwrap_or_else(PoisonError::into_inner).0).filter(|shown| !shown.replacing)
    }

    /// How this device number leads to it; none: it does not.
    pub(super) fn lead(&self, rdev: u64) -> Option<Lead> {
        lock(&self.shown).lead(rdev)
    }

    /// This number is that of its disk.
    pub(super) fn is(&self, rdev: u64) -> bool {
        lock(&self.shown).is(rdev)
    }

    /// This number is that of one of its partitions, or of one that was.
    pub(super) fn has_part(&self, rdev: u64) -> bool {
        lock(&self.shown).numbers.parts.contains(&rdev)
    }

    pub(super) fn is_replacing(&self) -> bool {
        lock(&self.shown).replacing
    }

    pub(super) fn is_shown_bound(&self) -> bool {
        lock(&self.shown).entry.as_ref().is_some_and(|entry| entry.bound.is_some())
    }

    /// As it was published: while its disk is being replaced it is not known yet.
    pub(super) fn is_leaving(&self) -> bool {
        self.wait_until_published().is_some_and(|shown| shown.leaving)
    }

    /// From now on nobody is told its device number, and nobody who was told is about to open it.
    /// To be followed by `publish` or `withdraw`.
    pub(super) fn begin_replacing(&self) {
        let mut shown = lock(&self.shown);
        shown.replacing = true;
        let wait = shown.named_lately();
        drop(shown);
        wait.into_iter().for_each(std::thread::sleep);
    }

    /// The same for who looks often: is put off once if somebody is about to open it. False: not now.
    pub(super) fn try_begin_replacing(&self) -> bool {
        let mut shown = lock(&self.shown);
        if !shown.put_off && shown.named_lately().is_some() {
            shown.put_off = true;
            return false;
        }
        shown.put_off = false;
        drop(shown);
        self.begin_replacing();
        true
    }

    /// Shows what has become of it, all at once: who waits for that looks at `leaving` first. True: something has
    /// changed.
    pub(super) fn publish(&self, device: &Device) -> bool {
        let (entry, numbers, leaving) = (device.entry(), device.numbers(), device.is_leaving());
        let mut shown = lock(&self.shown);
        let changed = shown.entry != entry;
        (shown.entry, shown.numbers, shown.leaving) = (entry, numbers, leaving);
        shown.replacing = false;
        drop(shown);
        self.published.notify_all();
        changed
    }

    /// It is gone.
    pub(super) fn withdraw(&self) {
        let mut shown = lock(&self.shown);
        (shown.entry, shown.numbers, shown.leaving) = (None, Numbers::default(), false);
        shown.replacing = false;
        drop(shown);
        self.published.notify_all();
    }

    /// All who watch know of it.
    pub(super) fn announce(&self) {
        lock(&self.shown).announced = true;
        self.published.notify_all();
    }

    /// Waits for that, not long.
    pub(super) fn wait_until_announced(&self) {
        let shown = lock(&self.shown);
        let _ = self.published.wait_timeout_while(shown, REPLACED_SOON, |shown| !shown.announced);
    }

    pub(super) fn lock(&self) -> Answer<MutexGuard<'_, Device>> {
        self.lock_within(OPERATION_PATIENCE)
    }

    pub(super) fn lock_within(&self, patience: Duration) -> Answer<MutexGuard<'_, Device>> {
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

    pub(super) fn disks(&self) -> usize {
        self.device.try_lock().map_or(1, |device| device.disks())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As when the kernel gives a new disk the number of one that another device has let go of.
    #[test]
    fn a_number_is_that_of_the_device_that_has_it_now() {
        let rdev = rustix::fs::makedev(259, 7);
        let former = Numbers { outgoing: vec![rdev], parts: Vec::new() };
        let was = Shown { numbers: former, ..Shown::default() };
        let entry = Entry {
            number: 1,
            rdev,
            generation: 1,
            size: 0,
            block_size: 512,
            bound: None,
            partitions: Vec::new(),
        };
        let mut is = Shown { entry: Some(entry), ..Shown::default() };
        let surest = |is: &Shown| {
            [was.lead(rdev).zip(Some(0)), is.lead(rdev).zip(Some(1))].into_iter().flatten().min()
        };
        assert_eq!(surest(&is), Some((Lead::Present, 1)));
        // What is published of one whose disk is being replaced is not sure either.
        is.replacing = true;
        assert_eq!(is.lead(rdev), Some(Lead::Former));
        assert_eq!(is.lead(rdev + 1), None);
    }
}
