// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Attaches volumes and mounts them where all pods of the node get them from.

use std::fs;
use std::path::Path;

use loopengine::instance::spec::{DeviceInfo, DeviceState};
use rustix::fs::statvfs;
use tonic::Status;

use crate::capability::{Kind, Use};
use crate::messages::*;
use crate::mounts::{self, Mount};
use crate::record::{Found, Record, id_of};
use crate::{Driver, engine, failed, filesystem, group, path, ready, required};

/// A volume as it is used at a path.
pub(crate) struct Used {
    pub device: DeviceInfo,
    /// The mount at the path; none: an attached block volume.
    pub mount: Option<Mount>,
    pub block: bool,
}

pub(crate) fn cannot_read_mounts(error: std::io::Error) -> Status {
    failed("cannot read the mounts", &error)
}

impl Driver {
    pub(crate) fn stage_volume(&self, request: NodeStageVolumeRequest) -> Result<Empty, Status> {
        let id = required("volume_id", &request.volume_id)?;
        let path = path("staging_target_path", &request.staging_target_path)?;
        if request.volume_capability.is_none() {
            return Err(Status::invalid_argument("volume_capability is missing"));
        }
        let _lock = self.locks.write(format!("volume {id}"))?;
        let mut record = ready(&self.volumes, "volume", id)?;
        let wanted = Use::parse("volume_capability", request.volume_capability.as_ref(), &record.parameters)?;
        match &wanted.kind {
            Kind::Block => self.stage_block(&mut record, wanted.reader)?,
            Kind::Filesystem { .. } => self.mount_at(&mut record, &wanted, wanted.reader, &path)?,
        }
        Ok(Empty {})
    }

    fn stage_block(&self, record: &mut Record, reader: bool) -> Result<(), Status> {
        if record.content.is_none() {
            record.content = Some("block".to_owned());
            self.volumes.save(record).map_err(|error| failed("cannot write a record", &error))?;
        }
        let device = self.attach(record, reader)?;
        match device.read_only == reader {
            true => Ok(()),
            false => {
                Err(Status::already_exists(format!("{} is staged in another mode", id_of(&record.name))))
            }
        }
    }

    /// Attaches the image of a record.
    fn attach(&self, record: &Record, read_only: bool) -> Result<DeviceInfo, Status> {
        let id = id_of(&record.name);
        if let Some(fault) = self.volumes.fault(record) {
            return Err(Status::failed_precondition(format!("the volume {id} is damaged: {fault}")));
        }
        let attached = self.engine.attach(&self.volumes.image(&id), &record.parameters, read_only);
        let device = attached.map_err(|error| engine::status(&error))?;
        if device.state == DeviceState::Stuck {
            let reason = device.reason.unwrap_or_default();
            return Err(Status::failed_precondition(format!("{} is stuck: {reason}", device.path)));
        }
        if engine::is_file(&device) {
            let _ = self.engine.detach(&self.volumes.image(&id));
            return Err(Status::failed_precondition(
                "the engine serves files over FUSE, and a volume is a block device; give this node the ublk \
                 driver or 'loopengine serve --backend loop'",
            ));
        }
        Ok(device)
    }

