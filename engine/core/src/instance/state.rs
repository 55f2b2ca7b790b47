// SPDX-License-Identifier: Apache-2.0 OR MIT
//! State that outlives the daemon: its instances and devices, so that the next daemon can recover
//! them.
//!
//! There is one JSON file per instance and one per device, below `.state` in the run directory,
//! replaced atomically, with a format version. Files that cannot be read are reported, never
//! dropped. They live as long as the kernel does, as the devices do: the run directory is volatile.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::Value;

use super::spec::{AttachSpec, InstanceSpec, IoMode};
use crate::error::{Error, Kind, Result};
use crate::frontend::DeviceParameters;
use crate::image::Identity;

/// The record needed to recover a device.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DeviceRecord {
    /// How it was attached; `number` and `io_mode` are filled in.
    pub spec: AttachSpec,
    /// Its id at the driver.
    pub id: u32,
    /// Its owner cookie at the driver.
    pub owner_cookie: u64,
    /// The identity of the image.
    pub identity: Identity,
    /// I/O mode.
    pub io_mode: IoMode,
    /// Queues, as granted.
    pub queues: u16,
    /// Queue depth.
    pub depth: u16,
    /// Logical block size that it was started with: it cannot change.
    pub block_size: u32,
    /// Bytes.
    pub size: u64,
    /// When it was attached, in seconds since 1970; none: not recorded.
    #[serde(default)]
    pub since: Option<u64>,
}

impl DeviceRecord {
    /// The name of its disk.
    pub fn disk(&self) -> String {
        self.io_mode.backend().disk(self.id)
    }

    /// Its parameters.
    pub fn parameters(&self) -> DeviceParameters {
        let DeviceRecord { io_mode, queues, depth, owner_cookie, .. } = *self;
        DeviceParameters {
            io_mode,
            queues,
            depth,
            owner_cookie,
            recoverable: true,
            partscan: self.spec.partscan,
        }
    }
}

/// The saved state of an instance and its devices.
#[derive(Debug)]
pub struct SavedInstance {
    /// The instance's name.
    pub name: String,
    /// Its limits, or why they cannot be read.
    pub spec: Result<InstanceSpec>,
    /// Records, or why they cannot be read.
    pub devices: Vec<(u32, Result<DeviceRecord>)>,
}

/// Version of the file format. A file without a version has the first.
const VERSION: u64 = 1;
/// Maximum size of a file.
const FILE_MAX: u64 = 1 << 20;

/// The directory of these files.
#[derive(Clone, Debug)]
pub struct StateDir(PathBuf);

impl StateDir {
    /// Below `run_dir`; created on first use.
    pub fn new(run_dir: &Path) -> Self {
        Self(run_dir.join(".state"))
    }

    fn instance_dir(&self, instance: &str) -> PathBuf {
        self.0.join(instance)
    }

    fn device_file(&self, instance: &str, number: u32) -> PathBuf {
        self.instance_dir(instance).join(format!("loop{number}.json"))
    }

    /// Saves an instance.
    pub fn save_instance(&self, spec: &InstanceSpec) -> Result<()> {
        let dir = self.instance_dir(&spec.name);
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&dir)
            .map_err(|error| Error::os(error, format!("cannot make {}", dir.display())))?;
        replace(&dir.join("instance.json"), spec)
    }

    /// Removes an instance and its devices.
    pub fn remove_instance(&self, name: &str) {
        let _ = fs::remove_dir_all(self.instance_dir(name));
        let _ = fs::remove_dir(&self.0);
    }

    /// Saves a device.
    pub fn save_device(&self, number: u32, record: &DeviceRecord) -> Result<()> {
        replace(&self.device_file(&record.spec.instance, number), record)
    }

    /// Removes a device.
    pub fn remove_device(&self, instance: &str, number: u32) {
        let _ = fs::remove_file(self.device_file(instance, number));
    }

    /// All saved state, by name and number.
    pub fn load(&self) -> Vec<SavedInstance> {
        let mut found: Vec<_> = subdirectories(&self.0).iter().filter_map(|dir| load_instance(dir)).collect();
        found.sort_by(|a, b| a.name.cmp(&b.name));
        found
    }
}

fn load_instance(dir: &Path) -> Option<SavedInstance> {
    let name = dir.file_name()?.to_str()?.to_owned();
    let mut devices = Vec::new();
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let file = entry.file_name();
        let number =
            file.to_str().and_then(|file| file.strip_prefix("loop")?.strip_suffix(".json")?.parse().ok());
        devices.extend(number.map(|number: u32| (number, read(&entry.path()))));
    }
    devices.sort_by_key(|(number, _)| *number);
    Some(SavedInstance { name, spec: read(&dir.join("instance.json")), devices })
}

