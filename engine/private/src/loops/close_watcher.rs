// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Polls for last closes of ublk disks and for renamed backing files: the kernel reports neither.
//!
//! One thread per pool. It sleeps while no device is bound or waits for its last close. The kernel's
//! loop driver reports the last close of its disks (`Pools` listens): they need no poll. After a
//! hint that a close is near (LOOP_CLR_FD, a mount, an unmount) it polls every 10 ms for two
//! seconds. Then the interval grows with the devices that wait, of all pools together. One poll of
//! a device takes about 15 µs. So the last closes of a handful of devices are detected within 50 ms
//! and those of thousands within about a second, at half a percent of a CPU at most. The paths of
//! bound files are read when inotify reports a change, and every second at most.

use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use super::Pool;
use crate::error::{Error, Result};

/// Poll interval after a hint.
const FAST_INTERVAL: Duration = Duration::from_millis(10);
/// Poll interval without a recent hint: minimum, maximum, and the increment per waiting device.
const SLOW_INTERVAL: [Duration; 2] = [Duration::from_millis(20), Duration::from_secs(1)];
const SLOW_PER_DEVICE: Duration = Duration::from_millis(3);
/// Polls after a report: the driver sends it before it has unbound the disk. The first interval; each
/// is twice the one before, up to the last.
const REPORT_INTERVAL: [Duration; 2] = [Duration::from_millis(1), Duration::from_millis(128)];
/// How long the thread polls often after a hint.
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
    /// The pool has ended: it has no device and creates none.
    pub over: bool,
}

/// The poll interval for this number of devices.
fn pause([min, max]: [Duration; 2], per_device: Duration, devices: &AtomicUsize) -> Duration {
    per_device.saturating_mul(u32::try_from(devices.load(Relaxed)).unwrap_or(u32::MAX)).clamp(min, max)
}

/// Controls the thread of a pool.
#[derive(Debug, Default)]
pub struct CloseWatcher(Arc<Waker>);

/// Wakes the thread of a pool.
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
        self.0.wake_state.lock().unwrap_or_else(PoisonError::into_inner).names += 1;
        self.0.changed.notify_all();
    }
}

#[derive(Debug, Default)]
struct Waker {
    wake_state: Mutex<WakeState>,
    changed: Condvar,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct WakeState {
    /// Hints, reports of the driver, and changes of names.
    count: u64,
    reports: u64,
    names: u64,
    over: bool,
}

impl CloseWatcher {
    /// Starts the thread of a pool. It ends with the pool, or when this is dropped.
    pub fn start(&self, pool: &Arc<Pool>) -> Result<()> {
        let (signal, weak) = (self.0.clone(), Arc::downgrade(pool));
        std::thread::Builder::new()
            .name("close-watcher".into())
            .spawn(move || watch(&signal, &weak))
            .map(drop)
            .map_err(|error| Error::os(error, "cannot start a thread"))
    }

    /// Wakes the thread from elsewhere.
    pub fn waker(&self) -> PoolWaker {
        PoolWaker(Arc::clone(&self.0))
    }

    /// A close is near, or another device waits for its last close.
    pub fn wake(&self) {
        self.0.wake_state.lock().unwrap_or_else(PoisonError::into_inner).count += 1;
        self.0.changed.notify_all();
    }

    /// The driver has reported a change of a disk.
    pub fn report(&self) {
        self.0.wake_state.lock().unwrap_or_else(PoisonError::into_inner).reports += 1;
        self.0.changed.notify_all();
    }
}

impl Drop for CloseWatcher {
    fn drop(&mut self) {
        self.0.wake_state.lock().unwrap_or_else(PoisonError::into_inner).over = true;
        self.0.changed.notify_all();
    }
}

impl Waker {
    /// Waits for a hint or a report, at most for `limit`.
    fn wait(&self, seen: WakeState, limit: Option<Duration>) -> WakeState {
        let wake_state = self.wake_state.lock().unwrap_or_else(PoisonError::into_inner);
        let nothing_new = |wake_state: &mut WakeState| *wake_state == seen;
        match limit {
            None => *self.changed.wait_while(wake_state, nothing_new).unwrap_or_else(PoisonError::into_inner),
            Some(limit) => {
                let waited = self.changed.wait_timeout_while(wake_state, limit, nothing_new);
                *waited.unwrap_or_else(PoisonError::into_inner).0
            }
        }
    }
}

fn watch(signal: &Waker, pool: &Weak<Pool>) {
    let [mut awaited, mut bound] = [&AWAITED, &BOUND].map(|of| CountShare { of, count: 0 });
    let mut seen = WakeState::default();
    let mut after_report: Option<Duration> = None;
    let mut reads = 0;
    let (mut fast_until, mut named) = (Instant::now(), Instant::now());
    loop {
        let names_interval = |reads: u32| match reads {
            0 => pause(NAMES_INTERVAL, NAMES_PER_DEVICE, &BOUND),
            _ => CHANGED_NAMES_INTERVAL,
        };
        let until_names = names_interval(reads).saturating_sub(named.elapsed());
        let until_close = match Instant::now() < fast_until {
            true => FAST_INTERVAL,
            false => pause(SLOW_INTERVAL, SLOW_PER_DEVICE, &AWAITED),
        };
        let limits = [(awaited.count, until_close), (bound.count, until_names)];
        let limits = limits.into_iter().filter(|(devices, _)| *devices > 0).map(|(_, limit)| limit);
        let limit = limits.chain(after_report).min();
        let wake_state = signal.wait(seen, limit);
        if wake_state.over {
            return;
        }
        if wake_state.count != seen.count {
            fast_until = Instant::now() + FAST_FOR;
        }
        after_report = match wake_state.reports != seen.reports {
            true => Some(REPORT_INTERVAL[0]),
            false => after_report.map(|interval| interval * 2).filter(|next| *next <= REPORT_INTERVAL[1]),
        };
        if wake_state.names != seen.names {
            reads = CHANGED_NAMES_READS;
        }
        seen = wake_state;
        let Some(pool) = pool.upgrade() else { return };
        let names = named.elapsed() >= names_interval(reads);
        if names {
            (named, reads) = (Instant::now(), reads.saturating_sub(1));
        }
        let round = pool.poll_closes(names);
        awaited.set(round.awaited);
        bound.set(round.bound);
        if round.over {
            return;
        }
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
