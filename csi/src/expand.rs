// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Grows volumes: the image, its device, and the file system.

use std::fs::File;

use tonic::Status;

use crate::controller::Range;
use crate::messages::*;
use crate::record::{Record, id_of};
use crate::{Driver, engine, failed, filesystem, image, path, ready, required};

impl Driver {
    pub(crate) fn expand_volume(
        &self,
        request: ControllerExpandVolumeRequest,
    ) -> Result<ControllerExpandVolumeResponse, Status> {
        let id = required("volume_id", &request.volume_id)?;
        let Some(range) = request.capacity_range else {
            return Err(Status::invalid_argument("capacity_range is missing"));
        };
        let _lock = self.locks.write(format!("volume {id}"))?;
        let mut record = ready(&self.volumes, "volume", id)?;
        self.grow(&mut record, Some(range))?;
        let block = record.content.as_deref() == Some("block");
        Ok(ControllerExpandVolumeResponse {
            capacity_bytes: record.size.cast_signed(),
            node_expansion_required: !block || self.node_expansion,
        })
    }

    pub(crate) fn node_expand_volume(
        &self,
        request: NodeExpandVolumeRequest,
    ) -> Result<NodeExpandVolumeResponse, Status> {
        let id = required("volume_id", &request.volume_id)?;
        let path = path("volume_path", &request.volume_path)?;
        let _lock = self.locks.write(format!("volume {id}"))?;
        let mut record = ready(&self.volumes, "volume", id)?;
        let used = self.used_at(id, &path)?;
        self.grow(&mut record, request.capacity_range)?;
        if let Some(mount) = used.mount.filter(|_| !used.block) {
            filesystem::grow(&used.device.node, &mount.fs_type, &mount.path)?;
        }
        Ok(NodeExpandVolumeResponse { capacity_bytes: record.size.cast_signed() })
    }

    /// Gives image and device a size in `range`; a volume never shrinks.
    fn grow(&self, record: &mut Record, range: Option<CapacityRange>) -> Result<(), Status> {
        let id = id_of(&record.name);
        let path = self.volumes.image(&id);
        if let Some(fault) = self.volumes.fault(record) {
            return Err(Status::failed_precondition(format!("the volume {id} is damaged: {fault}")));
        }
        let cannot = |error: std::io::Error| failed(format_args!("cannot grow {}", path.display()), &error);
        let range = Range::parse(range)?;
        // A call that did not end had space for what it began.
        let at_least = record.growing.unwrap_or(record.size).max(record.size);
        let size = match range.contains(at_least) {
            true => at_least,
            false => range.choose(at_least, None)?,
        };
        if size != record.size {
            let grown = Record { growing: Some(size), ..record.clone() };
            self.reserve(size - at_least, || self.volumes.save(&grown))?;
            let file = File::options().write(true).open(&path).map_err(cannot)?;
            image::resize(&file, size, record.parameters.preallocate).map_err(cannot)?;
            file.sync_all().map_err(cannot)?;
            (record.size, record.growing) = (size, None);
            self.volumes.save(record).map_err(cannot)?;
        }
        let device = self.engine.find(&path).map_err(|error| engine::status(&error))?;
        if let Some(device) = device.filter(|device| device.size != record.size) {
            self.engine.resize(&device).map_err(|error| engine::status(&error))?;
        }
        Ok(())
    }
}
