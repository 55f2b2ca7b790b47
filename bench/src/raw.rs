// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Raw files of a run: what fio and the other measurements reported, one JSON file per step.
//!
//! ```text
//!   run, measure ── write ── DIR/raw/ ── pack ── DIR/raw.tar.gz ── open ── collect
//! ```
//! A run writes into `raw/`, so that `--resume` can continue. A complete run packs the directory
//! into one archive. Knows file names and formats; measures nothing and draws no conclusions.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::cost::Spent;
use crate::outcome::{JobInfo, Manifest, TargetInfo, Warning};
use crate::window::Window;
use crate::{handover, sh};

/// Directory of the raw files below the directory of a result.
pub const DIRECTORY: &str = "raw";
/// The same files in one archive.
pub const ARCHIVE: &str = "raw.tar.gz";

/// File with the [`Facts`].
pub const FACTS: &str = "facts.json";
/// File with the times of attaching and detaching.
pub const ATTACH: &str = "attach.json";
/// File with the cost of idle devices.
pub const IDLE: &str = "idle.json";
const ROUND_PREFIX: &str = "round-";

const TAR_LIMIT: Duration = Duration::from_secs(300);

/// What a run knows before its first round.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub struct Facts {
    pub manifest: Manifest,
    pub warnings: Vec<Warning>,
    pub targets: Vec<TargetInfo>,
    pub jobs: Vec<JobInfo>,
}

/// One job in one round.
#[derive(Debug, Serialize, Deserialize)]
pub struct Round {
    pub round: u32,
    pub job: String,
    /// Reports of fio: one for all targets, or one per target if fio had to be started for each.
    pub fio: Vec<Value>,
    /// CPU time of the processes that serve the targets, ramp included, by target.
    pub spent: BTreeMap<String, Spent>,
    /// Why fio failed, by target.
    pub failed: BTreeMap<String, String>,
    /// Windows that were marked for a profile, in their order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub windows: Vec<Window>,
}

/// Name of the file of `job` in `round`.
pub fn round_file(round: u32, job: &str) -> String {
    format!("{ROUND_PREFIX}{round:02}-{job}.json")
}

/// Names of the files of rounds in `raw`, in their order.
pub fn round_files(raw: &Path) -> Result<Vec<String>> {
    let entries = fs::read_dir(raw).with_context(|| format!("cannot read {}", raw.display()))?;
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let mut names: Vec<String> =
        names.filter(|name| name.starts_with(ROUND_PREFIX) && name.ends_with(".json")).collect();
    names.sort();
    Ok(names)
}

/// Reads a raw file; `None` if it does not exist.
pub fn read<T: DeserializeOwned>(raw: &Path, name: &str) -> Result<Option<T>> {
    match fs::read(raw.join(name)) {
        Ok(bytes) => Ok(Some(serde_json::from_slice(&bytes).with_context(|| format!("{name} is damaged"))?)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("cannot read {name}")),
    }
}

/// Writes a raw file atomically, and sends it out of a sealed machine.
pub fn write<T: Serialize>(raw: &Path, name: &str, value: &T) -> Result<()> {
    let bytes = serde_json::to_vec(value)?;
    keep(raw, name, &bytes)?;
    handover::send(name, &bytes).with_context(|| format!("cannot send {name} to the host"))
}

/// Writes the bytes of a raw file atomically: an interrupted run leaves no truncated file.
pub fn keep(raw: &Path, name: &str, bytes: &[u8]) -> Result<()> {
    let (path, new) = (raw.join(name), raw.join(format!("{name}.new")));
    fs::write(&new, bytes)
        .and_then(|()| fs::rename(&new, &path))
        .with_context(|| format!("cannot write {}", path.display()))
}

/// A directory of raw files; it is temporary if they were unpacked.
pub struct RawFiles {
    path: PathBuf,
    _unpacked: Option<tempfile::TempDir>,
}

