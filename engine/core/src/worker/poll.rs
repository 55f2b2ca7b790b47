// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Adaptive busy polling of a worker before it sleeps.
//!
//! A wake-up is most of the cost of an isolated request. Polling therefore pays off if the next
//! request arrives soon. It does not pay off for batches, or if the sender needs this very CPU. The
//! decision depends on recent results only; it uses no clock and no ring.

use std::time::Duration;

/// Completions per round up to which requests count as isolated.
const ISOLATED_MAX: usize = 2;
/// Maximum number of rounds without polling before the next attempt.
const SKIP_MAX: u32 = 4096;

/// The polling decision and its history.
#[derive(Debug)]
pub struct BusyPoll {
    window: Duration,
    /// Rounds left without polling.
    skip: u32,
    /// Next value of `skip` after a poll that found nothing.
    penalty: u32,
}

impl BusyPoll {
    /// Polls for at most `window`; zero disables polling.
    pub fn new(window: Duration) -> Self {
        Self { window, skip: 0, penalty: 1 }
    }

    /// How long to poll after a round with this many completions; none: sleep at once.
    pub fn window_after(&mut self, completions: usize) -> Option<Duration> {
        if self.window.is_zero() || !(1..=ISOLATED_MAX).contains(&completions) {
            return None;
        }
        if self.skip > 0 {
            self.skip -= 1;
            return None;
        }
        Some(self.window)
    }

    /// Records whether polling found work.
    pub fn record(&mut self, found: bool) {
        if found {
            self.penalty = (self.penalty / 2).max(1);
        } else {
            self.skip = self.penalty;
            self.penalty = (self.penalty * 2).min(SKIP_MAX);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unsuccessful_polling_backs_off_and_successful_polling_continues() {
        let window = Duration::from_micros(20);
        let mut poll = BusyPoll::new(window);
        let mut polls = |rounds: u32, found: bool| {
            (0..rounds).filter(|_| poll.window_after(1).inspect(|_| poll.record(found)).is_some()).count()
        };
        assert_eq!(polls(1000, true), 1000);
        assert!(polls(10_000, false) < 20);
        // It adapts again within as many rounds as it skips.
        assert!(polls(20_000, true) > 10_000);
    }

    #[test]
    fn does_not_poll_after_batches_without_completions_or_when_disabled() {
        let mut poll = BusyPoll::new(Duration::from_micros(20));
        assert_eq!((poll.window_after(0), poll.window_after(ISOLATED_MAX + 1)), (None, None));
        assert_eq!(BusyPoll::new(Duration::ZERO).window_after(1), None);
    }
}
