// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The client that compares loop(4) drivers: some hundreds of steps on /dev/loop-control and
//! /dev/loopN, and a line for the outcome of each. Whose driver it is, it does not know.
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

/// First argument of the client; the second says whose calls it makes: `64` or `32`. Or it is how
/// many calls a client makes that means harm.
pub(crate) const ROLE: &str = "client-of-loop-devices";

/// Does what a client is to do.
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
    // Who has come so far calls the rest in the same way.
    if !compat {
        status::sizes(&bed);
        life::steps(&bed);
    }
    partitions::steps(&bed);
    bed.theme("end");
    bed.say("steps", "all done");
}
