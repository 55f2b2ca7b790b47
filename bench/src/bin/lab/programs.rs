// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Builds the workspace's programs with the profile `lab`, and makes stripped copies for VMs.
//!
//! Knows cargo, not what the programs do.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use loopbench::sh;

/// Profile of all builds except for measurements, so that steps share compiled code.
pub(crate) const PROFILE: [&str; 2] = ["--profile", "lab"];
const BUILD_LIMIT: Duration = Duration::from_secs(3600);

/// A program that cargo built.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Program {
    /// Name inside the VM.
    pub(crate) name: String,
    /// Path on this machine.
    pub(crate) path: PathBuf,
}

/// Root of the workspace.
pub(crate) fn workspace() -> PathBuf {
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    package.parent().unwrap_or(package).to_owned()
}

/// A command of cargo in the workspace.
pub(crate) fn cargo(words: &[&str]) -> Command {
    let mut command = cargo_tool(&cargo_path());
    command.args(words);
    command
}

/// The cargo that runs this program, else that on PATH.
pub(crate) fn cargo_path() -> PathBuf {
    std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()).into()
}

/// A command of a program that runs cargo, in the workspace.
pub(crate) fn cargo_tool(program: &Path) -> Command {
    let mut command = Command::new(program);
    command.current_dir(workspace()).stdin(Stdio::null());
    // Variables that `cargo run` sets for this package would change what is built.
    let said = std::env::vars_os().filter(|(key, _)| key.to_str().is_some_and(said_by_cargo_run));
    for (key, _) in said {
        command.env_remove(key);
    }
    command
}

fn said_by_cargo_run(variable: &str) -> bool {
    variable.starts_with("CARGO_PKG_")
        || variable.starts_with("CARGO_MANIFEST_")
        || variable == "LD_LIBRARY_PATH"
}

/// Builds `loopengine`, `loopbench` and `lab`.
pub(crate) fn build() -> Result<Vec<Program>> {
    if let Some(directory) = std::env::var_os(BUILT).map(PathBuf::from) {
        let program = |name: &str| Program { name: name.into(), path: directory.join(name) };
        return Ok(["loopengine", "loopbench", "lab"].map(program).into());
    }
    build_with(&PROGRAMS, &PROFILE)
}

/// Makes a command of the lab use `programs` instead of building them: beside a build it would wait
/// for cargo's lock.
pub(crate) fn built<'a>(programs: &[Program], command: &'a mut Command) -> Result<&'a mut Command> {
    let directory = programs.first().and_then(|program| program.path.parent());
    Ok(command.env(BUILT, directory.context("cargo built no program")?))
}

/// Environment variable with the directory of programs that are built.
const BUILT: &str = "LAB_BUILT";

/// There are no examples. The word selects the features of dependencies that test programs need:
/// otherwise cargo compiles a hundred crates twice, once for programs and once for tests.
const PROGRAMS: [&str; 4] = ["build", "--workspace", "--bins", "--examples"];

/// Builds `loopengine` for release, as users do, and the other programs with the profile `lab`.
pub(crate) fn build_release() -> Result<Vec<Program>> {
    let mut programs = build_with(&["build", "--package", "loopengine", "--bins"], &["--release"])?;
    programs.extend(build_with(&["build", "--package", "loopbench", "--bins"], &PROFILE)?);
    Ok(programs)
}

/// Runs this program again on this machine, with the engine of `programs` on PATH.
pub(crate) fn again<S: AsRef<OsStr>>(programs: &[Program], words: &[S]) -> Result<Command> {
    let mut command = with_engine(programs, "lab")?;
    command.args(words);
    Ok(command)
}

/// Runs one of `programs` on this machine, with the engine of `programs` on PATH.
pub(crate) fn with_engine(programs: &[Program], name: &str) -> Result<Command> {
    let find = |name: &str| {
        programs.iter().find(|program| program.name == name).with_context(|| format!("cargo built no {name}"))
    };
    let directory = find("loopengine")?.path.parent().context("the path of loopengine has no directory")?;
    let path = std::env::var("PATH").unwrap_or_default();
    let mut command = Command::new(&find(name)?.path);
    command.env("PATH", format!("{}:{path}", directory.display()));
    Ok(command)
}

