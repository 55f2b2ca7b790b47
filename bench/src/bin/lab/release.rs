// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `lab release`: checks that the tree can be released, and says which steps a maintainer takes.
//!
//! Publishes nothing: tags, uploads and announcements are manual. Reads git, the changelog and
//! what cargo would package.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use loopbench::sh;

use crate::package;
use crate::programs::{self, Package, cargo, workspace};

/// What to do.
#[derive(clap::Args)]
pub(crate) struct ReleaseOptions {
    /// Check the tree and print the steps of a release. Required: `lab release` publishes nothing
    #[arg(long)]
    dry_run: bool,
    /// Do not check that generated files are up to date, which needs a build
    #[arg(long, requires = "dry_run")]
    no_build: bool,
}

const LIMIT: Duration = Duration::from_secs(1800);
const SPDX: &str = "SPDX-License-Identifier: Apache-2.0 OR MIT";
/// Names of files that are printed for a failed check.
const SHOWN_MAX: usize = 5;

/// Checks the tree; whether every check passed.
pub(crate) fn run(options: &ReleaseOptions) -> Result<bool> {
    let packages = programs::metadata()?.packages;
    let version = &packages.first().context("the workspace has no package")?.version;
    if !options.dry_run {
        println!("cargo lab release publishes nothing: run it with --dry-run.\n");
        print_steps(version);
        return Ok(false);
    }
    let mut failed = 0;
    let mut check = |name: &str, result: Result<String>| match result {
        Ok(detail) => println!("ok      {name}: {detail}"),
        Err(error) => {
            failed += 1;
            println!("FAILED  {name}: {error:#}");
        }
    };
    check("version", one_version(&packages));
    check("changelog", changelog(version));
    check("tag", tag_is_new(version));
    check("clean tree", clean_tree());
    check("SPDX lines", spdx_lines());
    if options.no_build {
        println!("skipped generated files: --no-build");
    } else {
        check("generated files", generated_files());
    }
    for package in &packages {
        check(&format!("package {}", package.name), package_files(package));
    }
    check("archives", archives());
    println!("\nPackages that `cargo lab package --check` builds: {}", package::names(version).join(", "));
    println!();
    if failed > 0 {
        println!("Failed checks: {failed}. loopengine {version} cannot be released from this tree.");
    } else {
        println!("All checks passed.");
        print_steps(version);
    }
    Ok(failed == 0)
}

fn print_steps(version: &str) {
    println!(
        "A release of loopengine {version} takes these manual steps (CONTRIBUTING.md, \"Releases\"):\n\
         \x20 1. bash .ci/run                                   on this commit, on Debian 12 and 13\n\
         \x20 2. git tag --sign v{version} --message 'loopengine {version}'\n\
         \x20 3. git push origin v{version}\n\
         \x20 4. git archive --prefix=loopengine-{version}/ --output=loopengine-{version}.tar.gz v{version}\n\
         \x20 5. cargo lab package --check                      as root, on Debian 12 or 13\n\
         \x20 6. attach the archive, its SHA-256 and target/packages to the release page, with the\n\
         \x20    changelog's section\n\
         \x20 7. open a new section \"Unreleased\" in CHANGELOG.md, and raise the version in Cargo.toml"
    );
}

fn one_version(packages: &[Package]) -> Result<String> {
    let first = packages.first().context("the workspace has no package")?;
    if let Some(other) = packages.iter().find(|package| package.version != first.version) {
        bail!("{} has {}, {} has {}", first.name, first.version, other.name, other.version);
    }
    Ok(first.version.clone())
}

fn changelog(version: &str) -> Result<String> {
    let text = fs::read_to_string(workspace().join("CHANGELOG.md")).context("cannot read CHANGELOG.md")?;
    let date = release_date(&text, version).with_context(|| {
        format!("CHANGELOG.md has no dated heading for this version, such as \"## [{version}] - 2026-01-31\"")
    })?;
    Ok(date.to_owned())
}

/// Date of the heading of `version`: "## [1.2.3] - 2026-01-31" or "## 1.2.3 - 2026-01-31".
fn release_date<'a>(changelog: &'a str, version: &str) -> Option<&'a str> {
    changelog.lines().find_map(|line| {
        let (name, date) = line.strip_prefix("## ")?.split_once(" - ")?;
        let date = date.trim();
        (name.trim_matches(['[', ']']) == version && is_date(date)).then_some(date)
    })
}

