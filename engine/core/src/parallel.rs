// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The same work for many items, several at a time: calls that wait for the kernel more than they
//! compute.
//!
//! Knows threads. Does not know what the work is.

use std::sync::atomic::{AtomicUsize, Ordering};

/// Calls `work` for each item, for `at_a_time` at a time. Returns when all calls have returned.
pub fn for_each<'a, T: Sync>(
    thread_name: &str,
    at_a_time: usize,
    items: &'a [T],
    work: impl Fn(&'a T) + Sync,
) {
    Helpers::new(at_a_time.saturating_sub(1)).for_each(thread_name, items, work);
}

/// Bounds the threads that several callers start together.
#[derive(Debug)]
pub struct Helpers {
    free: AtomicUsize,
}

impl Helpers {
    /// At most `max` threads at a time.
    pub const fn new(max: usize) -> Helpers {
        Helpers { free: AtomicUsize::new(max) }
    }

    /// Calls `work` for each item, on this thread and on those that are free: also on one that another
    /// caller gives back meanwhile. Returns when all calls have returned.
    pub fn for_each<'a, T: Sync>(&self, thread_name: &str, items: &'a [T], work: impl Fn(&'a T) + Sync) {
        let next = AtomicUsize::new(0);
        let take = || items.get(next.fetch_add(1, Ordering::Relaxed));
        let run = |first| std::iter::successors(Some(first), |_| take()).for_each(&work);
        std::thread::scope(|scope| {
            while let Some(item) = take() {
                // This thread does the last item itself.
                let helper = if next.load(Ordering::Relaxed) < items.len() { self.take() } else { None };
                let started = helper.is_some_and(|helper| {
                    let help = move || {
                        let _helper = helper;
                        run(item);
                    };
                    let thread = std::thread::Builder::new().name(thread_name.to_owned());
                    thread.spawn_scoped(scope, help).is_ok()
                });
                if !started {
                    work(item);
                }
            }
        });
    }

    fn take(&self) -> Option<Helper<'_>> {
        let taken = self.free.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |free| free.checked_sub(1));
        taken.is_ok().then(|| Helper(self))
    }
}

/// One thread of [`Helpers`].
struct Helper<'a>(&'a Helpers);

impl Drop for Helper<'_> {
    fn drop(&mut self) {
        self.0.free.fetch_add(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn works_on_each_item_once() {
        for count in [0, 1, 3, 100] {
            let done: Vec<AtomicUsize> = (0..count).map(|_| AtomicUsize::new(0)).collect();
            for_each("test", 4, &done, |item| {
                item.fetch_add(1, Ordering::Relaxed);
            });
            assert!(done.iter().all(|item| item.load(Ordering::Relaxed) == 1), "{count} items");
        }
    }

    /// Two callers share the threads, and each goes on without.
    #[test]
    fn callers_share_helpers() {
        let helpers = Helpers::new(3);
        let (running, peak, done) = (AtomicUsize::new(0), AtomicUsize::new(0), AtomicUsize::new(0));
        let call = || {
            helpers.for_each("test", &[(); 50], |()| {
                peak.fetch_max(running.fetch_add(1, Ordering::Relaxed) + 1, Ordering::Relaxed);
                std::thread::sleep(std::time::Duration::from_millis(1));
                running.fetch_sub(1, Ordering::Relaxed);
                done.fetch_add(1, Ordering::Relaxed);
            });
        };
        std::thread::scope(|scope| {
            scope.spawn(call);
            scope.spawn(call);
        });
        assert_eq!(done.into_inner(), 100);
        assert!((2..=2 + 3).contains(&peak.into_inner()));
        assert_eq!(helpers.free.into_inner(), 3, "all are given back");
    }

    /// Another caller has all threads when the call begins.
    #[test]
    fn takes_a_helper_that_becomes_free() {
        let helpers = Helpers::new(1);
        let taken = std::sync::Mutex::new(helpers.take());
        let threads = std::sync::Mutex::new(std::collections::BTreeSet::new());
        helpers.for_each("test", &[(); 20], |()| {
            drop(taken.lock().unwrap().take());
            std::thread::sleep(std::time::Duration::from_millis(5));
            threads.lock().unwrap().insert(format!("{:?}", std::thread::current().id()));
        });
        assert_eq!(threads.into_inner().unwrap().len(), 2);
    }
}
