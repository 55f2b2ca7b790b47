// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Cargo subcommands and other programs that come from crates: installed when they are missing.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};

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
/// Builds a Debian package from staged files.
pub(crate) const DEB: Tool = Tool { program: "cargo-deb", package: "cargo-deb@3.8.0", options: &[] };
/// Builds an RPM from staged files.
pub(crate) const RPM: Tool =
    Tool { program: "cargo-generate-rpm", package: "cargo-generate-rpm@0.21.1", options: &[] };

/// Installs `tool` unless it is installed; returns its path.
pub(crate) fn ensure(tool: &Tool) -> Result<PathBuf> {
    if let Some(path) = find(tool.program) {
        return Ok(path);
    }
    println!("installing {} with cargo: this takes a few minutes, once", tool.package);
    let mut command = programs::cargo(&["install", "--locked", "--debug"]);
    // Without debug information it compiles faster.
    command.args(tool.options).arg(tool.package).env("CARGO_PROFILE_DEV_DEBUG", "0");
    steps::run(&mut command, LIMIT)?;
    find(tool.program).with_context(|| format!("cargo installed {} outside of PATH", tool.program))
}

/// `program` on PATH, or in cargo's own directory, which need not be on PATH.
fn find(program: &str) -> Option<PathBuf> {
    let home = std::env::var_os("CARGO_HOME").map(PathBuf::from);
    let home = home.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cargo")));
    let installed = home.map(|home| home.join("bin").join(program)).filter(|path| path.is_file());
    sh::which(program).ok().or(installed)
}
