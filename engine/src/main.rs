// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The program `loopengine`, which mount(8) runs as `mount.loop`: see `cli`.
//!
//! The command line is no part of the library: a change in it compiles and links only the program.

mod cli;

use std::path::Path;
use std::process::ExitCode;

// The command line names modules of the library as its own.
use loopengine::{
    accounts, broken_kernels, config, control, counters, error, frontend, hash, image, instance, intercept,
    kernel_mounts, kernels, loopfs, loops, private, received, sandbox, sys,
};

fn main() -> ExitCode {
    let called = std::env::args_os().next();
    match called.as_deref().map(Path::new).and_then(Path::file_name) {
        Some(name) if name == "mount.loop" => cli::mount_loop(),
        _ => cli::main(),
    }
}
