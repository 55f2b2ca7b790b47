//! Looks after last closes: the driver does not tell of them.
//!
//! One thread a pool, asleep while no device waits to be unbound. After a sign that a close is near
//! (LOOP_CLR_FD, a mount, an unmount) it looks often, and then so seldom that all pools together look a
//! few hundred times a second: a look is taken to cost some 15 µs, so that the closes of a handful of devices
//! are seen within 50 ms, those of thousands within a second or so, and half a percent of a CPU is what
//! it costs at the most.

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

/// Devices that wait to be unbound, of all pools of this process.
static AWAITED: AtomicUsize = AtomicUsize::new(0);

/// A pool's part of them.
#[derive(Default)]
struct Awaited(usize);

impl Awaited {
    fn set(&mut self, now: usize) {
        AWAITED.fetch_add(now, Relaxed);
        AWAITED.fetch_sub(std::mem::replace(&mut self.0, now), Relaxed);
    }
}

impl Drop for Awaited {
    fn drop(&mut self) {
        self.set(0);
    }
}

/// Between looks when there was no sign for long, with so many devices awaited.
fn seldom(awaited: usize) -> Duration {
    let [least, most] = SELDOM;
    SELDOM_EACH.saturating_mul(u32::try_from(awaited).unwrap_or(u32::MAX)).clamp(least, most)
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
    let (mut seen, mut awaited) = (0, Awaited::default());
    let mut eager_until = Instant::now();
    loop {
        let pause = if Instant::now() < eager_until { OFTEN } else { seldom(AWAITED.load(Relaxed)) };
        let signs = signal.wait(seen, (awaited.0 > 0).then_some(pause));
        if signs.over {
            return;
        }
        if signs.count != seen {
            seen = signs.count;
            eager_until = Instant::now() + EAGER;
        }
        let Some(pool) = pool.upgrade() else { return };
        let (waiting, over) = pool.reap();
        awaited.set(waiting);
        if over {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn looks_are_few() {
        for (awaited, ms) in [(0, 20), (1, 20), (6, 20), (9, 27), (100, 300), (334, 1000), (1 << 40, 1000)] {
            assert_eq!(seldom(awaited), Duration::from_millis(ms), "{awaited}");
        }
    }
}
