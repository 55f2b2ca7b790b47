//! Looks after last closes: the driver does not tell of them.
//!
//! One thread a pool, asleep while no device waits to be unbound. After a sign that a close is near
//! (LOOP_CLR_FD, a mount, an unmount) it looks often, then less and less: a device that stays mounted
//! for days costs one look a second.

use std::sync::{Arc, Condvar, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use super::Pool;
use crate::error::{Error, Result};

/// Between looks after a sign.
const OFTEN: Duration = Duration::from_millis(10);
/// Between looks when there was none for long.
const SELDOM: Duration = Duration::from_secs(1);
/// For so long after a sign looks stay frequent.
const EAGER: Duration = Duration::from_secs(2);

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
    let (mut seen, mut waiting) = (0, false);
    let mut eager_until = Instant::now();
    let mut pause = OFTEN;
    loop {
        let signs = signal.wait(seen, waiting.then_some(pause));
        if signs.over {
            return;
        }
        if signs.count != seen {
            seen = signs.count;
            eager_until = Instant::now() + EAGER;
        }
        pause = if Instant::now() < eager_until { OFTEN } else { (pause * 2).min(SELDOM) };
        let Some(pool) = pool.upgrade() else { return };
        let over;
        (waiting, over) = pool.reap();
        if over {
            return;
        }
    }
}
