// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Polls for last closes of ublk disks and for renamed backing files: the kernel reports neither.
//!
//! The polls of all pools share the threads of `event_threads`: each pool has the time of its next
//! poll, and none while no device is bound or waits for its last close. The kernel's loop driver
//! reports the last close of its disks (`Pools` listens): they need no poll. After a
//! hint that a close is near (LOOP_CLR_FD, a mount, an unmount) it polls every 10 ms for two
//! seconds. Then the interval grows with the devices that wait, of all pools together. One poll of
//! a device takes about 15 µs. So the last closes of a handful of devices are detected within 50 ms
//! and those of thousands within about a second, at half a percent of a CPU at most. Where the kernel
//! reports signs of closes (`close_signs`), the interval also grows with the time since the last sign
//! or hint, up to a second. The paths of bound files are read when inotify reports a change, and every
//! second at most.

use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use super::Pool;
use crate::error::Result;
use crate::event_threads::{EventSource, EventThreads, Next, SourceHandle};

/// Poll interval after a hint.
const FAST_INTERVAL: Duration = Duration::from_millis(10);
/// Poll interval without a recent hint: minimum, maximum, and the increment per waiting device.
const SLOW_INTERVAL: [Duration; 2] = [Duration::from_millis(20), Duration::from_secs(1)];
const SLOW_PER_DEVICE: Duration = Duration::from_millis(3);
/// Without a sign the interval is at least this part of the time since the last one: an unmount that
/// writes back for ten seconds is noticed half a second after its end.
const QUIET_PART: u32 = 20;
/// The first poll after a node was closed: the kernel reports that before it closes the disk.
const NODE_DELAY: Duration = Duration::from_millis(2);
/// Polls after a report: the driver sends it before it has unbound the disk. The first interval; each
/// is twice the one before, up to the last.
const REPORT_INTERVAL: [Duration; 2] = [Duration::from_millis(1), Duration::from_millis(128)];
/// How long a pool is polled often after a hint.
const FAST_FOR: Duration = Duration::from_secs(2);

/// Interval at which the paths of bound files are read: minimum, maximum, increment per bound
/// device.
const NAMES_INTERVAL: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(30)];
const NAMES_PER_DEVICE: Duration = Duration::from_millis(3);
/// The same after inotify has reported a change, for this number of reads: the kernel reports an
/// unlink before the path shows it.
const CHANGED_NAMES_INTERVAL: Duration = Duration::from_millis(5);
const CHANGED_NAMES_READS: u32 = 3;

/// Devices that wait for their last close, of all pools of this process.
static AWAITED: AtomicUsize = AtomicUsize::new(0);
/// Bound devices, of all pools of this process.
static BOUND: AtomicUsize = AtomicUsize::new(0);

/// The share of one pool in a global count.
#[derive(Debug)]
struct CountShare {
    of: &'static AtomicUsize,
    count: usize,
}

impl CountShare {
    fn set(&mut self, now: usize) {
        self.of.fetch_add(now, Relaxed);
        self.of.fetch_sub(std::mem::replace(&mut self.count, now), Relaxed);
    }
}

impl Drop for CountShare {
    fn drop(&mut self) {
        self.set(0);
    }
}

/// The result of one poll.
#[derive(Clone, Copy, Debug, Default)]
pub struct PollResult {
    /// Devices whose last close only a poll detects.
    pub awaited: usize,
    /// Bound devices.
    pub bound: usize,
    /// The pool is ending. Its devices need not wait for a last close that has signs.
    pub ending: bool,
    /// The pool has ended: it has no device and creates none.
    pub over: bool,
}

/// The poll interval for this number of devices.
fn pause([min, max]: [Duration; 2], per_device: Duration, devices: &AtomicUsize) -> Duration {
    per_device.saturating_mul(u32::try_from(devices.load(Relaxed)).unwrap_or(u32::MAX)).clamp(min, max)
}

/// Controls the polls of a pool.
#[derive(Debug, Default)]
pub struct CloseWatcher(Arc<Waker>);

/// Wakes the close watcher of a pool.
#[derive(Clone, Debug, Default)]
pub struct PoolWaker(Arc<Waker>);

