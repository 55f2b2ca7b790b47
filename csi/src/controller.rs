// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Makes and deletes volumes.

use std::path::PathBuf;
use std::sync::PoisonError;
use std::time::SystemTime;

use rustix::fs::{CWD, Mode, OFlags, openat, statvfs, syncfs};
use tonic::Status;

use crate::capability::{Kind, Use};
use crate::image::{self, Content};
use crate::locks::Lock;
use crate::messages::*;
use crate::node::cannot_read_mounts;
use crate::parameters::{self, Parameters};
use crate::record::{Found, ID_MAX, Record, Source, State, Store, id_of};
use crate::{Driver, damaged, engine, failed, mounts, ready, required};

/// Volumes are a multiple of this.
const UNIT: u64 = 4096;
const DEFAULT_SIZE: u64 = 1 << 30;
const MIN: u64 = 8 << 20;
/// What mkfs.xfs accepts.
const MIN_XFS: u64 = 300 << 20;
const MAX: u64 = 1 << 50;

/// A source of content, which stays as it is while this exists.
pub(crate) struct Origin {
    pub record: Record,
    pub image: PathBuf,
    pub in_use: bool,
    _lock: Lock,
}

impl Driver {
    pub(crate) fn create_volume(&self, request: CreateVolumeRequest) -> Result<CreateVolumeResponse, Status> {
        check_name("name", &request.name)?;
        let parameters =
            Parameters::parse("parameters", &request.parameters).map_err(Status::invalid_argument)?;
        if !request.mutable_parameters.is_empty() {
            return Err(Status::invalid_argument("mutable_parameters: a volume cannot be modified"));
        }
        let uses = Use::parse_all(&request.volume_capabilities, &parameters)?;
        let source = source(request.volume_content_source)?;
        self.check_topology(request.accessibility_requirements)?;
        let id = id_of(&request.name);
        let _lock = self.locks.write(format!("volume {id}"))?;
        let given = parameters::own(&request.parameters);
        if let Some(record) = self.existing(&self.volumes, &id)? {
            let size = Range::parse(request.capacity_range)?;
            let differs = [
                ("volume_content_source", record.source != source),
                ("parameters", record.given != given),
                ("capacity_range", !size.contains(record.size)),
            ];
            if let Some((field, _)) = differs.iter().find(|(_, differs)| *differs) {
                return Err(Status::already_exists(format!("the volume {id} exists, with another {field}")));
            }
            return Ok(CreateVolumeResponse { volume: Some(self.volume(&record)) });
        }
        let origin = source.as_ref().map(|source| self.origin(source)).transpose()?;
        let mut parameters = parameters;
        if let Some(origin) = &origin {
            let block = origin.record.parameters.block();
            if parameters.block_size > block {
                let text = format!("parameters: blockSize is more than the {block} of volume_content_source");
                return Err(Status::invalid_argument(text));
            }
            parameters.block_size = if parameters.block_size == 0 { block } else { parameters.block_size };
        }
        let content = origin.as_ref().and_then(|origin| origin.record.content.clone());
        let xfs = |kind: &Kind| matches!(kind, Kind::Filesystem { fs_type: Some(name), .. } if name == "xfs");
        let least = if uses.iter().any(|one| xfs(&one.kind)) { MIN_XFS } else { MIN };
        let size =
            Range::parse(request.capacity_range)?.choose(least, origin.as_ref().map(|o| o.record.size))?;
        let mut record = new_record(&request.name, size);
        record.content = content;
        (record.given, record.parameters, record.source) = (given, parameters, source);
        self.make(&self.volumes, &mut record, origin)?;
        Ok(CreateVolumeResponse { volume: Some(self.volume(&record)) })
    }

