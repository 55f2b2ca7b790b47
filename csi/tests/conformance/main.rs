// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Calls over gRPC to the real driver, with the real engine and real devices.
//!
//! Needs root, /dev/loop-control and the program loopengine beside the driver, or in $LOOPENGINE. Without
//! them every case is skipped with the reason, and the exit status is 0.

mod cases;
mod client;
mod fixture;

use std::process::ExitCode;

use libtest_mimic::{Arguments, Completion, Trial};

/// Why a case failed.
type Res<T = ()> = Result<T, String>;

/// Begins the error of a case that cannot run here.
const SKIP: &str = "skipped: ";

macro_rules! ensure {
    ($cond:expr, $($arg:tt)*) => { if !$cond { return Err(format!($($arg)*)) } };
}
use ensure;

fn main() -> ExitCode {
    let mut args = Arguments::from_args();
    // The cases share the machine's loop devices.
    args.test_threads = Some(1);
    let trials = cases::ALL.iter().map(|&(name, disk, case)| {
        Trial::ignorable_test(name, move || {
            if let Some(why) = fixture::missing() {
                return Ok(Completion::ignored_with(format!("{SKIP}{why}")));
            }
            let mut node = fixture::Node::start(disk)?;
            let ran = case(&mut node);
            let left = node.end();
            if let Some(why) = ran.as_ref().err().filter(|why| why.starts_with(SKIP)) {
                return Ok(Completion::ignored_with(why.clone()));
            }
            ran.map_err(|error| format!("{error}\nlog of the driver:\n{}", left.log))?;
            if !left.what.is_empty() {
                return Err(format!("left behind: {:?}", left.what).into());
            }
            Ok(Completion::Completed)
        })
    });
    libtest_mimic::run(&args, trials.collect()).exit_code()
}