impl PartialEq for PoolWaker {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl PoolWaker {
    /// A bound file may have another name.
    pub fn read_names(&self) {
        self.0.change(|wake_state| wake_state.names += 1);
    }

    /// From now on the kernel's signs of last closes are passed on.
    pub fn expect_signs(&self) {
        self.0.lock().has_signs = true;
    }

    /// They are not passed on any more.
    pub fn lose_signs(&self) {
        self.0.lock().has_signs = false;
    }

    /// A node of the pool is being closed.
    pub fn node_closed(&self) {
        self.sign(NODE_DELAY);
    }

    /// A device of some pool is perhaps being closed: another tenant must not cause many polls.
    pub fn some_pool_closes(&self) {
        self.sign(pause(SLOW_INTERVAL, SLOW_PER_DEVICE, &AWAITED));
    }

    fn sign(&self, delay: Duration) {
        let mut wake_state = self.0.lock();
        if wake_state.awaits_close {
            wake_state.seen.signs += 1;
            wake_state.polls.iter().for_each(|polls| polls.schedule(Instant::now() + delay));
        }
    }
}

#[derive(Debug, Default)]
struct Waker(Mutex<WakeState>);

#[derive(Debug, Default)]
struct WakeState {
    seen: WakeCounts,
    /// None before the start.
    polls: Option<SourceHandle>,
    /// See [`PoolWaker::expect_signs`].
    has_signs: bool,
    /// A device waited for its last close at the last poll. One that begins to wait wakes the close
    /// watcher.
    awaits_close: bool,
}

/// Hints, signs, reports of the driver, and changes of names.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct WakeCounts {
    count: u64,
    signs: u64,
    reports: u64,
    names: u64,
}

impl CloseWatcher {
    /// Starts the polls of a pool. They end with the pool, or when this is dropped.
    pub fn start(&self, pool: &Arc<Pool>) -> Result<()> {
        let watch = CloseWatch {
            waker: Arc::clone(&self.0),
            pool: Arc::downgrade(pool),
            progress: Mutex::new(PollProgress::new()),
        };
        let polls = EventThreads::shared()?.add(Arc::new(watch))?;
        let mut wake_state = self.0.lock();
        if wake_state.seen != WakeCounts::default() {
            polls.schedule(Instant::now());
        }
        wake_state.polls = Some(polls);
        Ok(())
    }

    /// Wakes the close watcher from elsewhere.
    pub fn waker(&self) -> PoolWaker {
        PoolWaker(Arc::clone(&self.0))
    }

    /// A close is near, or another device waits for its last close.
    pub fn wake(&self) {
        self.0.change(|wake_state| wake_state.count += 1);
    }

    /// The driver has reported a change of a disk.
    pub fn report(&self) {
        self.0.change(|wake_state| wake_state.reports += 1);
    }
}

impl Pool {
    /// The kernel's loop driver has changed one of its devices; None: perhaps all. Only last closes
    /// matter. A device that begins to wait for one wakes the close watcher.
    pub fn report_change(&self, number: Option<u32>) {
        let is_ours = number.is_none_or(|number| self.allocator.has_kernel_loop(number));
        let matters = || match self.is_ending() {
            false => self.all_slots().iter().any(|(_, slot)| slot.awaits_close()),
            // Otherwise a thread removes its devices, and polls afterwards.
            true => self.removing.try_lock().is_ok(),
        };
        if is_ours && matters() {
            self.close_watcher.report();
        }
    }
}

impl Drop for CloseWatcher {
    fn drop(&mut self) {
        if let Some(polls) = self.0.lock().polls.take() {
            polls.remove();
        }
    }
}

impl Waker {
    fn lock(&self) -> MutexGuard<'_, WakeState> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Records a change and polls at once.
    fn change(&self, change: impl FnOnce(&mut WakeCounts)) {
        let mut wake_state = self.lock();
        change(&mut wake_state.seen);
        if let Some(polls) = &wake_state.polls {
            polls.schedule(Instant::now());
        }
    }
}

/// The polls of one pool.
struct CloseWatch {
    waker: Arc<Waker>,
    pool: Weak<Pool>,
    progress: Mutex<PollProgress>,
}

