// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Block devices of the kernel's loop driver: the real `loopengine serve --backend loop` against the
//! real kernel, file systems, losetup and fio.
//!
//! Runs as root on any machine with /dev/loop-control; elsewhere, every case is skipped with the
//! reason, and the exit status is 0. The harness and the cases about images are those of tests/vm;
//! what only this backend does is in `cases/lifetime.rs`.

// Uses only a part of the modules of tests/vm.
#![allow(dead_code)]

#[path = "../fuse/loop_device.rs"]
mod below;
mod cases;
#[path = "../vm/daemon.rs"]
mod daemon;
#[path = "../vm/disk.rs"]
mod disk;
#[path = "../vm/driver/mod.rs"]
mod driver;
#[path = "../vm/fio.rs"]
mod fio;
#[path = "../vm/harness.rs"]
mod harness;
#[path = "../vm/host.rs"]
mod host;
#[path = "../vm/ledger.rs"]
mod ledger;
#[path = "../vm/model.rs"]
mod model;
#[path = "../vm/store.rs"]
mod store;
#[path = "../vm/tools.rs"]
mod tools;

use std::process::ExitCode;

/// The backend under test; see tests/vm.
const BACKEND: &str = "loop";
/// The directory of all files of a run.
const SCRATCH: &str = "/run/loopengine-kernel-loop-cases";

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().collect();
    if let [_, role, what] = &words[..]
        && role == driver::ROLE
    {
        driver::run(what);
        return ExitCode::SUCCESS;
    }
    let mut args = libtest_mimic::Arguments::from_args();
    // The cases share two CPUs and the machine's loop devices: one at a time.
    args.test_threads = Some(1);
    let trials = cases::all().into_iter().map(harness::Case::into_trial);
    libtest_mimic::run(&args, trials.collect()).exit_code()
}
