// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Builds the program for packages, in the oldest Debian: with its C library, and static.
//!
//! Knows cargo and toolchains, not packages. Both are release builds without debug information.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use loopbench::sh;

use crate::debian_root::{DebianRoot, OLDEST};
use crate::{programs, steps};

use super::Release;

const LIMIT: Duration = Duration::from_secs(3600);
/// The system that builds. A new list needs a new name.
pub(super) const SYSTEM: &str = "bookworm-build";
/// A linker, headers and libclang for the build; lintian and rpm for the checks.
pub(super) const SYSTEM_PACKAGES: [&str; 6] =
    ["gcc", "libc6-dev", "libclang-dev", "lintian", "rpm", "ca-certificates"];

/// The program, linked to the C library of the oldest Debian.
pub(super) fn for_debian(release: &Release) -> Result<PathBuf> {
    build(release, "build", "")?;
    stripped(release, &built_for_debian(release))
}

/// The program of the last [`for_debian`].
pub(super) fn built_for_debian(release: &Release) -> PathBuf {
    target(release).join("debian/loopengine")
}

/// The program without dynamic libraries, for all distributions.
///
/// Only the last crate is compiled and linked again. The C library is Debian's: tokio-uring 0.5 does
/// not compile with musl.
pub(super) fn fixed(release: &Release) -> Result<PathBuf> {
    build(release, "rustc", " -- -C target-feature=+crt-static")?;
    stripped(release, &target(release).join("static/loopengine"))
}

/// Target directory of the builds in the oldest Debian.
fn target(release: &Release) -> PathBuf {
    release.target.join("package").join(OLDEST)
}

/// Builds in a system of the oldest Debian. The toolchain and the downloaded crates are this
/// machine's: Debian's own toolchain is older than what the engine needs.
fn build(release: &Release, verb: &str, options: &str) -> Result<()> {
    let system = DebianRoot::ensure(SYSTEM, OLDEST, &SYSTEM_PACKAGES)?;
    steps::run(&mut programs::cargo(&["fetch", "--locked"]), LIMIT)?;
    let (toolchain, home) = (toolchain()?, cargo_home()?);
    if toolchain == Path::new("/usr") {
        bail!("the toolchain in /usr cannot be used inside Debian {OLDEST}: install Rust with rustup");
    }
    let (workspace, target) = (programs::workspace(), target(release));
    fs::create_dir_all(&target)?;
    let binds: [(&Path, &str); 4] =
        [(&workspace, "/src"), (&toolchain, "/rust"), (&home, "/cargo"), (&target, "/target")];
    let line = format!(
        "export PATH=/rust/bin:$PATH CARGO_HOME=/cargo CARGO_NET_OFFLINE=true\n\
         export CARGO_TARGET_DIR=/target CARGO_TERM_COLOR=never\n\
         cd /src && exec cargo {verb} --release --locked --package loopengine --bin loopengine{options}"
    );
    steps::run(&mut system.shell(&binds, &line), LIMIT)
}

/// Copies the program that was just built to `copy`, without symbols and debug information.
fn stripped(release: &Release, copy: &Path) -> Result<PathBuf> {
    fs::create_dir_all(copy.parent().context("the copy has no directory")?)?;
    let mut strip = Command::new(sh::which("strip")?);
    strip.args(["--strip-all", "--remove-section=.comment", "-o"]).arg(copy);
    sh::capture(strip.arg(target(release).join("release/loopengine")), LIMIT)?;
    Ok(copy.to_owned())
}

/// Directory of the toolchain that builds this workspace.
fn toolchain() -> Result<PathBuf> {
    let mut rustc = Command::new("rustc");
    rustc.args(["--print", "sysroot"]).current_dir(programs::workspace());
    Ok(PathBuf::from(sh::capture(&mut rustc, LIMIT)?.trim()))
}

fn cargo_home() -> Result<PathBuf> {
    let home = std::env::var_os("CARGO_HOME").map(PathBuf::from);
    home.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cargo")))
        .context("neither CARGO_HOME nor HOME is set: set one of them")
}