    /// Mounts the file system of a volume at `path`, which it makes if the volume is new.
    pub(crate) fn mount_at(
        &self,
        record: &mut Record,
        wanted: &Use,
        read_only: bool,
        path: &Path,
    ) -> Result<(), Status> {
        let Kind::Filesystem { fs_type, flags, group } = &wanted.kind else {
            return Err(Status::internal("not a file system"));
        };
        let id = id_of(&record.name);
        let read_only = read_only || flags.iter().flat_map(|flag| flag.split(',')).any(|flag| flag == "ro");
        let device = self.attach(record, false)?;
        let numbers = mounts::numbers(Path::new(&device.node)).map_err(cannot_read_mounts)?;
        match mounts::at(path).map_err(cannot_read_mounts)? {
            Some(mount) if Some(&mount.device) != numbers.as_ref() => {
                let text = format!("something else is mounted on {}", path.display());
                return Err(Status::failed_precondition(text));
            }
            Some(mount) if mount.read_only != read_only => {
                return Err(Status::already_exists(format!("{id} is staged in another mode")));
            }
            Some(mount) if fs_type.as_ref().is_some_and(|name| *name != mount.fs_type) => {
                return Err(Status::already_exists(format!("{id} is staged with {}", mount.fs_type)));
            }
            Some(mount) => return finish(&device, &mount.fs_type, path, *group, read_only),
            None => {}
        }
        let mounted = self.format(record, &device, fs_type.as_deref()).and_then(|name| {
            let elsewhere = !mounts::of_device(&device.node).map_err(cannot_read_mounts)?.is_empty();
            if !read_only && !elsewhere {
                filesystem::check(&device.node, &name)?;
            }
            fs::create_dir_all(path).map_err(|error| failed(path.display(), &error))?;
            filesystem::mount(&device.node, &name, &options(record, &name, flags, read_only), path)?;
            Ok(name)
        });
        match mounted {
            Ok(name) => finish(&device, &name, path, *group, read_only),
            Err(status) => {
                // A device that is mounted elsewhere stays.
                let _ = self.engine.detach(&self.volumes.image(&id));
                Err(status)
            }
        }
    }

    /// The name of the file system on the device, which is made if there was never anything.
    fn format(
        &self,
        record: &mut Record,
        device: &DeviceInfo,
        asked: Option<&str>,
    ) -> Result<String, Status> {
        let (id, node) = (id_of(&record.name), &device.node);
        let save =
            |record: &Record| self.volumes.save(record).map_err(|e| failed("cannot write a record", &e));
        let refuse = |why: String| Err(Status::failed_precondition(format!("the volume {id} {why}")));
        let found = filesystem::probe(node)?;
        let begun = record.formatting.is_some() && record.content.is_none();
        match (&found, record.content.as_deref()) {
            (Some(found), _) if begun && record.formatting.as_ref() == Some(found) => {}
            (None, None) => {}
            (None, Some("block")) => {
                return refuse("was used as a block device; its data is not overwritten".to_owned());
            }
            (None, Some(content)) => {
                return refuse(format!("had {content}, but nothing is found on it; restore it"));
            }
            (Some(found), content) => {
                let asked = asked.or(content.filter(|content| *content != "block")).unwrap_or("ext4");
                if found != asked {
                    return refuse(format!("holds {found} instead of {asked}; it is not overwritten"));
                }
                if content != Some(found) {
                    (record.content, record.formatting) = (Some(found.clone()), None);
                    save(record)?;
                }
                return Ok(found.clone());
            }
        }
        let name = asked.unwrap_or("ext4").to_owned();
        record.formatting = Some(name.clone());
        save(record)?;
        filesystem::make(node, &name, record.parameters.preallocate)?;
        (record.content, record.formatting) = (Some(name.clone()), None);
        save(record)?;
        Ok(name)
    }

    pub(crate) fn unstage_volume(&self, request: NodeUnstageVolumeRequest) -> Result<Empty, Status> {
        let id = required("volume_id", &request.volume_id)?;
        let path = path("staging_target_path", &request.staging_target_path)?;
        let _lock = self.locks.write(format!("volume {id}"))?;
        // A damaged record does not keep a volume mounted.
        if let Found::Nothing = self.volumes.load(id) {
            return Err(Status::not_found(format!("there is no volume {id:?} on this node")));
        }
        let image = self.volumes.image(id);
        if let Some(device) = self.engine.find(&image).map_err(|error| engine::status(&error))? {
            let staged = mounts::resolved(&path);
            let others = mounts::of_device(&device.node).map_err(cannot_read_mounts)?;
            let nodes = mounts::of_node(&device.node).map_err(cannot_read_mounts)?;
            if let Some(other) = others.iter().chain(&nodes).find(|mount| mount.path != staged) {
                let text = format!("the volume {id} is still mounted on {}", other.path.display());
                return Err(Status::failed_precondition(text));
            }
            if !others.is_empty() {
                mounts::remove_all(&path)
                    .map_err(|error| failed(format_args!("cannot unmount {id}"), &error))?;
            }
            self.engine.detach(&image).map_err(|error| engine::status(&error))?;
        } else if let Some(mount) = mounts::at(&path).map_err(cannot_read_mounts)? {
            if !mounts::is_dead(&mount) {
                let text = format!("something else is mounted on {}", path.display());
                return Err(Status::failed_precondition(text));
            }
            mounts::remove_all(&path).map_err(|error| failed(format_args!("cannot unmount {id}"), &error))?;
        }
        Ok(Empty {})
    }

