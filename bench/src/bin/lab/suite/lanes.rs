// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Runs jobs in lanes: each lane takes the next job of one queue. Prints the output of one job at a
//! time.
//!
//! Knows nothing of what a job does.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::vm::Sink;

/// Runs `jobs` in their order, `lanes` at a time, and returns their results in that order. Output
/// goes to `print`: that of the first running job at once, that of others when they end.
pub(super) fn run<J: Sync, T: Send>(
    lanes: usize,
    jobs: &[J],
    print: &(dyn Fn(&[u8]) + Sync),
    body: impl Fn(&J, Sink<'_>) -> T + Sync,
) -> Vec<T> {
    let next = AtomicUsize::new(0);
    let results = Mutex::new(BTreeMap::new());
    let output = Mutex::new(Output::default());
    let lane = || {
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            let Some(job) = jobs.get(number) else { return };
            // Printed under the lock: two lanes may print parts of one job, one after the other.
            let result =
                body(job, &mut |bytes| locked(&output, |output| print(&output.write(number, bytes))));
            locked(&output, |output| print(&output.end(number)));
            locked(&results, |results| results.insert(number, result));
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..lanes {
            scope.spawn(lane);
        }
    });
    results.into_inner().unwrap_or_else(PoisonError::into_inner).into_values().collect()
}

fn locked<T, R>(mutex: &Mutex<T>, body: impl FnOnce(&mut T) -> R) -> R {
    body(&mut mutex.lock().unwrap_or_else(PoisonError::into_inner))
}

/// Output of jobs, in an order that a reader can follow.
#[derive(Default)]
struct Output {
    /// The job whose output is printed as it arrives.
    live: Option<usize>,
    /// Output of other jobs, and whether they have ended.
    held: BTreeMap<usize, (Vec<u8>, bool)>,
}

impl Output {
    /// Takes output of `job`; returns what is to be printed now.
    fn write(&mut self, job: usize, bytes: &[u8]) -> Vec<u8> {
        let held = &mut self.held.entry(job).or_default().0;
        held.extend_from_slice(bytes);
        if *self.live.get_or_insert(job) == job { std::mem::take(held) } else { Vec::new() }
    }

    /// Takes the end of `job`; returns what is to be printed now.
    fn end(&mut self, job: usize) -> Vec<u8> {
        self.held.entry(job).or_default().1 = true;
        if self.live.is_some_and(|live| live != job) {
            return Vec::new();
        }
        let mut said = Vec::new();
        self.held.retain(|_, (bytes, ended)| {
            if *ended {
                said.append(bytes);
            }
            !*ended
        });
        self.live = self.held.keys().next().copied();
        if let Some((bytes, _)) = self.live.and_then(|live| self.held.get_mut(&live)) {
            said.append(bytes);
        }
        said
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;

    use super::*;

    #[test]
    fn results_have_the_order_of_the_jobs() {
        for lanes in 1..5 {
            let said = Mutex::new(Vec::new());
            let print = |bytes: &[u8]| locked(&said, |said: &mut Vec<u8>| said.extend_from_slice(bytes));
            let results = run(lanes, &[3, 1, 2, 0], &print, |job, sink| {
                for _ in 0..3 {
                    sink(format!("{job}").as_bytes());
                    std::thread::sleep(std::time::Duration::from_millis(*job));
                }
                job * 2
            });
            assert_eq!(results, [6, 2, 4, 0]);
            let said = String::from_utf8(said.into_inner().unwrap()).unwrap();
            let whole = |job| said.contains(&format!("{job}{job}{job}"));
            assert!((0..4).all(whole), "mixed: {said}");
        }
    }

    #[test]
    fn lanes_run_at_the_same_time() {
        let all = Barrier::new(3);
        let leaders = run(3, &[(); 3], &|_| {}, |(), _| all.wait().is_leader());
        assert_eq!(leaders.iter().filter(|leader| **leader).count(), 1);
    }

    #[test]
    fn the_first_running_job_prints_at_once() {
        let mut output = Output::default();
        assert_eq!(output.write(0, b"a"), b"a");
        assert_eq!(output.write(1, b"b"), b"");
        assert_eq!(output.write(2, b"c"), b"");
        assert_eq!(output.end(1), b"");
        assert_eq!(output.write(0, b"d"), b"d");
        // The output of the one that ended, then the other becomes the live one.
        assert_eq!(output.end(0), b"bc");
        assert_eq!(output.write(2, b"e"), b"e");
        assert_eq!(output.end(2), b"");
        assert_eq!(output.write(3, b"f"), b"f");
    }
}
