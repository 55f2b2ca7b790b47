//! Looks after last closes, and after renamed files: nobody tells of either.
//!
//! One thread a pool, asleep while no device is bound or waits to be unbound. After a sign that a close is near
//! (LOOP_CLR_FD, a mount, an unmount) it looks often, and then so seldom that all pools together look a
//! few hundred times a second: a look is taken to cost some 15 µs, so that the closes of a handful of devices
//! are seen within 50 ms, those of thousands within a second or so, and half a percent of a CPU is what
//! it costs at the most. Names of bound files are looked up once a second at the most.

use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use super::Pool;
use crate::error::{Error, Result};

/// Between looks after a sign.
const OFTEN: Duration = Duration::from_millis(10);
/// Between looks when there was none for long: the least, the most, and what each device that is waited
/// for adds.
const SELDOM: [Duration; 2] = [Duration::from_millis(20), Duration::from_secs(1)];
const SELDOM_EACH: Duration = Duration::from_millis(3);
/// For so long after a sign looks stay frequent.
const EAGER: Duration = Duration::from_secs(2);

/// Between looks at the names of bound files: the least, the most, and what each bound device adds.
const NAMES: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(30)];
const NAMES_EACH: Duration = Duration::from_millis(3);

/// Devices that wait to be unbound, of all pools of this process.
static AWAITED: AtomicUsize = AtomicUsize::new(0);
/// Bound devices, of all pools of this process.
static BOUND: AtomicUsize = AtomicUsize::new(0);

/// A pool's part of such a number.
struct Part {
    of: &'static AtomicUsize,
    own: usize,
}

impl Part {
    fn set(&mut self, now: usize) {
        self.of.fetch_add(now, Relaxed);
        self.of.fetch_sub(std::mem::replace(&mut self.own, now), Relaxed);
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        self.set(0);
    }
}

/// What a look has found.
#[derive(Clone, Copy, Debug, Default)]
pub struct Round {
    /// Devices that wait to be unbound.
    pub awaited: usize,
    /// Bound devices.
    pub bound: usize,
    /// No device is left, and none will come.
    pub over: bool,
}

/// Between looks for so many devices.
fn pause([least, most]: [Duration; 2], each: Duration, devices: &AtomicUsize) -> Duration {
    each.saturating_mul(u32::try_from(devices.load(Relaxed)).unwrap_or(u32::MAX)).clamp(least, most)
}

/// Wakes the thread.
#[derive(Debug, Default)]
pub struct Reaper(Arc<Signal>);

#[derive(Debug, Default)]
struct Signal {
    signs: Mutex<Signs>,
    changed: Condvar,
}

#[derive(Clone, Copy, Debug, Default)]
struct Signs {
    count: u64,
    over: bool,
}

impl Reaper {
    /// Starts the thread for a pool; it ends with the pool, or with this.
    pub fn start(&self, pool: &Arc<Pool>) -> Result<()> {
        let (signal, weak) = (self.0.clone(), Arc::downgrade(pool));
        std::thread::Builder::new()
            .name("reaper".into())
            .spawn(move || watch(&signal, &weak))
            .map(drop)
            .map_err(|error| Error::os(error, "cannot start a thread"))
    }

    /// A close is near, or there is something new to wait for.
    pub fn wake(&self) {
        self.0.signs.lock().unwrap_or_else(PoisonError::into_inner).count += 1;
        self.0.changed.notify_all();
    }
}

impl Drop for Reaper {
    fn drop(&mut self) {
        self.0.signs.lock().unwrap_or_else(PoisonError::into_inner).over = true;
        self.0.changed.notify_all();
    }
}

impl Signal {
    /// Waits for a sign, at the most so long; none: until there is one. Answers the signs so far.
    fn wait(&self, seen: u64, limit: Option<Duration>) -> Signs {
        let signs = self.signs.lock().unwrap_or_else(PoisonError::into_inner);
        let nothing_new = |signs: &mut Signs| signs.count == seen && !signs.over;
        match limit {
            None => *self.changed.wait_while(signs, nothing_new).unwrap_or_else(PoisonError::into_inner),
            Some(limit) => {
                let waited = self.changed.wait_timeout_while(signs, limit, nothing_new);
                *waited.unwrap_or_else(PoisonError::into_inner).0
            }
        }
    }
}

fn watch(signal: &Signal, pool: &Weak<Pool>) {
    let [mut awaited, mut bound] = [&AWAITED, &BOUND].map(|of| Part { of, own: 0 });
    let mut seen = 0;
    let (mut eager_until, mut named) = (Instant::now(), Instant::now());
    loop {
        let until_names = pause(NAMES, NAMES_EACH, &BOUND).saturating_sub(named.elapsed());
        let until_close = match Instant::now() < eager_until {
            true => OFTEN,
            false => pause(SELDOM, SELDOM_EACH, &AWAITED),
        };
        let limits = [(awaited.own, until_close), (bound.own, until_names)];
        let limit = limits.into_iter().filter(|(devices, _)| *devices > 0).map(|(_, limit)| limit).min();
        let signs = signal.wait(seen, limit);
        if signs.over {
            return;
        }
        if signs.count != seen {
            seen = signs.count;
            eager_until = Instant::now() + EAGER;
        }
        let Some(pool) = pool.upgrade() else { return };
        let names = named.elapsed() >= pause(NAMES, NAMES_EACH, &BOUND);
        if names {
            named = Instant::now();
        }
        let round = pool.reap(names);
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
    fn looks_are_few() {
        for (devices, ms) in [(0, 20), (1, 20), (6, 20), (9, 27), (100, 300), (334, 1000), (1 << 40, 1000)] {
            let pause = pause(SELDOM, SELDOM_EACH, &AtomicUsize::new(devices));
            assert_eq!(pause, Duration::from_millis(ms), "{devices}");
        }
    }
}
