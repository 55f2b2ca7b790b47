//! Whether a worker looks for more work for a moment before it sleeps.
//!
//! A wake-up is most of what a lone request costs, so looking pays when the next one comes soon, and
//! only then: not when requests come many at a time, and not when whoever would send the next one
//! waits for this very CPU. Decides by what came of it; knows no clock and no ring.

use std::time::Duration;

/// Completions of a round up to which requests count as lone.
const FEW: usize = 2;
/// Rounds that are slept through at the most before looking is tried again.
const SKIP_MAX: u32 = 4096;

/// The decision, and what it learns from.
#[derive(Debug)]
pub struct Poll {
    window: Duration,
    /// Rounds to sleep through.
    skip: u32,
    /// What `skip` becomes when looking was in vain.
    penalty: u32,
}

impl Poll {
    /// Looks for `window` at the most; zero: never.
    pub fn new(window: Duration) -> Self {
        Self { window, skip: 0, penalty: 1 }
    }

    /// For how long to look after a round with so many completions; none: sleep at once.
    pub fn after(&mut self, completions: usize) -> Option<Duration> {
        if self.window.is_zero() || !(1..=FEW).contains(&completions) {
            return None;
        }
        if self.skip > 0 {
            self.skip -= 1;
            return None;
        }
        Some(self.window)
    }

    /// What came of looking.
    pub fn learn(&mut self, found: bool) {
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
    fn looking_that_never_pays_becomes_rare_and_paying_keeps_it() {
        let window = Duration::from_micros(20);
        let mut poll = Poll::new(window);
        let mut looks = |rounds: u32, found: bool| {
            (0..rounds).filter(|_| poll.after(1).inspect(|_| poll.learn(found)).is_some()).count()
        };
        assert_eq!(looks(1000, true), 1000);
        assert!(looks(10_000, false) < 20);
        // Fortunes change: it finds out within as many rounds as it sleeps through.
        assert!(looks(20_000, true) > 10_000);
    }

    #[test]
    fn many_at_a_time_or_none_or_switched_off_is_slept_on() {
        let mut poll = Poll::new(Duration::from_micros(20));
        assert_eq!((poll.after(0), poll.after(FEW + 1)), (None, None));
        assert_eq!(Poll::new(Duration::ZERO).after(1), None);
    }
}
