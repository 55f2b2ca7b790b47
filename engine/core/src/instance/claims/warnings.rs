// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Rate limit for warnings about pool bindings: a tenant that keeps binding must not fill the log.
//!
//! Knows users, pools, images and times; does not know the messages.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::PoolLabel;
use crate::image::Identity;

/// At most one warning per pool and image in this time,
const INTERVAL: Duration = Duration::from_secs(60);
/// this many per user,
const PER_USER: usize = 16;
/// and this many in total.
const IN_ALL: usize = 1024;

/// The warnings of the last minute, the oldest first.
pub struct RecentWarnings(VecDeque<(Instant, Arc<PoolLabel>, Identity)>);

static LATELY: Mutex<RecentWarnings> = Mutex::new(RecentWarnings::new());

/// Whether a warning about this binding may be logged now.
pub fn may_warn(pool: &Arc<PoolLabel>, image: Identity) -> bool {
    LATELY.lock().unwrap_or_else(PoisonError::into_inner).may_warn(pool, image, Instant::now())
}

impl RecentWarnings {
    const fn new() -> RecentWarnings {
        RecentWarnings(VecDeque::new())
    }

    fn may_warn(&mut self, pool: &Arc<PoolLabel>, image: Identity, now: Instant) -> bool {
        while self.0.front().is_some_and(|(at, ..)| now.saturating_duration_since(*at) >= INTERVAL) {
            self.0.pop_front();
        }
        let of_user = self.0.iter().filter(|(_, other, _)| other.uid == pool.uid).count();
        let again = self.0.iter().any(|(_, other, had)| (other, had) == (pool, &image));
        let may = !again && of_user < PER_USER && self.0.len() < IN_ALL;
        if may {
            self.0.push_back((now, Arc::clone(pool), image));
        }
        may
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_warnings_per_pool_image_and_user() {
        let pool = |name: &str, uid| Arc::new(PoolLabel { name: name.to_owned(), uid });
        let image = |ino| Identity { dev: 1, ino, rdev: 0, btime_ns: 0 };
        let (mut warnings, now) = (RecentWarnings::new(), Instant::now());
        assert!(warnings.may_warn(&pool("a", 1000), image(0), now));
        assert!(!warnings.may_warn(&pool("a", 1000), image(0), now + INTERVAL / 2));
        assert!(warnings.may_warn(&pool("b", 1000), image(0), now));
        assert!(warnings.may_warn(&pool("a", 1000), image(0), now + INTERVAL));
        let more = (1..100).filter(|ino| warnings.may_warn(&pool("a", 1000), image(*ino), now + INTERVAL));
        assert_eq!(more.count(), PER_USER - 1);
        assert!(warnings.may_warn(&pool("c", 1001), image(0), now + INTERVAL));
        let more =
            (0..2000).filter(|uid| warnings.may_warn(&pool("d", 2000 + uid), image(0), now + INTERVAL));
        assert_eq!(more.count(), IN_ALL - PER_USER - 1);
    }
}
