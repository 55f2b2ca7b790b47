// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The program `loopengine`, which mount(8) runs as `mount.loop`: everything is in the library, see
//! `cli`.

use std::path::Path;
use std::process::ExitCode;

fn main() -> ExitCode {
    let called = std::env::args_os().next();
    match called.as_deref().map(Path::new).and_then(Path::file_name) {
        Some(name) if name == "mount.loop" => loopengine::cli::mount_loop(),
        _ => loopengine::cli::main(),
    }
}