    /// Reserves the space for a record, and makes its image.
    pub(crate) fn make(
        &self,
        store: &Store,
        record: &mut Record,
        origin: Option<Origin>,
    ) -> Result<(), Status> {
        image::check_place(store, &id_of(&record.name))?;
        self.reserve(record.size, || store.save(record))?;
        let from = origin.as_ref().map(|origin| origin.image.as_path());
        let in_use = origin.as_ref().is_some_and(|origin| origin.in_use);
        image::create(store, record, &Content { from, in_use })
    }

    /// Runs `save`, which reserves `bytes`, if there is space for them.
    pub(crate) fn reserve(
        &self,
        bytes: u64,
        save: impl FnOnce() -> std::io::Result<()>,
    ) -> Result<(), Status> {
        let _space = self.space.lock().unwrap_or_else(PoisonError::into_inner);
        let free = self.free()?;
        if bytes > free {
            let text = format!("{bytes} bytes are asked for, but {free} are free on this node");
            return Err(Status::resource_exhausted(text));
        }
        save().map_err(|error| failed("cannot write a record", &error))
    }

    /// Free bytes that no volume may still need.
    pub(crate) fn free(&self) -> Result<u64, Status> {
        let shown = self.volumes.directory().display();
        let vfs = statvfs(self.volumes.directory())
            .map_err(|e| failed(format_args!("cannot see {shown}"), &e.into()))?;
        let promised =
            self.volumes.promised().map_err(|e| failed(format_args!("cannot read {shown}"), &e))?;
        Ok((vfs.f_bavail * vfs.f_frsize).saturating_sub(promised) / UNIT * UNIT)
    }

    /// The usable record of an identifier. What earlier calls did not complete is completed or removed.
    pub(crate) fn existing(&self, store: &Store, id: &str) -> Result<Option<Record>, Status> {
        match store.load(id) {
            Found::Nothing => Ok(None),
            Found::Damaged(why) => Err(damaged(&why)),
            Found::Record(mut record) => {
                let cannot = |error: std::io::Error| failed("cannot complete an earlier call", &error);
                if image::complete(store, &mut record).map_err(cannot)? {
                    return Ok(Some(*record));
                }
                image::delete(store, *record).map_err(cannot)?;
                Ok(None)
            }
        }
    }

    /// Opens a source, with what its users wrote so far.
    pub(crate) fn origin(&self, source: &Source) -> Result<Origin, Status> {
        let (store, what, id) = match source {
            Source::Volume(id) => (&self.volumes, "volume", id),
            Source::Snapshot(id) => (&self.snapshots, "snapshot", id),
        };
        let _lock = self.locks.read(format!("{what} {id}"))?;
        let record = ready(store, what, id)?;
        if let Some(fault) = store.fault(&record) {
            return Err(Status::failed_precondition(format!("the {what} {id} is damaged: {fault}")));
        }
        let image = store.image(id);
        let device = match source {
            Source::Volume(_) => self.engine.find(&image).map_err(|error| engine::status(&error))?,
            Source::Snapshot(_) => None,
        };
        if let Some(device) = &device {
            let cannot = |error: std::io::Error| failed(format_args!("cannot sync {}", device.node), &error);
            for mount in mounts::of_device(&device.node).map_err(cannot)? {
                let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
                let Ok(directory) = openat(CWD, &mount.path, flags, Mode::empty()) else { continue };
                syncfs(directory).map_err(|error| cannot(error.into()))?;
            }
        }
        Ok(Origin { record, image, in_use: device.is_some(), _lock })
    }

    pub(crate) fn delete_volume(&self, request: DeleteVolumeRequest) -> Result<Empty, Status> {
        let id = required("volume_id", &request.volume_id)?;
        let _lock = self.locks.write(format!("volume {id}"))?;
        match self.volumes.load(id) {
            Found::Nothing => Ok(Empty {}),
            Found::Damaged(why) => Err(damaged(&why)),
            Found::Record(record) => self.remove(*record).map(|()| Empty {}),
        }
    }

