// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `lab package`: a Debian package, an RPM, a static tarball and a container image.
//!
//! ```text
//!  build: for Debian, in its oldest release ── stage ── cargo-deb
//!  build: static ─┬─────────────────────────── stage ── cargo-generate-rpm, tarball
//!                 └─────────────────────────── oci
//!  check ── installs, upgrades and removes all of them in Debian systems
//!  └ machine ── the Debian package on a machine with its own kernel and systemd
//! ```
//! `loopengine install` has the list of the files; `stage` adds only what a kind of package demands.
//! This file knows the order, and names and checksums of the results.

mod build;
mod check;
mod machine;
mod oci;
mod stage;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::ValueEnum;

use loopbench::sh;

use crate::programs;
use crate::steps::Steps;

/// What to build.
#[derive(clap::Args)]
pub(crate) struct PackageOptions {
    /// Kinds of packages to build [default: all]
    #[arg(value_enum, value_name = "KIND")]
    kinds: Vec<PackageKind>,
    /// Directory of the packages [default: target/packages]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Also test the packages: run lintian, then install, use, upgrade and remove them in Debian
    /// systems
    #[arg(long, value_enum, value_name = "WHERE", num_args = 0..=1, require_equals = true,
          default_missing_value = "all")]
    check: Option<CheckKind>,
}

/// Where to test packages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum CheckKind {
    /// In small systems, then on a machine
    All,
    /// In small Debian systems without a kernel of their own: takes a few minutes
    Systems,
    /// On an emulated machine with Debian 13, its kernel and systemd: takes about 15 minutes
    Machine,
}

/// A kind of package.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub(crate) enum PackageKind {
    /// For Debian 12 and later, and Ubuntu 24.04 and later
    Deb,
    /// For distributions with RPM
    Rpm,
    /// For any Linux: a static program and its files
    Tarball,
    /// A container image in a directory, in OCI's image layout
    Oci,
}

impl PackageKind {
    fn name(self) -> &'static str {
        match self {
            PackageKind::Deb => "deb",
            PackageKind::Rpm => "rpm",
            PackageKind::Tarball => "tarball",
            PackageKind::Oci => "oci",
        }
    }
}

/// Name of the list of checksums.
const SUMS: &str = "SHA256SUMS";
const LIMIT: Duration = Duration::from_secs(600);

/// What all packages of a run have in common.
#[derive(Clone)]
struct Release {
    version: String,
    /// Time of the last commit, in seconds: the same commit gives the same packages.
    time: String,
    /// Cargo's target directory.
    target: PathBuf,
    /// Directory of the packages.
    out: PathBuf,
}

/// The built packages: a file, or the directory of an image.
type Built = BTreeMap<PackageKind, PathBuf>;

/// Builds the packages, prints them, and tries them out if asked.
pub(crate) fn run(options: &PackageOptions) -> Result<()> {
    let metadata = programs::metadata()?;
    let version = metadata.packages.first().context("the workspace has no package")?.version.clone();
    let out = match &options.out {
        Some(out) => std::path::absolute(out)?,
        None => metadata.target_directory.join("packages"),
    };
    fs::create_dir_all(&out)
        .with_context(|| format!("cannot create {}: give another directory with --out", out.display()))?;
    let mut log = Command::new("git");
    log.args(["log", "-1", "--format=%ct"]).current_dir(programs::workspace());
    let time = sh::capture(&mut log, LIMIT)?.trim().to_owned();
    let release = Release { version, time, target: metadata.target_directory, out };

    let steps = Steps::start();
    let built = build_all(&release, &steps, &options.kinds)?;
    steps.begin("packages");
    summarize(&release, &built)?;
    if let Some(kind) = options.check {
        check::run(&release, &steps, &built, kind)?;
        println!("\nAll packages passed.");
    }
    Ok(())
}

/// File names of all packages of `version`, for people who prepare a release.
pub(crate) fn names(version: &str) -> Vec<String> {
    PackageKind::value_variants().iter().map(|kind| name(*kind, version)).collect()
}

fn name(kind: PackageKind, version: &str) -> String {
    let machine = std::env::consts::ARCH;
    match kind {
        PackageKind::Deb => {
            let machine = match machine {
                "x86_64" => "amd64",
                "aarch64" => "arm64",
                other => other,
            };
            format!("loopengine_{version}-1_{machine}.deb")
        }
        PackageKind::Rpm => format!("loopengine-{version}-1.{machine}.rpm"),
        PackageKind::Tarball => format!("loopengine-{version}-{machine}-linux-static.tar.gz"),
        PackageKind::Oci => format!("loopengine-{version}-oci"),
    }
}

