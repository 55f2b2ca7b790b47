// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The client that compares loop(4) drivers: hundreds of steps on /dev/loop-control and /dev/loopN,
//! each with a printed result. It does not know which driver it runs on.
//!
//! It is this test program again, called with [`ROLE`] as its first argument.

mod abi;
mod bed;
mod control;
mod hostile;
mod life;
mod partitions;
mod raw;
mod refused;
pub(crate) mod rounds;
mod status;

/// First argument of the client. The second is the ABI of its calls (`64` or `32`), a plan of
/// `rounds`, or the number of calls of a hostile client.
pub(crate) const ROLE: &str = "client-of-loop-devices";

/// Runs the client.
pub(crate) fn run(what: &str) {
    match what {
        "64" | "32" => steps(what == "32"),
        what if what.starts_with(rounds::WORD) => rounds::run(what),
        calls => hostile::run(calls.parse().expect("a number of calls")),
    }
}

/// All steps.
fn steps(compat: bool) {
    let bed = bed::Bed::new(compat);
    control::steps(&bed);
    refused::steps(&bed);
    status::structs(&bed);
    // The other calls have the same ABI for all programs.
    if !compat {
        status::sizes(&bed);
        life::steps(&bed);
    }
    partitions::steps(&bed);
    bed.theme("end");
    bed.say("steps", "all done");
}
