// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Stages the files of a package, and packs them: Debian package, RPM, tarball.
//!
//! The program itself stages its files; this file adds documents where a distribution expects them.
//! Fields and scripts of packages are in `engine/Cargo.toml` and `engine/share`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

use loopbench::sh;

use crate::{cargo_tools, programs};

use super::{PackageKind, Release, empty, gzip, name, tar};

const LIMIT: Duration = Duration::from_secs(1200);
/// Where `engine/Cargo.toml` expects the staged files, below the target directory.
const STAGED: &str = "release/packaged";
/// The record of `loopengine install`: a package manager has its own.
const RECORD: &str = "usr/share/loopengine/installed";
const DOCUMENTS: [&str; 5] = ["README.md", "CHANGELOG.md", "SECURITY.md", "LICENSE-APACHE", "LICENSE-MIT"];

/// Stages the files of `program` and returns their directory.
fn stage(release: &Release, program: &Path) -> Result<PathBuf> {
    let root = release.target.join(STAGED);
    empty(&root)?;
    let mut install = Command::new(program);
    install.args(["install", "--prefix", "/usr"]).env("DESTDIR", &root);
    sh::capture(&mut install, LIMIT)?;
    fs::remove_file(root.join(RECORD)).context("loopengine install wrote no list of files")?;
    Ok(root)
}

/// A Debian package with `version`, which includes Debian's revision.
pub(super) fn deb(release: &Release, program: &Path, version: &str) -> Result<PathBuf> {
    let root = stage(release, program)?;
    let documents = root.join("usr/share/doc/loopengine");
    fs::create_dir_all(&documents)?;
    let workspace = programs::workspace();
    fs::copy(workspace.join("README.md"), documents.join("README.md"))?;
    fs::copy(workspace.join("CHANGELOG.md"), documents.join("changelog"))?;
    fs::write(documents.join("changelog.Debian"), debian_changelog(release, version)?)?;
    for text in ["changelog", "changelog.Debian"] {
        gzip(&documents.join(text))?;
    }
    compress_pages(&root)?;
    let deb = release
        .out
        .join(name(PackageKind::Deb, &release.version).replace(&format!("{}-1", release.version), version));
    let mut command = programs::cargo_tool(&cargo_tools::ensure(&cargo_tools::DEB)?);
    command.env("SOURCE_DATE_EPOCH", &release.time).args([
        "--package",
        "loopengine",
        "--no-build",
        "--no-strip",
        "--deb-version",
        version,
    ]);
    sh::capture(command.arg("--output").arg(&deb), LIMIT)?;
    Ok(deb)
}

/// An RPM.
pub(super) fn rpm(release: &Release, program: &Path) -> Result<PathBuf> {
    let root = stage(release, program)?;
    // cargo-generate-rpm knows no links: the package's script makes this one.
    fs::remove_file(root.join("usr/sbin/mount.loop")).context("loopengine install made no mount.loop")?;
    copy_documents(&root.join("usr/share/doc/loopengine"))?;
    compress_pages(&root)?;
    let rpm = release.out.join(name(PackageKind::Rpm, &release.version));
    let mut command = programs::cargo_tool(&cargo_tools::ensure(&cargo_tools::RPM)?);
    command
        .env("SOURCE_DATE_EPOCH", &release.time)
        // Its debug build compresses slowly: the default, zstd, took more than ten minutes of a busy machine.
        .args(["--payload-compress", "gzip", "--package", "engine", "--target-dir"])
        .arg(&release.target);
    sh::capture(command.arg("--output").arg(&rpm), LIMIT)?;
    Ok(rpm)
}

/// A tarball: all files below usr/, and documents. The program in it installs itself.
pub(super) fn tarball(release: &Release, program: &Path) -> Result<PathBuf> {
    let root = stage(release, program)?;
    let path = release.out.join(name(PackageKind::Tarball, &release.version));
    let file_name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let top = file_name.trim_end_matches(".tar.gz");
    let tree = release.target.join("release/tarball");
    empty(&tree)?;
    fs::rename(&root, tree.join(top))?;
    copy_documents(&tree.join(top))?;
    let archive = release.out.join(format!("{top}.tar"));
    tar(release, &tree, &[top], &archive)?;
    gzip(&archive)
}

/// Distributions demand compressed manual pages.
fn compress_pages(root: &Path) -> Result<()> {
    for section in fs::read_dir(root.join("usr/share/man"))? {
        for page in fs::read_dir(section?.path())? {
            gzip(&page?.path())?;
        }
    }
    Ok(())
}

fn copy_documents(to: &Path) -> Result<()> {
    fs::create_dir_all(to)?;
    for document in DOCUMENTS {
        let from = programs::workspace().join(document);
        fs::copy(&from, to.join(document)).with_context(|| format!("cannot copy {}", from.display()))?;
    }
    Ok(())
}

/// Debian demands a changelog in its own format.
fn debian_changelog(release: &Release, version: &str) -> Result<String> {
    let mut date = Command::new("date");
    date.args(["--utc", "--rfc-email", "--date"]).arg(format!("@{}", release.time)).env("LC_ALL", "C");
    let date = sh::capture(&mut date, LIMIT)?;
    Ok(format!(
        "loopengine ({version}) unstable; urgency=medium\n\n  * Release {}: see changelog.gz.\n\n -- {}  {}\n",
        release.version,
        maintainer()?,
        date.trim()
    ))
}

/// The maintainer that `engine/Cargo.toml` names.
fn maintainer() -> Result<String> {
    let file = programs::workspace().join("engine/Cargo.toml");
    let text = fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
    let line = text.lines().find_map(|line| line.strip_prefix("maintainer = \""));
    let name = line.and_then(|rest| rest.strip_suffix('"'));
    Ok(name.context("engine/Cargo.toml has no maintainer in [package.metadata.deb]")?.to_owned())
}
