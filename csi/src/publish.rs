// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Gives volumes to pods: those that are staged, and those that live as long as their pod.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::Path;

use tonic::Status;

use crate::capability::{Kind, Use};
use crate::controller::{Range, check_name, new_record};
use crate::messages::*;
use crate::mounts::{self, Mount};
use crate::node::cannot_read_mounts;
use crate::parameters::{self, Parameters};
use crate::record::{Found, Record, State, id_of};
use crate::{Driver, failed, filesystem, path, ready, required};

/// Of an inline volume, Kubernetes says so with this key.
const EPHEMERAL: &str = "csi.storage.k8s.io/ephemeral";

impl Driver {
    pub(crate) fn publish_volume(&self, request: NodePublishVolumeRequest) -> Result<Empty, Status> {
        let id = required("volume_id", &request.volume_id)?;
        let target = path("target_path", &request.target_path)?;
        if request.volume_capability.is_none() {
            return Err(Status::invalid_argument("volume_capability is missing"));
        }
        let _lock = self.locks.write(format!("volume {id}"))?;
        if request.volume_context.get(EPHEMERAL).is_some_and(|value| value == "true") {
            return self.publish_ephemeral(&request, &target);
        }
        let record = ready(&self.volumes, "volume", id)?;
        let wanted = Use::parse("volume_capability", request.volume_capability.as_ref(), &record.parameters)?;
        if request.staging_target_path.is_empty() {
            return Err(Status::failed_precondition("staging_target_path is missing"));
        }
        let staging = path("staging_target_path", &request.staging_target_path)?;
        match wanted.kind {
            Kind::Block => self.publish_block(id, &wanted, request.readonly, &target)?,
            Kind::Filesystem { .. } => {
                self.publish_mount(id, &wanted, request.readonly, &staging, &target)?;
            }
        }
        Ok(Empty {})
    }

    fn publish_mount(
        &self,
        id: &str,
        wanted: &Use,
        readonly: bool,
        staging: &Path,
        target: &Path,
    ) -> Result<(), Status> {
        let staged = match self.used_at(id, staging) {
            Ok(used) if !used.block => used,
            Err(status) if status.code() != tonic::Code::NotFound => return Err(status),
            _ => {
                let text =
                    format!("the volume {id} is not staged at staging_target_path {}", staging.display());
                return Err(Status::failed_precondition(text));
            }
        };
        let staged_read_only = staged.mount.is_some_and(|mount| mount.read_only);
        let read_only = readonly || wanted.reader || staged_read_only;
        let mounts = mounts::of_device(&staged.device.node).map_err(cannot_read_mounts)?;
        let (own, from) = (mounts::resolved(target), mounts::resolved(staging));
        match mounts::at(target).map_err(cannot_read_mounts)? {
            Some(mount) if !mounts.contains(&mount) => return Err(occupied(target)),
            Some(mount) if mount.read_only == read_only => return Ok(()),
            Some(_) => {
                return Err(Status::already_exists(format!(
                    "{id} is at {} in another mode",
                    target.display()
                )));
            }
            None => {}
        }
        // A part of the file system is a sub-path of a pod that has the volume already.
        let whole = |mount: &&Mount| mount.root == "/" && mount.path != own && mount.path != from;
        if let Some(other) = mounts.iter().find(whole).filter(|_| wanted.single) {
            return Err(Status::failed_precondition(format!(
                "the volume {id} is for a single writer, and {} has it",
                other.path.display()
            )));
        }
        fs::create_dir_all(target).map_err(|error| failed(target.display(), &error))?;
        filesystem::bind(staging, target, read_only)
    }

    fn publish_block(&self, id: &str, wanted: &Use, readonly: bool, target: &Path) -> Result<(), Status> {
        let Some(device) = self.device(id)? else {
            return Err(Status::failed_precondition(format!("the volume {id} is not staged")));
        };
        if (readonly || wanted.reader) && !device.read_only {
            return Err(Status::invalid_argument(format!(
                "readonly: the block device of {id} is writable; use an access mode for readers only"
            )));
        }
        let node = Path::new(&device.node);
        let own = mounts::numbers(node).map_err(|error| failed(&device.node, &error))?;
        if mounts::at(target).map_err(cannot_read_mounts)?.is_some() {
            let there = mounts::numbers(target).map_err(|error| failed(target.display(), &error))?;
            return if there == own { Ok(()) } else { Err(occupied(target)) };
        }
        let others = mounts::of_node(&device.node).map_err(cannot_read_mounts)?;
        if let Some(other) = others.first().filter(|_| wanted.single) {
            return Err(Status::failed_precondition(format!(
                "the volume {id} is for a single writer, and {} has it",
                other.path.display()
            )));
        }
        if let Some(parent) = target.parent() {
            fs::create_dir_all(parent).map_err(|error| failed(parent.display(), &error))?;
        }
        match File::options().write(true).create_new(true).open(target) {
            Err(error) if error.kind() != ErrorKind::AlreadyExists => {
                return Err(failed(target.display(), &error));
            }
            _ => {}
        }
        filesystem::bind(node, target, false)
    }