    /// Deletes a volume that nobody uses.
    pub(crate) fn remove(&self, record: Record) -> Result<(), Status> {
        let id = id_of(&record.name);
        let image = self.volumes.image(&id);
        if record.state == State::Ready {
            if let Some(fault) = self.volumes.fault(&record).filter(|_| image.exists()) {
                return Err(Status::failed_precondition(format!("the volume {id} stays, for {fault}")));
            }
            let device = self.engine.find(&image).map_err(|error| engine::status(&error))?;
            if let Some(device) = device {
                let mut mounts = mounts::of_device(&device.node).map_err(cannot_read_mounts)?;
                mounts.extend(mounts::of_node(&device.node).map_err(cannot_read_mounts)?);
                if let Some(mount) = mounts.first() {
                    let text = format!("the volume {id} is mounted on {}", mount.path.display());
                    return Err(Status::failed_precondition(text));
                }
                self.engine.detach(&image).map_err(|error| engine::status(&error))?;
            }
        }
        image::delete(&self.volumes, record)
            .map_err(|error| failed(format_args!("cannot delete {id}"), &error))
    }

    fn check_topology(&self, asked: Option<TopologyRequirement>) -> Result<(), Status> {
        let asked = asked.unwrap_or_default();
        let all = if asked.requisite.is_empty() { asked.preferred } else { asked.requisite };
        match all.is_empty() || all.iter().any(|topology| self.is_here(topology)) {
            true => Ok(()),
            false => Err(Status::resource_exhausted(format!(
                "accessibility_requirements: this node, {}, is none of them",
                self.node
            ))),
        }
    }

    pub(crate) fn volume(&self, record: &Record) -> Volume {
        Volume {
            capacity_bytes: record.size.cast_signed(),
            volume_id: id_of(&record.name),
            volume_context: Default::default(),
            content_source: record.source.clone().map(|source| match source {
                Source::Volume(volume_id) => {
                    ContentSource { volume: Some(VolumeSource { volume_id }), snapshot: None }
                }
                Source::Snapshot(snapshot_id) => {
                    ContentSource { snapshot: Some(SnapshotSource { snapshot_id }), volume: None }
                }
            }),
            accessible_topology: vec![self.topology()],
        }
    }
}

pub(crate) fn new_record(name: &str, size: u64) -> Record {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    Record {
        version: 1,
        name: name.to_owned(),
        state: State::Creating,
        inode: 0,
        size,
        growing: None,
        source: None,
        given: Default::default(),
        parameters: Parameters::default(),
        content: None,
        formatting: None,
        ephemeral: false,
        created_ns: i64::try_from(now.as_nanos()).unwrap_or_default(),
    }
}

/// Checks a name by the specification.
pub(crate) fn check_name(field: &str, name: &str) -> Result<(), Status> {
    required(field, name)?;
    if name.len() > ID_MAX {
        let text = format!("{field} has {} bytes; it may have {ID_MAX}", name.len());
        return Err(Status::invalid_argument(text));
    }
    match name.chars().any(|c| c.is_control() && !"\t\n\r".contains(c)) {
        true => Err(Status::invalid_argument(format!("{field} contains a control character"))),
        false => Ok(()),
    }
}

fn source(given: Option<ContentSource>) -> Result<Option<Source>, Status> {
    let source = match given {
        None => return Ok(None),
        Some(ContentSource { snapshot: Some(SnapshotSource { snapshot_id }), volume: None }) => {
            required("volume_content_source.snapshot.snapshot_id", &snapshot_id)?;
            Source::Snapshot(snapshot_id)
        }
        Some(ContentSource { snapshot: None, volume: Some(VolumeSource { volume_id }) }) => {
            required("volume_content_source.volume.volume_id", &volume_id)?;
            Source::Volume(volume_id)
        }
        Some(_) => return Err(Status::invalid_argument("volume_content_source: one type must be set")),
    };
    Ok(Some(source))
}

