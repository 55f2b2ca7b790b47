// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Kernel cases: the real `loopengine` program against the real block layer, file systems and fio.
//!
//! Runs as root on a kernel with ublk, meant for the lab's throw-away VM; elsewhere, every case is
//! skipped with the reason, and the exit status is 0. Knows the program only by its public command
//! line (`loopengine` on PATH, or `$LOOPENGINE`); links nothing of the engine.
//!
//! `LOOPENGINE_VM_CASES=1` allows a run outside a VM, `LOOPENGINE_VM_FULL=1` selects the full
//! length (1,000 churn rounds, say). Name filters, `--list`, `--exact` and `--skip` work as in any
//! test.

#[path = "null_blk.rs"]
mod below;
mod cases;
mod daemon;
mod disk;
mod driver;
mod fio;
mod harness;
mod host;
mod ledger;
mod model;
mod store;
mod tools;

use std::process::ExitCode;

/// The backend under test; tests/fuse has the other one.
const BACKEND: &str = "ublk";
/// The directory of all files of a run, in memory.
const SCRATCH: &str = "/run/loopengine-cases";

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().collect();
    if let [_, role, what] = &words[..]
        && role == driver::ROLE
    {
        driver::run(what);
        return ExitCode::SUCCESS;
    }
    let mut args = libtest_mimic::Arguments::from_args();
    // The cases share ublk ids, two CPUs and the kernel's log: one at a time.
    args.test_threads = Some(1);
    let trials = cases::all().into_iter().map(harness::Case::into_trial);
    libtest_mimic::run(&args, trials.collect()).exit_code()
}
