//! Which warnings about bindings of pools were given lately: a tenant that keeps binding must not fill the log.
//!
//! Knows users, pools, images and when; does not know what was said.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::PoolName;
use crate::image::Identity;

/// A pool has one warning for an image in so much time,
const QUIET: Duration = Duration::from_secs(60);
/// its user so many for all pools and images,
const PER_USER: usize = 16;
/// and everybody together so many.
const IN_ALL: usize = 1024;

/// Warnings of the last minute, the oldest first.
pub struct Said(VecDeque<(Instant, Arc<PoolName>, Identity)>);

static LATELY: Mutex<Said> = Mutex::new(Said::new());

/// May the log have a warning about this binding now?
pub fn may_say(pool: &Arc<PoolName>, image: Identity) -> bool {
    LATELY.lock().unwrap_or_else(PoisonError::into_inner).may_say(pool, image, Instant::now())
}

impl Said {
    const fn new() -> Said {
        Said(VecDeque::new())
    }

    fn may_say(&mut self, pool: &Arc<PoolName>, image: Identity, now: Instant) -> bool {
        while self.0.front().is_some_and(|(at, ..)| now.saturating_duration_since(*at) >= QUIET) {
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
    fn once_for_each_pool_and_image_in_a_minute_and_not_too_often_for_a_user() {
        let pool = |name: &str, uid| Arc::new(PoolName { name: name.to_owned(), uid });
        let image = |ino| Identity { dev: 1, ino, rdev: 0, born_ns: 0 };
        let (mut said, now) = (Said::new(), Instant::now());
        assert!(said.may_say(&pool("a", 1000), image(0), now));
        assert!(!said.may_say(&pool("a", 1000), image(0), now + QUIET / 2));
        assert!(said.may_say(&pool("b", 1000), image(0), now));
        assert!(said.may_say(&pool("a", 1000), image(0), now + QUIET));
        let more = (1..100).filter(|ino| said.may_say(&pool("a", 1000), image(*ino), now + QUIET));
        assert_eq!(more.count(), PER_USER - 1);
        assert!(said.may_say(&pool("c", 1001), image(0), now + QUIET));
        let more = (0..2000).filter(|uid| said.may_say(&pool("d", 2000 + uid), image(0), now + QUIET));
        assert_eq!(more.count(), IN_ALL - PER_USER - 1);
    }
}