/// The sizes that a caller accepts.
pub(crate) struct Range {
    required: u64,
    /// 0: no limit.
    limit: u64,
}

impl Range {
    pub(crate) fn parse(range: Option<CapacityRange>) -> Result<Range, Status> {
        let CapacityRange { required_bytes, limit_bytes } = range.unwrap_or_default();
        let bytes = |field: &str, value: i64| {
            let negative = |_| Status::invalid_argument(format!("capacity_range.{field} is negative"));
            u64::try_from(value).map_err(negative)
        };
        let (required, limit) =
            (bytes("required_bytes", required_bytes)?, bytes("limit_bytes", limit_bytes)?);
        if limit != 0 && required > limit {
            return Err(out_of_range("required_bytes is more than limit_bytes"));
        }
        Ok(Range { required, limit })
    }

    pub(crate) fn contains(&self, size: u64) -> bool {
        size >= self.required && (self.limit == 0 || size <= self.limit)
    }

    /// The size of a volume that has at least `least` bytes, and those of its source.
    pub(crate) fn choose(&self, least: u64, source: Option<u64>) -> Result<u64, Status> {
        let wanted = match (self.required, source) {
            (0, Some(source)) => source,
            (0, None) if self.limit != 0 => self.limit.min(DEFAULT_SIZE) / UNIT * UNIT,
            (0, None) => DEFAULT_SIZE,
            (required, _) => required,
        };
        if source.is_some_and(|source| wanted < source) {
            return Err(out_of_range("required_bytes is less than the size of volume_content_source"));
        }
        let size = wanted.max(least).checked_next_multiple_of(UNIT).filter(|size| *size <= MAX);
        let size = size.ok_or_else(|| out_of_range("required_bytes is more than an image can have"))?;
        match self.contains(size) {
            true => Ok(size),
            false => Err(out_of_range(&format!("limit_bytes is less than the {size} bytes of the volume"))),
        }
    }
}

fn out_of_range(why: &str) -> Status {
    Status::out_of_range(format!("capacity_range: {why}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn choose(required_bytes: i64, limit_bytes: i64, source: Option<u64>) -> Result<u64, tonic::Code> {
        let range = Range::parse(Some(CapacityRange { required_bytes, limit_bytes }));
        range.and_then(|range| range.choose(MIN, source)).map_err(|status| status.code())
    }

    #[test]
    fn a_size_is_in_its_range() {
        use tonic::Code::{InvalidArgument, OutOfRange};
        assert_eq!(choose(0, 0, None), Ok(DEFAULT_SIZE));
        assert_eq!(choose(0, 20 << 20, None), Ok(20 << 20));
        assert_eq!(choose(1, 0, None), Ok(MIN));
        assert_eq!(choose((20 << 20) - 1, 0, None), Ok(20 << 20));
        assert_eq!(choose(0, 0, Some(9 << 20)), Ok(9 << 20));
        assert_eq!(choose(8 << 20, 0, Some(9 << 20)), Err(OutOfRange));
        assert_eq!(choose(2, 1, None), Err(OutOfRange));
        assert_eq!(choose(0, 1 << 20, None), Err(OutOfRange));
        assert_eq!(choose(9_000_001, 9_000_001, None), Err(OutOfRange));
        assert_eq!(choose(i64::MAX, 0, None), Err(OutOfRange));
        assert_eq!(choose(-1, 0, None), Err(InvalidArgument));
        assert_eq!(choose(0, -1, None), Err(InvalidArgument));
    }

    #[test]
    fn names_have_their_length_and_characters() {
        for name in ["a", "日本 語", "a/b\tc", &"x".repeat(128)] {
            assert!(check_name("name", name).is_ok(), "{name}");
        }
        for name in ["", "a\0", "\u{7f}", "\u{85}", &"x".repeat(129), &"日".repeat(43)] {
            assert!(check_name("name", name).is_err(), "{name}");
        }
    }
}