/// What one poll leaves for the next.
#[derive(Debug)]
struct PollProgress {
    awaited: CountShare,
    bound: CountShare,
    seen: WakeCounts,
    after_report: Option<Duration>,
    /// Reads of the names that follow a change.
    reads: u32,
    fast_until: Instant,
    /// The last hint, sign or report.
    last_sign: Instant,
    /// Whether polls become rare without a sign.
    backs_off: bool,
    /// When the names were read.
    named: Instant,
}

impl EventSource for CloseWatch {
    fn due(&self) -> Next {
        let mut progress = self.progress.lock().unwrap_or_else(PoisonError::into_inner);
        let wake_state = self.waker.lock();
        let has_signs = wake_state.has_signs;
        progress.take_up(wake_state.seen);
        drop(wake_state);
        let Some(pool) = self.pool.upgrade() else { return Next::End };
        let names = progress.reads_names();
        let round = pool.poll_closes(names);
        progress.awaited.set(round.awaited);
        progress.bound.set(round.bound);
        progress.backs_off = has_signs && !round.ending;
        self.waker.lock().awaits_close = round.awaited > 0;
        match round.over {
            true => Next::End,
            false => Next::Continue(progress.next()),
        }
    }
}

impl PollProgress {
    fn new() -> PollProgress {
        let [awaited, bound] = [&AWAITED, &BOUND].map(|of| CountShare { of, count: 0 });
        let (seen, now) = (WakeCounts::default(), Instant::now());
        PollProgress {
            awaited,
            bound,
            seen,
            after_report: None,
            reads: 0,
            fast_until: now,
            last_sign: now,
            backs_off: false,
            named: now,
        }
    }

    fn take_up(&mut self, now: WakeCounts) {
        if now.count != self.seen.count {
            self.fast_until = Instant::now() + FAST_FOR;
        }
        let known = WakeCounts { names: now.names, ..self.seen };
        if now != known {
            self.last_sign = Instant::now();
        }
        self.after_report = match now.reports != self.seen.reports {
            true => Some(REPORT_INTERVAL[0]),
            false => {
                self.after_report.map(|interval| interval * 2).filter(|next| *next <= REPORT_INTERVAL[1])
            }
        };
        if now.names != self.seen.names {
            self.reads = CHANGED_NAMES_READS;
        }
        self.seen = now;
    }

    fn names_interval(&self) -> Duration {
        match self.reads {
            0 => pause(NAMES_INTERVAL, NAMES_PER_DEVICE, &BOUND),
            _ => CHANGED_NAMES_INTERVAL,
        }
    }

    /// Whether this poll reads the names.
    fn reads_names(&mut self) -> bool {
        let reads = self.named.elapsed() >= self.names_interval();
        if reads {
            (self.named, self.reads) = (Instant::now(), self.reads.saturating_sub(1));
        }
        reads
    }

    /// When the next poll is due.
    fn next(&self) -> Option<Instant> {
        let now = Instant::now();
        let until_names = self.names_interval().saturating_sub(self.named.elapsed());
        let slow = pause(SLOW_INTERVAL, SLOW_PER_DEVICE, &AWAITED);
        let until_close = match now < self.fast_until {
            true => FAST_INTERVAL,
            false if self.backs_off => slow.max((now - self.last_sign) / QUIET_PART).min(SLOW_INTERVAL[1]),
            false => slow,
        };
        let limits = [(self.awaited.count, until_close), (self.bound.count, until_names)];
        let limits = limits.into_iter().filter(|(devices, _)| *devices > 0).map(|(_, limit)| limit);
        limits.chain(self.after_report).min().map(|limit| now + limit)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn poll_interval_grows_with_the_devices() {
        for (devices, ms) in [(0, 20), (1, 20), (6, 20), (9, 27), (100, 300), (334, 1000), (1 << 40, 1000)] {
            let pause = pause(SLOW_INTERVAL, SLOW_PER_DEVICE, &AtomicUsize::new(devices));
            assert_eq!(pause, Duration::from_millis(ms), "{devices}");
        }
    }
}