fn subdirectories(dir: &Path) -> Vec<PathBuf> {
    fs::read_dir(dir)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.is_dir())
        .collect()
}

/// Replaces a file atomically: a crash leaves the old or the new one. A file with the right content
/// is left alone: recovery must work with a full run directory.
fn replace(path: &Path, value: &impl Serialize) -> Result<()> {
    let failed = |error: serde_json::Error| {
        Error::new(Kind::Internal, format!("cannot write {}: {error}", path.display()))
    };
    let mut value = serde_json::to_value(value).map_err(failed)?;
    if let Value::Object(fields) = &mut value {
        fields.insert("version".to_owned(), VERSION.into());
    }
    let text = serde_json::to_vec_pretty(&value).map_err(failed)?;
    if read_bytes(path).is_ok_and(|present| present == text) {
        return Ok(());
    }
    let temporary = path.with_extension("new");
    let written = write_whole(&temporary, path, &text);
    written.map_err(|error| {
        let _ = fs::remove_file(&temporary);
        let directory = path.parent().unwrap_or(path).display();
        match error.kind() {
            std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => {
                Error::os(error, format!("the file system of {directory} is full"))
                    .hint("free space there, and try again")
            }
            _ => Error::os(error, format!("cannot write {}", path.display())),
        }
    })
}

fn write_whole(temporary: &Path, path: &Path, text: &[u8]) -> std::io::Result<()> {
    // A file that a crash left may be of any kind.
    let _ = fs::remove_file(temporary);
    let mut file = File::options().write(true).create_new(true).mode(0o600).open(temporary)?;
    file.write_all(text)?;
    file.sync_all()?;
    fs::rename(temporary, path)?;
    path.parent().map_or(Ok(()), |directory| File::open(directory)?.sync_all())
}

fn read<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let shown = path.display();
    let unreadable = |why: String| Error::new(Kind::Invalid, format!("state file {shown} {why}"));
    let text = read_bytes(path)?;
    let mut value: Value =
        serde_json::from_slice(&text).map_err(|error| unreadable(format!("is not JSON: {error}")))?;
    let version = value.as_object_mut().and_then(|fields| fields.remove("version"));
    if version.as_ref().is_some_and(|version| version.as_u64() != Some(VERSION)) {
        let version = version.unwrap_or_default();
        return Err(unreadable(format!(
            "has format version {version}; this program reads version {VERSION}"
        )));
    }
    serde_json::from_value(value).map_err(|error| unreadable(format!("has invalid contents: {error}")))
}