fn is_date(text: &str) -> bool {
    let digits = |index: usize, c: char| if index == 4 || index == 7 { c == '-' } else { c.is_ascii_digit() };
    text.len() == 10 && text.chars().enumerate().all(|(index, c)| digits(index, c))
}

fn tag_is_new(version: &str) -> Result<String> {
    let tag = format!("v{version}");
    if !git(&["tag", "--list", &tag])?.is_empty() {
        bail!("{tag} exists already: raise the version in Cargo.toml");
    }
    Ok(format!("{tag} is not used yet"))
}

fn clean_tree() -> Result<String> {
    let changes = git(&["status", "--porcelain"])?;
    if !changes.is_empty() {
        bail!("uncommitted changes: {}", shown(changes.lines().map(str::trim).collect()));
    }
    Ok(git(&["rev-parse", "--short", "HEAD"])?.trim().to_owned())
}

fn spdx_lines() -> Result<String> {
    let list = git(&["ls-files", "*.rs"])?;
    let (with, without): (Vec<&str>, Vec<&str>) =
        list.lines().partition(|name| has_spdx_line(&workspace().join(name)));
    if !without.is_empty() {
        bail!("{} files do not begin with \"// {SPDX}\": {}", without.len(), shown(without));
    }
    Ok(format!("{} source files", with.len()))
}

fn has_spdx_line(file: &Path) -> bool {
    let text = fs::read_to_string(file).unwrap_or_default();
    text.lines().next().and_then(|line| line.strip_prefix("// ")) == Some(SPDX)
}

fn generated_files() -> Result<String> {
    let mut command = cargo(&["test", "--package", "loopengine", "--bin", "loopengine", "--test", "fresh"]);
    sh::capture(command.args(programs::PROFILE), LIMIT)
        .context("run 'UPDATE=1 cargo test --package loopengine --bin loopengine --test fresh'")?;
    Ok("manual pages, completions and tables are up to date".into())
}

/// Number of files that `cargo package` puts into the archive of `package`.
fn package_files(package: &Package) -> Result<String> {
    let mut command = cargo(&["package", "--allow-dirty", "--list", "--package", &package.name]);
    Ok(format!("{} files", sh::capture(&mut command, LIMIT)?.lines().count()))
}

/// Writes the archives of all packages together, since they depend on each other.
fn archives() -> Result<String> {
    sh::capture(&mut cargo(&["package", "--allow-dirty", "--no-verify", "--workspace"]), LIMIT)?;
    Ok("cargo package --workspace --no-verify succeeds".into())
}

fn git(words: &[&str]) -> Result<String> {
    sh::capture(Command::new("git").args(words).current_dir(workspace()), LIMIT)
}

fn shown(names: Vec<&str>) -> String {
    let more = names.len().saturating_sub(SHOWN_MAX);
    let mut text = names.into_iter().take(SHOWN_MAX).collect::<Vec<_>>().join(", ");
    if more > 0 {
        text.push_str(&format!(" and {more} more"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_dated_heading_of_a_version() {
        let text = "# Changelog\n## [Unreleased]\n## [1.2.0] - 2026-01-31\n## 1.1.0 - 2025-12-01\n";
        assert_eq!(release_date(text, "1.2.0"), Some("2026-01-31"));
        assert_eq!(release_date(text, "1.1.0"), Some("2025-12-01"));
        assert_eq!(release_date(text, "1.2"), None);
        assert_eq!(release_date("## [1.2.0] - soon\n## 1.2.0\n", "1.2.0"), None);
    }

    #[test]
    fn names_a_few_of_many_files() {
        assert_eq!(shown(vec!["a", "b"]), "a, b");
        assert_eq!(shown(vec!["a", "b", "c", "d", "e", "f", "g"]), "a, b, c, d, e and 2 more");
    }

    #[test]
    fn rejects_files_without_an_spdx_line() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("a.rs");
        fs::write(&file, format!("// {SPDX}\nfn main() {{}}\n")).unwrap();
        assert!(has_spdx_line(&file));
        fs::write(&file, "fn main() {}\n").unwrap();
        assert!(!has_spdx_line(&file));
    }
}