    /// Makes a volume for one pod, and mounts it where the pod gets it.
    fn publish_ephemeral(&self, request: &NodePublishVolumeRequest, target: &Path) -> Result<Empty, Status> {
        let (id, context) = (&request.volume_id, &request.volume_context);
        check_name("volume_id", id)?;
        if id_of(id) != *id {
            return Err(Status::invalid_argument(format!("volume_id: {id:?} cannot name a file")));
        }
        let mut given = parameters::own(context);
        let size = given.remove(parameters::SIZE);
        let parameters = Parameters::parse("volume_context", &given).map_err(Status::invalid_argument)?;
        let wanted = Use::parse("volume_capability", request.volume_capability.as_ref(), &parameters)?;
        if wanted.kind == Kind::Block {
            return Err(Status::invalid_argument("volume_capability: an inline volume is a file system"));
        }
        let mut record = match self.existing(&self.volumes, id)? {
            Some(record) if !record.ephemeral => {
                return Err(Status::already_exists(format!("the volume {id} is not an inline volume")));
            }
            Some(record) => record,
            None => {
                let bytes = size.as_deref().map_or(Some(0), parameters::size);
                let bytes = bytes.and_then(|bytes| i64::try_from(bytes).ok()).ok_or_else(|| {
                    Status::invalid_argument(format!("volume_context: size is {size:?}, but must be as 10Gi"))
                })?;
                let least = if parameters.fs_type == "xfs" { 300 << 20 } else { 8 << 20 };
                let range = CapacityRange { required_bytes: bytes, limit_bytes: 0 };
                let size = Range::parse(Some(range))?.choose(least, None)?;
                let mut record = Record { given, parameters, ephemeral: true, ..new_record(id, size) };
                self.make(&self.volumes, &mut record, None)?;
                record
            }
        };
        self.mount_at(&mut record, &wanted, request.readonly || wanted.reader, target)?;
        Ok(Empty {})
    }

    pub(crate) fn unpublish_volume(&self, request: NodeUnpublishVolumeRequest) -> Result<Empty, Status> {
        let id = required("volume_id", &request.volume_id)?;
        let target = path("target_path", &request.target_path)?;
        let _lock = self.locks.write(format!("volume {id}"))?;
        let mount = mounts::at(&target).map_err(cannot_read_mounts)?;
        let record = match self.volumes.load(id) {
            Found::Record(record) if record.state == State::Ready || record.ephemeral => Some(*record),
            // A damaged record does not keep a volume mounted.
            Found::Damaged(_) => None,
            // An inline volume ends with its pod: this call may be a repetition.
            _ if is_inline(id) && mount.is_none() => return remove_target(&target).map(|()| Empty {}),
            _ => return Err(Status::not_found(format!("there is no volume {id:?} on this node"))),
        };
        if let Some(mount) = mount {
            match self.used_at(id, &target) {
                Err(status) if status.code() != tonic::Code::NotFound => return Err(status),
                Err(_) if !mounts::is_dead(&mount) => return Err(occupied(&target)),
                _ => {}
            }
            let cannot = |error| failed(format_args!("cannot unmount {}", target.display()), &error);
            mounts::remove_all(&target).map_err(cannot)?;
        }
        remove_target(&target)?;
        match record.filter(|record| record.ephemeral) {
            Some(record) => self.remove(record).map(|()| Empty {}),
            None => Ok(Empty {}),
        }
    }
}

/// True if Kubernetes makes such identifiers for inline volumes.
fn is_inline(id: &str) -> bool {
    id.strip_prefix("csi-")
        .is_some_and(|hash| hash.len() == 64 && hash.bytes().all(|b| b.is_ascii_hexdigit()))
}

fn occupied(target: &Path) -> Status {
    Status::failed_precondition(format!("something else is mounted on target_path {}", target.display()))
}

/// Removes the empty directory or file that a volume was mounted on.
fn remove_target(target: &Path) -> Result<(), Status> {
    let removed = match fs::symlink_metadata(target) {
        Ok(meta) if meta.is_dir() => fs::remove_dir(target),
        Ok(meta) if meta.is_file() && meta.len() == 0 => fs::remove_file(target),
        Ok(_) => return Err(occupied(target)),
        Err(error) => Err(error),
    };
    match removed {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(failed(format_args!("cannot remove {}", target.display()), &error))
        }
        _ => Ok(()),
    }
}
