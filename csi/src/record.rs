// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What is known of a volume or snapshot: one JSON file beside its image.
//!
//! A record is written to a temporary file, synced and renamed, so that a crash leaves the old one or the
//! new one. A record that cannot be read is reported, and neither it nor its image is changed.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::parameters::Parameters;

/// Maximum length of names and identifiers.
pub const ID_MAX: usize = 128;
/// Maximum size of a record.
const RECORD_MAX: u64 = 64 << 10;

/// How far a volume or snapshot is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// Its image is being made, under another name. `inode` is its number.
    Creating,
    /// It can be used.
    Ready,
    /// It is being deleted.
    Deleting,
}

/// Where the content of a volume or snapshot comes from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Source {
    Volume(String),
    Snapshot(String),
}

/// What is known of a volume or snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Record {
    pub version: u32,
    /// The name that the caller gave.
    pub name: String,
    pub state: State,
    /// Inode of the image that is being made; 0: none is.
    #[serde(default)]
    pub inode: u64,
    /// Bytes.
    pub size: u64,
    /// Bytes to which the image grows now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub growing: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<Source>,
    /// Parameters of its class, as given.
    #[serde(default)]
    pub given: BTreeMap<String, String>,
    #[serde(default)]
    pub parameters: Parameters,
    /// What it holds: a file system, or "block" once a pod had the device. None: nothing yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub content: Option<String>,
    /// The file system that is being made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub formatting: Option<String>,
    /// It ends when it is unpublished.
    #[serde(default)]
    pub ephemeral: bool,
    /// Nanoseconds since 1970.
    pub created_ns: i64,
}

/// A directory of images and their records.
#[derive(Debug)]
pub struct Store {
    directory: PathBuf,
}

/// What lies in the directory for an identifier.
#[derive(Debug)]
pub enum Found {
    Nothing,
    Record(Box<Record>),
    /// The record cannot be read, for this reason.
    Damaged(String),
}

impl Store {
    pub fn open(directory: PathBuf) -> io::Result<Store> {
        fs::create_dir_all(&directory)?;
        Ok(Store { directory: directory.canonicalize()? })
    }

    pub fn directory(&self) -> &Path {
        &self.directory
    }

    pub fn image(&self, id: &str) -> PathBuf {
        self.directory.join(format!("{id}.img"))
    }

    /// Where the image is while it is being made.
    pub fn unfinished(&self, id: &str) -> PathBuf {
        self.directory.join(format!("{id}.img.new"))
    }

    pub fn record(&self, id: &str) -> PathBuf {
        self.directory.join(format!("{id}.json"))
    }

    pub fn load(&self, id: &str) -> Found {
        if !is_id(id) {
            return Found::Nothing;
        }
        let path = self.record(id);
        let text = match fs::symlink_metadata(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Found::Nothing,
            Ok(meta) if !meta.is_file() || meta.len() > RECORD_MAX => {
                return Found::Damaged(format!("{} is no record", path.display()));
            }
            _ => fs::read(&path),
        };
        let record = text.and_then(|text| Ok(serde_json::from_slice::<Record>(&text)?));
        match record {
            Ok(record) if record.version == 1 && id_of(&record.name) == id => Found::Record(record.into()),
            Ok(_) => Found::Damaged(format!("{} belongs to another volume or version", path.display())),
            Err(error) => Found::Damaged(format!("cannot read {}: {error}", path.display())),
        }
    }

    /// Writes the record; it is durable afterwards.
    pub fn save(&self, record: &Record) -> io::Result<()> {
        let path = self.record(&id_of(&record.name));
        let temporary = path.with_extension("json.new");
        let mut file = File::create(&temporary)?;
        file.write_all(&serde_json::to_vec_pretty(record)?)?;
        file.sync_all()?;
        fs::rename(&temporary, &path)?;
        self.sync()
    }

    pub fn sync(&self) -> io::Result<()> {
        File::open(&self.directory)?.sync_all()
    }

    /// All identifiers that have a record, in order.
    pub fn ids(&self) -> io::Result<Vec<String>> {
        let mut ids = Vec::new();
        for entry in fs::read_dir(&self.directory)? {
            let name = entry?.file_name();
            let id = name.to_str().and_then(|name| name.strip_suffix(".json"));
            ids.extend(id.filter(|id| is_id(id)).map(str::to_owned));
        }
        ids.sort_unstable();
        Ok(ids)
    }

    /// Why the image is not what the record says; none: it is.
    pub fn fault(&self, record: &Record) -> Option<String> {
        let image = self.image(&id_of(&record.name));
        let meta = match fs::symlink_metadata(&image) {
            Ok(meta) => meta,
            Err(error) if error.kind() == ErrorKind::NotFound => {
                return Some(format!("the image {} is gone", image.display()));
            }
            Err(error) => return Some(format!("cannot see {}: {error}", image.display())),
        };
        if !meta.is_file() {
            return Some(format!("{} is no regular file", image.display()));
        }
        let size = record.size;
        if meta.len() != size && record.growing != Some(meta.len()) {
            return Some(format!("the image {} has {} bytes instead of {size}", image.display(), meta.len()));
        }
        None
    }

    /// Bytes that the volumes here may still need: of each, what its image does not occupy yet.
    pub fn promised(&self) -> io::Result<u64> {
        let mut sum = 0u64;
        for id in self.ids()? {
            if let Found::Record(record) = self.load(&id) {
                let image =
                    if record.state == State::Creating { self.unfinished(&id) } else { self.image(&id) };
                let occupied = fs::metadata(image).map_or(0, |meta| meta.blocks() * 512);
                let size = record.growing.unwrap_or(record.size);
                sum = sum.saturating_add(size.saturating_sub(occupied));
            }
        }
        Ok(sum)
    }
}

/// True if `text` can be an identifier, and so a part of a file's name.
pub fn is_id(text: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    !text.is_empty() && text.len() <= ID_MAX && text.bytes().all(allowed) && !text.starts_with(['.', '-'])
}

/// The identifier for a name: the name itself where it can be one. Names that differ have
/// identifiers that differ, up to collisions of a hash, which [`Store::load`] detects.
pub fn id_of(name: &str) -> String {
    // A name that looks like an identifier made below gets another one.
    if is_id(name) && !name.starts_with("name-") && name == name.to_ascii_lowercase() {
        return name.to_owned();
    }
    let words: String = name.chars().filter(char::is_ascii_alphanumeric).take(40).collect();
    format!("name-{words}-{:016x}", loopengine::hash::fnv1a(name.as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_has_an_identifier_of_its_own() {
        let long = "ü".repeat(64);
        let names = ["pvc-1", "PVC-1", "a/b", "a b", "../x", ".", "-", "name-x-1", "日本", &long, "a\tb"];
        let ids: std::collections::HashSet<String> = names.iter().map(|name| id_of(name)).collect();
        assert_eq!(ids.len(), names.len());
        assert!(ids.iter().all(|id| is_id(id)), "{ids:?}");
        assert_eq!(id_of("pvc-1"), "pvc-1");
    }

    #[test]
    fn a_half_written_record_is_damaged_and_stays() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path().into()).unwrap();
        for text in ["", "{", "{\"version\":1,\"name\":\"a\"", "{\"version\":2}", "[]"] {
            fs::write(store.record("a"), text).unwrap();
            assert!(matches!(store.load("a"), Found::Damaged(_)), "{text}");
            assert_eq!(fs::read_to_string(store.record("a")).unwrap(), text);
        }
        assert!(matches!(store.load("b"), Found::Nothing));
        assert!(matches!(store.load("../a"), Found::Nothing));
    }
}