    /// The device of a volume, if it is attached.
    pub(crate) fn device(&self, id: &str) -> Result<Option<DeviceInfo>, Status> {
        self.engine.find(&self.volumes.image(id)).map_err(|error| engine::status(&error))
    }

    /// How volume `id` is used at `path`. NOT_FOUND if it is not.
    pub(crate) fn used_at(&self, id: &str, path: &Path) -> Result<Used, Status> {
        let not_here = || Status::not_found(format!("the volume {id} is not at {}", path.display()));
        let device = self.device(id)?.ok_or_else(not_here)?;
        let own =
            mounts::numbers(Path::new(&device.node)).map_err(cannot_read_mounts)?.ok_or_else(not_here)?;
        let mount = mounts::at(path).map_err(cannot_read_mounts)?;
        if let Some(mount) = mount.as_ref().filter(|mount| mount.device == own) {
            return Ok(Used { device, mount: Some(mount.clone()), block: false });
        }
        match mounts::numbers(path).map_err(|error| failed(path.display(), &error))? {
            Some(numbers) if numbers == own => Ok(Used { device, mount, block: true }),
            _ => Err(not_here()),
        }
    }

    pub(crate) fn volume_stats(
        &self,
        request: NodeGetVolumeStatsRequest,
    ) -> Result<NodeGetVolumeStatsResponse, Status> {
        let id = required("volume_id", &request.volume_id)?;
        let path = path("volume_path", &request.volume_path)?;
        let record = ready(&self.volumes, "volume", id)?;
        let used = self.used_at(id, &path)?;
        let found = Found::Record(Box::new(record));
        let volume_condition = Some(self.condition(id, &found, &Ok(vec![used.device.clone()])));
        let usage = |unit: Unit, total: u64, free: u64, available: u64| VolumeUsage {
            available: available.cast_signed(),
            total: total.cast_signed(),
            used: total.saturating_sub(free).cast_signed(),
            unit: unit.into(),
        };
        if used.block {
            let total = used.device.size.cast_signed();
            let usage = vec![VolumeUsage { available: 0, total, used: 0, unit: Unit::Bytes.into() }];
            return Ok(NodeGetVolumeStatsResponse { usage, volume_condition });
        }
        let vfs = statvfs(&path).map_err(|error| failed(path.display(), &error.into()))?;
        let bytes = |blocks: u64| blocks.saturating_mul(vfs.f_frsize);
        let usage = vec![
            usage(Unit::Bytes, bytes(vfs.f_blocks), bytes(vfs.f_bfree), bytes(vfs.f_bavail)),
            usage(Unit::Inodes, vfs.f_files, vfs.f_ffree, vfs.f_favail),
        ];
        Ok(NodeGetVolumeStatsResponse { usage, volume_condition })
    }
}

/// What follows a mount, and is repeated after a crash: its size and its group.
fn finish(
    device: &DeviceInfo,
    fs_type: &str,
    path: &Path,
    group: Option<u32>,
    read_only: bool,
) -> Result<(), Status> {
    if read_only {
        return Ok(());
    }
    // An image that was restored or has grown is larger than its file system.
    filesystem::grow(&device.node, fs_type, path)?;
    match group {
        Some(group) => {
            group::give(path, group).map_err(|error| failed("cannot set volume_mount_group", &error))
        }
        None => Ok(()),
    }
}

/// The options of a mount.
fn options(record: &Record, fs_type: &str, flags: &[String], read_only: bool) -> Vec<String> {
    let mut options = vec![if read_only { "ro" } else { "rw" }.to_owned()];
    // Copies have the identity of their origin.
    options.extend((fs_type == "xfs").then(|| "nouuid".to_owned()));
    options.extend(record.parameters.discard.then(|| "discard".to_owned()));
    options.extend(flags.iter().cloned());
    options
}
