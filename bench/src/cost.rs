// SPDX-License-Identifier: Apache-2.0 OR MIT
//! CPU time and context switches of all threads of a process.
//!
//! Reads /proc. Worker threads of io_uring are threads of the process.

use std::collections::BTreeMap;
use std::fs;

use serde::{Deserialize, Serialize};

/// CPU time and context switches of a thread.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Account {
    cpu_ns: u64,
    switches: u64,
}

/// Accounts of a process at one moment, by thread.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reading(BTreeMap<u32, Account>);

/// Difference between two readings.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Spent {
    pub cpu_ns: u64,
    pub switches: u64,
    /// Requests that went to a kernel worker thread, from the engine's statistics.
    #[serde(default)]
    pub punts: Option<u64>,
}

impl Reading {
    /// Reads the accounts of process `pid`; empty if the process has ended.
    pub fn of(pid: u32) -> Reading {
        let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
        let account = |task: fs::DirEntry| {
            let thread: u32 = task.file_name().to_string_lossy().parse().ok()?;
            let read = |name: &str| fs::read_to_string(task.path().join(name)).ok();
            let cpu_ns = read("schedstat")?.split(' ').next()?.parse().ok()?;
            Some((thread, Account { cpu_ns, switches: switches(&read("status")?) }))
        };
        Reading(tasks.filter_map(account).collect())
    }

    /// The difference to `before`. Threads that have ended since are not counted.
    pub fn since(&self, before: &Reading) -> Spent {
        let mut spent = Spent::default();
        for (thread, now) in &self.0 {
            let then = before.0.get(thread).copied().unwrap_or_default();
            spent.cpu_ns += now.cpu_ns.saturating_sub(then.cpu_ns);
            spent.switches += now.switches.saturating_sub(then.switches);
        }
        spent
    }
}

fn switches(status: &str) -> u64 {
    let lines = status.lines().filter(|line| line.contains("voluntary_ctxt_switches"));
    lines.filter_map(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_cpu_time_of_this_process() {
        let pid = std::process::id();
        let before = Reading::of(pid);
        // Thread CPU time: on a busy machine the wall clock runs ahead of it.
        let worked = || rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime).tv_nsec;
        while worked() < 60_000_000 {
            std::hint::black_box(0);
        }
        let spent = Reading::of(pid).since(&before);
        assert!(spent.cpu_ns > 20_000_000, "{spent:?}");
        assert_eq!(Reading::of(u32::MAX), Reading::default());
    }

    #[test]
    fn counts_both_kinds_of_context_switches_in_all_threads() {
        assert_eq!(switches("voluntary_ctxt_switches:\t40\nnonvoluntary_ctxt_switches:\t2\n"), 42);
        let reading = |threads: &[(u32, u64)]| {
            Reading(threads.iter().map(|(id, cpu)| (*id, Account { cpu_ns: *cpu, switches: 1 })).collect())
        };
        let spent = reading(&[(1, 50), (3, 7)]).since(&reading(&[(1, 30), (2, 99)]));
        assert_eq!((spent.cpu_ns, spent.switches), (27, 1));
    }
}