/// Reads a file that only the daemon's user can have written.
fn read_bytes(path: &Path) -> Result<Vec<u8>> {
    let shown = path.display();
    let failed = |error: std::io::Error| Error::os(error, format!("state file {shown} cannot be read"));
    // Neither blocks on a pipe nor follows a link.
    let flags = libc::O_NONBLOCK | libc::O_NOFOLLOW;
    let file = File::options().read(true).custom_flags(flags).open(path).map_err(failed)?;
    let meta = file.metadata().map_err(failed)?;
    let user = rustix::process::geteuid().as_raw();
    let wrong = match (meta.is_file(), meta.uid(), meta.mode() & 0o022) {
        (false, _, _) => "is not a regular file".to_owned(),
        (_, owner, _) if owner != user => format!("belongs to user {owner}"),
        (_, _, 1..) => format!("is writable by others (mode {:o})", meta.mode() & 0o7777),
        _ if meta.len() > FILE_MAX => "is too large".to_owned(),
        _ => {
            let mut text = Vec::new();
            file.take(FILE_MAX).read_to_end(&mut text).map_err(failed)?;
            return Ok(text);
        }
    };
    Err(Error::new(Kind::Invalid, format!("state file {shown} {wrong}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> DeviceRecord {
        let spec = AttachSpec {
            instance: "ci".into(),
            path: "/images/a.img".into(),
            number: Some(3),
            ..AttachSpec::default()
        };
        let identity = Identity { dev: 1, ino: 2, rdev: 0, btime_ns: 9 };
        let io_mode = IoMode::Batch;
        DeviceRecord {
            spec,
            id: 7,
            owner_cookie: 11,
            identity,
            io_mode,
            queues: 2,
            depth: 128,
            block_size: 512,
            size: 1 << 20,
            since: Some(1),
        }
    }

    fn saved(dir: &Path) -> (StateDir, InstanceSpec) {
        let state = StateDir::new(dir);
        let spec = InstanceSpec { name: "ci".into(), max_devices: 4, workers: 2, cpus: None, backend: None };
        state.save_instance(&spec).unwrap();
        state.save_device(3, &record()).unwrap();
        (state, spec)
    }

    /// Why the only device cannot be read.
    fn reason(state: &StateDir) -> String {
        let [SavedInstance { devices, .. }] = &state.load()[..] else { panic!("one instance") };
        devices[0].1.as_ref().unwrap_err().to_string()
    }

    #[test]
    fn loads_saved_state_and_reports_broken_files() {
        let dir = tempfile::tempdir().unwrap();
        assert!(StateDir::new(dir.path()).load().is_empty());
        let (state, spec) = saved(dir.path());
        fs::write(dir.path().join(".state/ci/loop4.json"), "{").unwrap();
        let found = state.load();
        assert_eq!((found.len(), found[0].name.as_str()), (1, "ci"));
        assert_eq!(*found[0].spec.as_ref().unwrap(), spec);
        assert_eq!((found[0].devices[0].0, found[0].devices[0].1.as_ref().unwrap()), (3, &record()));
        assert!(found[0].devices[1].1.is_err());
        fs::write(dir.path().join(".state/ci/instance.json"), "").unwrap();
        assert!(state.load()[0].spec.is_err());
        state.remove_instance("ci");
        assert!(state.load().is_empty());
    }

    #[test]
    fn reports_why_state_is_unreadable() {
        let dir = tempfile::tempdir().unwrap();
        let (state, _) = saved(dir.path());
        let file = dir.path().join(".state/ci/loop3.json");
        let good = fs::read_to_string(&file).unwrap();
        let mode = |mode| fs::set_permissions(&file, std::os::unix::fs::PermissionsExt::from_mode(mode));
        for (text, says) in [
            ("garbage".to_owned(), "not JSON"),
            (good[..good.len() / 2].to_owned(), "not JSON"),
            (String::new(), "not JSON"),
            (good.replace("\"version\": 1", "\"version\": 2"), "version 2"),
            (good.replace("\"version\": 1", "\"version\": \"x\""), "version"),
            ("{}".to_owned(), "invalid contents"),
            ("[]".to_owned(), "invalid contents"),
        ] {
            fs::write(&file, text).unwrap();
            assert!(reason(&state).contains(says), "{says}: {}", reason(&state));
        }
        fs::write(&file, &good).unwrap();
        mode(0o620).unwrap();
        assert!(reason(&state).contains("writable by others"), "{}", reason(&state));
        fs::remove_file(&file).unwrap();
        rustix::fs::mkfifoat(rustix::fs::CWD, &file, rustix::fs::Mode::RUSR).unwrap();
        assert!(reason(&state).contains("not a regular file"), "{}", reason(&state));
        fs::remove_file(&file).unwrap();
        std::os::unix::fs::symlink("/dev/zero", &file).unwrap();
        assert!(reason(&state).contains("cannot be read"), "{}", reason(&state));
        // Without a version: written before there was one.
        fs::remove_file(&file).unwrap();
        fs::write(&file, good.replace("\"version\": 1", "\"older\": 1")).unwrap();
        mode(0o600).unwrap();
        assert_eq!(*state.load()[0].devices[0].1.as_ref().unwrap(), record());
    }

    #[test]
    fn a_failed_write_leaves_the_old_file_and_no_other() {
        let dir = tempfile::tempdir().unwrap();
        let (state, _) = saved(dir.path());
        let at = dir.path().join(".state/ci");
        // A directory of its name cannot be replaced.
        fs::create_dir(at.join("loop5.json")).unwrap();
        let error = state.save_device(5, &record()).unwrap_err();
        assert!(error.message().contains("loop5.json"), "{error}");
        assert!(!at.join("loop5.new").exists());
        let before = fs::metadata(at.join("loop3.json")).unwrap().ino();
        state.save_device(3, &record()).unwrap();
        assert_eq!(fs::metadata(at.join("loop3.json")).unwrap().ino(), before, "written again");
        state.save_device(3, &DeviceRecord { id: 8, ..record() }).unwrap();
        assert_eq!(state.load()[0].devices[0].1.as_ref().unwrap().id, 8);
    }
}
