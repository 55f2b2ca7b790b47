// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Cargo subcommands and other programs that come from crates: installed when they are missing.

use std::time::Duration;

use anyhow::Result;

use loopbench::sh;

use crate::{programs, steps};

const LIMIT: Duration = Duration::from_secs(1800);

/// A program that `cargo install` provides.
pub(crate) struct Tool {
    /// Name of the program.
    program: &'static str,
    /// Crate and version, as cargo takes them.
    package: &'static str,
    options: &'static [&'static str],
}

/// Checks licenses, bans and sources of the dependencies.
pub(crate) const DENY: Tool = Tool { program: "cargo-deny", package: "cargo-deny@0.20.2", options: &[] };
/// Renders the book. Its server and its file watcher are not needed.
pub(crate) const MDBOOK: Tool = Tool {
    program: "mdbook",
    package: "mdbook@0.5.4",
    options: &["--no-default-features", "--features", "search"],
};

/// Installs `tool` unless it is on PATH.
pub(crate) fn ensure(tool: &Tool) -> Result<()> {
    if sh::which(tool.program).is_ok() {
        return Ok(());
    }
    println!("installing {} with cargo: this takes a few minutes, once", tool.package);
    let mut command = programs::cargo(&["install", "--locked", "--debug"]);
    // Without debug information it compiles faster.
    command.args(tool.options).arg(tool.package).env("CARGO_PROFILE_DEV_DEBUG", "0");
    steps::run(&mut command, LIMIT)
}