fn build_all(release: &Release, steps: &Steps, wanted: &[PackageKind]) -> Result<Built> {
    let wanted = if wanted.is_empty() { PackageKind::value_variants() } else { wanted };
    let mut built = Built::new();
    if wanted.contains(&PackageKind::Deb) {
        steps.begin("build in the oldest Debian");
        let program = build::for_debian(release)?;
        steps.begin("deb");
        built.insert(PackageKind::Deb, stage::deb(release, &program, &format!("{}-1", release.version))?);
    }
    if wanted.iter().any(|kind| *kind != PackageKind::Deb) {
        steps.begin("static build");
        let program = build::fixed(release)?;
        for kind in PackageKind::value_variants().iter().filter(|kind| wanted.contains(kind)) {
            let package = match kind {
                PackageKind::Deb => continue,
                PackageKind::Rpm => stage::rpm,
                PackageKind::Tarball => stage::tarball,
                PackageKind::Oci => oci::image,
            };
            steps.begin(kind.name());
            built.insert(*kind, package(release, &program)?);
        }
    }
    Ok(built)
}

/// Prints size and checksum of each file, and writes the checksums beside the packages.
fn summarize(release: &Release, built: &Built) -> Result<()> {
    let mut sums = String::new();
    for path in built.values() {
        // The index of an image has the checksums of all else in it.
        let files = if path.is_dir() { vec![path.join(oci::INDEX)] } else { vec![path.clone()] };
        for file in files {
            let name = file.strip_prefix(&release.out).unwrap_or(&file).to_string_lossy().into_owned();
            let sum = sha256(&file)?;
            println!("{:>11} bytes  {sum}  {name}", size(path)?);
            sums.push_str(&format!("{sum}  {name}\n"));
        }
    }
    let list = release.out.join(SUMS);
    fs::write(&list, sums).with_context(|| format!("cannot write {}", list.display()))?;
    println!("in {}, with the checksums in {SUMS}", release.out.display());
    Ok(())
}

/// Bytes of a file, or of all files in a directory.
fn size(path: &Path) -> Result<u64> {
    let found = fs::symlink_metadata(path).with_context(|| format!("cannot read {}", path.display()))?;
    if !found.is_dir() {
        return Ok(found.len());
    }
    fs::read_dir(path)?.map(|entry| size(&entry?.path())).sum()
}

/// Checksum of a file, in hexadecimal digits.
fn sha256(file: &Path) -> Result<String> {
    let said = sh::capture(Command::new("sha256sum").arg("--zero").arg("--").arg(file), LIMIT)?;
    let sum = said.split(' ').next().filter(|sum| sum.len() == 64);
    Ok(sum.with_context(|| format!("sha256sum printed no checksum of {}", file.display()))?.to_owned())
}

/// Packs `directory` into `archive`: the same contents give the same archive.
fn tar(release: &Release, directory: &Path, names: &[&str], archive: &Path) -> Result<()> {
    let mut tar = Command::new("tar");
    tar.args(["--create", "--sort=name", "--owner=0", "--group=0", "--numeric-owner", "--format=gnu"]);
    tar.arg(format!("--mtime=@{}", release.time)).arg("--file").arg(archive);
    sh::capture(tar.arg("--directory").arg(directory).args(names), LIMIT).map(drop)
}

/// Compresses `file` and returns the path of the result, which replaces it.
fn gzip(file: &Path) -> Result<PathBuf> {
    sh::capture(Command::new("gzip").args(["--no-name", "--best", "--force"]).arg(file), LIMIT)?;
    let mut name = file.file_name().unwrap_or_default().to_owned();
    name.push(".gz");
    Ok(file.with_file_name(name))
}

/// Makes an empty directory, also if there was one.
fn empty(directory: &Path) -> Result<()> {
    if directory.exists() {
        fs::remove_dir_all(directory).with_context(|| format!("cannot empty {}", directory.display()))?;
    }
    fs::create_dir_all(directory).with_context(|| format!("cannot make {}", directory.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_has_a_file_name_of_its_own() {
        let names = names("1.2.3");
        assert!(
            names.iter().all(|name| name.starts_with("loopengine") && name.contains("1.2.3")),
            "{names:?}"
        );
        let distinct: std::collections::BTreeSet<&String> = names.iter().collect();
        assert_eq!(distinct.len(), names.len());
    }

    #[test]
    fn archives_do_not_depend_on_times_and_order() {
        let dir = tempfile::tempdir().unwrap();
        let pack = |name: &str, files: [&str; 2]| {
            let root = dir.path().join(name);
            empty(&root.join("usr")).unwrap();
            for file in files {
                fs::write(root.join("usr").join(file), file).unwrap();
            }
            let release = Release {
                version: "1".into(),
                time: "1000000000".into(),
                target: PathBuf::new(),
                out: PathBuf::new(),
            };
            let archive = dir.path().join(format!("{name}.tar"));
            tar(&release, &root, &["usr"], &archive).unwrap();
            sha256(&gzip(&archive).unwrap()).unwrap()
        };
        assert_eq!(pack("one", ["a", "b"]), pack("two", ["b", "a"]));
    }
}