/// Builds all test programs of the workspace and returns them.
pub(crate) fn build_tests() -> Result<Vec<Program>> {
    build_with(&["test", "--workspace", "--no-run"], &PROFILE)
}

/// The workspace, as cargo describes it.
#[derive(Deserialize)]
pub(crate) struct Metadata {
    pub(crate) target_directory: PathBuf,
    pub(crate) packages: Vec<Package>,
}

/// A package of the workspace.
#[derive(Deserialize)]
pub(crate) struct Package {
    pub(crate) name: String,
    pub(crate) version: String,
    pub(crate) repository: Option<String>,
    targets: Vec<CargoTarget>,
}

#[derive(Deserialize)]
struct CargoTarget {
    name: String,
    kind: Vec<String>,
}

/// Asks cargo for the metadata of the workspace.
pub(crate) fn metadata() -> Result<Metadata> {
    let mut command = cargo(&["metadata", "--no-deps", "--format-version", "1", "--offline"]);
    let output = sh::capture(&mut command, Duration::from_secs(60))?;
    serde_json::from_str(&output).context("cannot read cargo metadata")
}

/// Names of the workspace's test programs.
pub(crate) fn test_targets() -> Result<Vec<String>> {
    let targets = metadata()?.packages.into_iter().flat_map(|package| package.targets);
    Ok(targets
        .filter(|target| target.kind.iter().any(|kind| kind == "test"))
        .map(|target| target.name)
        .collect())
}

fn build_with(words: &[&str], profile: &[&str]) -> Result<Vec<Program>> {
    let mut command = cargo(words);
    command.args(profile).arg("--message-format=json-render-diagnostics");
    let name = sh::describe(&command);
    // Progress and compiler messages go to standard error.
    let child = command.stdout(Stdio::piped()).spawn().with_context(|| format!("cannot run {name}"))?;
    let deadline = std::thread::spawn(move || child.wait_with_output());
    let output =
        sh::wait_for(&name, BUILD_LIMIT, || Ok(deadline.is_finished().then_some(()))).and_then(|()| {
            Ok(deadline.join().map_err(|_| anyhow::anyhow!("{name}: cannot read its output"))??)
        })?;
    if !output.status.success() {
        bail!("{name}: {}", output.status);
    }
    Ok(executables(&String::from_utf8_lossy(&output.stdout)))
}

/// Executables in cargo's messages, one JSON object per line.
fn executables(messages: &str) -> Vec<Program> {
    #[derive(Deserialize)]
    struct Message {
        executable: Option<PathBuf>,
        target: Target,
    }
    #[derive(Deserialize)]
    struct Target {
        name: String,
    }
    messages
        .lines()
        .filter_map(|line| serde_json::from_str::<Message>(line).ok())
        .filter_map(|message| Some(Program { name: message.target.name, path: message.executable? }))
        .collect()
}

/// Copies `programs` to `directory` without debug information, since a VM reads files slowly.
pub(crate) fn stage(programs: &[Program], directory: &Path) -> Result<()> {
    std::fs::create_dir_all(directory)?;
    for program in programs {
        let mut strip = Command::new(sh::which("strip")?);
        strip.arg("--strip-debug").arg("-o").arg(directory.join(&program.name)).arg(&program.path);
        sh::capture(&mut strip, Duration::from_secs(60))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_executables_in_messages_of_cargo() {
        let messages = r#"{"reason":"compiler-artifact","target":{"name":"anyhow"},"executable":null}
{"reason":"compiler-artifact","target":{"name":"lab","kind":["bin"]},"executable":"/t/lab/lab"}
not json
{"reason":"build-finished","success":true}"#;
        assert_eq!(executables(messages), [Program { name: "lab".into(), path: "/t/lab/lab".into() }]);
    }

    #[test]
    fn the_workspace_is_the_one_with_the_engine() {
        assert!(workspace().join("engine/Cargo.toml").exists());
    }
}
