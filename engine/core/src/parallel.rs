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
    let next = AtomicUsize::new(0);
    let run = || {
        while let Some(item) = items.get(next.fetch_add(1, Ordering::Relaxed)) {
            work(item);
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..items.len().min(at_a_time) {
            // If a thread fails to start, the others do its part.
            let _ = std::thread::Builder::new().name(thread_name.to_owned()).spawn_scoped(scope, run);
        }
        run();
    });
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
}
