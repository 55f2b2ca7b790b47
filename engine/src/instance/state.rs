//! What must outlive the daemon: which instances and devices there are, so that a daemon that was
//! killed can take its devices back.
//!
//! One JSON file an instance and one a device, below `.state` in the run directory, replaced
//! whole. They live as long as the kernel does, as the devices do: the run directory is volatile.

use std::fs;
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::spec::{AttachSpec, DataPath, InstanceSpec};
use crate::error::{Error, Kind, Result};
use crate::image::Identity;

/// What is needed to take a device back.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DeviceRecord {
    /// How it was attached; `number` and `data_path` are filled in.
    pub spec: AttachSpec,
    /// Its number at the driver.
    pub id: u32,
    /// The mark that the driver keeps for it.
    pub mark: u64,
    /// The image, to know it again.
    pub identity: Identity,
    /// How data travels.
    pub data_path: DataPath,
    /// Queues, as granted.
    pub queues: u16,
    /// Queue depth.
    pub depth: u16,
    /// Logical block size that it was started with: it cannot change.
    pub block_size: u32,
    /// Bytes.
    pub size: u64,
}

/// An instance and its devices by number, as a daemon before this one left them.
pub type Remembered = (InstanceSpec, Vec<(u32, DeviceRecord)>);

/// The directory of these files.
#[derive(Clone, Debug)]
pub struct StateDir(PathBuf);

impl StateDir {
    /// Below `run_dir`; made when first written to.
    pub fn new(run_dir: &Path) -> Self {
        Self(run_dir.join(".state"))
    }

    fn instance_dir(&self, instance: &str) -> PathBuf {
        self.0.join(instance)
    }

    fn device_file(&self, instance: &str, number: u32) -> PathBuf {
        self.instance_dir(instance).join(format!("loop{number}.json"))
    }

    /// Notes an instance.
    pub fn save_instance(&self, spec: &InstanceSpec) -> Result<()> {
        let dir = self.instance_dir(&spec.name);
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&dir)
            .map_err(|error| Error::os(error, format!("cannot make {}", dir.display())))?;
        replace(&dir.join("instance.json"), spec)
    }

    /// Forgets an instance and its devices.
    pub fn remove_instance(&self, name: &str) {
        let _ = fs::remove_dir_all(self.instance_dir(name));
        let _ = fs::remove_dir(&self.0);
    }

    /// Notes a device.
    pub fn save_device(&self, number: u32, record: &DeviceRecord) -> Result<()> {
        replace(&self.device_file(&record.spec.instance, number), record)
    }

    /// Forgets a device.
    pub fn remove_device(&self, instance: &str, number: u32) {
        let _ = fs::remove_file(self.device_file(instance, number));
    }

    /// Everything noted: instances with their devices by number. What cannot be read is left out
    /// and described.
    pub fn load(&self) -> (Vec<Remembered>, Vec<String>) {
        let mut found = Vec::new();
        let mut notes = Vec::new();
        for dir in subdirectories(&self.0) {
            let spec: InstanceSpec = match read(&dir.join("instance.json")) {
                Ok(spec) => spec,
                Err(error) => {
                    notes.push(format!("state of {} was not read: {error}", dir.display()));
                    continue;
                }
            };
            let mut devices = Vec::new();
            for entry in fs::read_dir(&dir).into_iter().flatten().flatten() {
                let name = entry.file_name();
                let number = name
                    .to_str()
                    .and_then(|name| name.strip_prefix("loop")?.strip_suffix(".json")?.parse().ok());
                let Some(number) = number else { continue };
                match read(&entry.path()) {
                    Ok(record) => devices.push((number, record)),
                    Err(error) => {
                        notes.push(format!("state of {} was not read: {error}", entry.path().display()))
                    }
                }
            }
            devices.sort_by_key(|(number, _)| *number);
            found.push((spec, devices));
        }
        found.sort_by(|(a, _), (b, _)| a.name.cmp(&b.name));
        (found, notes)
    }
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

fn replace(path: &Path, value: &impl Serialize) -> Result<()> {
    let failed = |error: std::io::Error| Error::os(error, format!("cannot write {}", path.display()));
    let text = serde_json::to_vec_pretty(value)
        .map_err(|error| Error::new(Kind::Internal, format!("cannot write {}: {error}", path.display())))?;
    let temporary = path.with_extension("new");
    let mut file = fs::File::options()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&temporary)
        .map_err(failed)?;
    file.write_all(&text).map_err(failed)?;
    fs::rename(&temporary, path).map_err(failed)
}

fn read<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let text = fs::read(path).map_err(|error| Error::os(error, "cannot be read"))?;
    serde_json::from_slice(&text).map_err(|error| Error::new(Kind::Invalid, error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> DeviceRecord {
        let spec = AttachSpec {
            instance: "ci".into(),
            path: "/images/a.img".into(),
            number: Some(3),
            read_only: false,
            offset: 0,
            size_limit: 0,
            block_size: 0,
            buffered: false,
            queues: 0,
            depth: 0,
            data_path: None,
        };
        let identity = Identity { dev: 1, ino: 2, rdev: 0, born_ns: 9 };
        let data_path = DataPath::Batch;
        DeviceRecord {
            spec,
            id: 7,
            mark: 11,
            identity,
            data_path,
            queues: 2,
            depth: 128,
            block_size: 512,
            size: 1 << 20,
        }
    }

    #[test]
    fn what_is_saved_is_found_and_what_is_broken_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::new(dir.path());
        assert_eq!(state.load().0.len(), 0);
        let spec = InstanceSpec { name: "ci".into(), max_devices: 4, workers: 2, cpus: None };
        state.save_instance(&spec).unwrap();
        state.save_device(3, &record()).unwrap();
        fs::write(dir.path().join(".state/ci/loop4.json"), "{").unwrap();
        let (found, notes) = state.load();
        assert_eq!(found, [(spec, vec![(3, record())])]);
        assert_eq!(notes.len(), 1, "{notes:?}");
        state.remove_instance("ci");
        assert_eq!(state.load().0.len(), 0);
    }
}
