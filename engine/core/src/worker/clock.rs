// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The time of a worker's round: read once, and only in rounds that need it.

use std::cell::Cell;
use std::sync::OnceLock;
use std::time::Instant;

/// See the module.
#[derive(Debug)]
pub struct RoundClock {
    started: Instant,
    now_ns: Cell<Option<u64>>,
}

impl RoundClock {
    /// The clocks of all workers show the same time.
    pub fn start() -> RoundClock {
        static STARTED: OnceLock<Instant> = OnceLock::new();
        RoundClock { started: *STARTED.get_or_init(Instant::now), now_ns: Cell::new(None) }
    }

    /// Forgets the time of the last round.
    pub fn begin_round(&self) {
        self.now_ns.set(None);
    }

    /// Nanoseconds since the first worker's start, the same until the next round.
    pub fn now_ns(&self) -> u64 {
        let now_ns = self.now_ns.get().unwrap_or_else(|| self.started.elapsed().as_nanos() as u64);
        self.now_ns.set(Some(now_ns));
        now_ns
    }
}