impl RawFiles {
    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// Whether the result in `dir` has raw files, packed or not.
pub fn exist(dir: &Path) -> bool {
    dir.join(DIRECTORY).join(FACTS).exists() || dir.join(ARCHIVE).exists()
}

/// Opens the raw files of the result in `dir`: the directory if there is one, else the archive.
pub fn open(dir: &Path) -> Result<RawFiles> {
    let path = dir.join(DIRECTORY);
    if path.exists() {
        return Ok(RawFiles { path, _unpacked: None });
    }
    if !dir.join(ARCHIVE).exists() {
        bail!("{} is not a result: it has neither {DIRECTORY}/ nor {ARCHIVE}", dir.display());
    }
    let unpacked = tempfile::Builder::new().prefix("loopbench-raw-").tempdir()?;
    extract(dir, unpacked.path())?;
    Ok(RawFiles { path: unpacked.path().join(DIRECTORY), _unpacked: Some(unpacked) })
}

/// Packs `dir/raw` into one archive and removes the directory.
///
/// The same files make the same archive: names are sorted, owners and times are fixed.
pub fn pack(dir: &Path) -> Result<()> {
    let (archive, new) = (dir.join(ARCHIVE), dir.join(format!("{ARCHIVE}.new")));
    let mut tar = Command::new("tar");
    tar.args(["--format=ustar", "--sort=name", "--mtime=@0", "--owner=0", "--group=0", "--numeric-owner"]);
    tar.args(["--mode=u=rwX,go=rX", "--use-compress-program=gzip -9n", "-C"]).arg(dir);
    tar.arg("-cf").arg(&new).arg(DIRECTORY);
    sh::capture(&mut tar, TAR_LIMIT)?;
    fs::rename(&new, &archive).with_context(|| format!("cannot write {}", archive.display()))?;
    fs::remove_dir_all(dir.join(DIRECTORY)).with_context(|| format!("cannot remove {}/raw", dir.display()))
}

/// Restores `dir/raw` from the archive, if there is only the archive.
pub fn unpack(dir: &Path) -> Result<()> {
    if dir.join(DIRECTORY).exists() || !dir.join(ARCHIVE).exists() {
        return Ok(());
    }
    let unpacked = tempfile::Builder::new().prefix(".raw-").tempdir_in(dir)?;
    extract(dir, unpacked.path())?;
    fs::rename(unpacked.path().join(DIRECTORY), dir.join(DIRECTORY))?;
    Ok(())
}

/// Removes the raw files of the result in `dir`.
pub fn remove(dir: &Path) -> Result<()> {
    let (raw, archive) = (dir.join(DIRECTORY), dir.join(ARCHIVE));
    if raw.exists() {
        fs::remove_dir_all(&raw).with_context(|| format!("cannot remove {}", raw.display()))?;
    }
    if archive.exists() {
        fs::remove_file(&archive).with_context(|| format!("cannot remove {}", archive.display()))?;
    }
    Ok(())
}

fn extract(dir: &Path, to: &Path) -> Result<()> {
    let mut tar = Command::new("tar");
    tar.args(["--no-same-owner", "-xzf"]).arg(dir.join(ARCHIVE)).arg("-C").arg(to).arg(DIRECTORY);
    sh::capture(&mut tar, TAR_LIMIT).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_it_wrote_and_rejects_damaged_files() {
        let raw = tempfile::tempdir().unwrap();
        write(raw.path(), "a.json", &vec![1, 2]).unwrap();
        assert_eq!(read::<Vec<u32>>(raw.path(), "a.json").unwrap(), Some(vec![1, 2]));
        assert!(read::<Vec<u32>>(raw.path(), "none.json").unwrap().is_none());
        fs::write(raw.path().join("b.json"), "[1,").unwrap();
        assert!(read::<Vec<u32>>(raw.path(), "b.json").unwrap_err().to_string().contains("b.json"));
    }

    #[test]
    fn opens_the_directory_and_the_archive_alike() {
        let dir = tempfile::tempdir().unwrap();
        assert!(!exist(dir.path()) && open(dir.path()).is_err());
        let raw = dir.path().join(DIRECTORY);
        fs::create_dir(&raw).unwrap();
        write(&raw, FACTS, &1).unwrap();
        write(&raw, &round_file(3, "j"), &2).unwrap();
        let names = |opened: &RawFiles| round_files(opened.path()).unwrap();
        let before = names(&open(dir.path()).unwrap());
        pack(dir.path()).unwrap();
        assert!(exist(dir.path()) && !raw.exists());
        let opened = open(dir.path()).unwrap();
        assert_eq!(names(&opened), before);
        assert_eq!(read::<u32>(opened.path(), FACTS).unwrap(), Some(1));
        unpack(dir.path()).unwrap();
        assert_eq!(read::<u32>(&raw, FACTS).unwrap(), Some(1));
        remove(dir.path()).unwrap();
        assert!(!exist(dir.path()));
    }

    #[test]
    fn the_same_files_make_the_same_archive() {
        let archives = [0, 1].map(|_| {
            let dir = tempfile::tempdir().unwrap();
            fs::create_dir(dir.path().join(DIRECTORY)).unwrap();
            write(&dir.path().join(DIRECTORY), FACTS, &"x").unwrap();
            pack(dir.path()).unwrap();
            fs::read(dir.path().join(ARCHIVE)).unwrap()
        });
        assert!(archives[0] == archives[1]);
    }
}
