// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Snapshots: copies of images, in a directory of their own.

use tonic::Status;

use crate::controller::{check_name, new_record};
use crate::image;
use crate::messages::*;
use crate::parameters::Parameters;
use crate::record::{Found, Record, Source, id_of};
use crate::{Driver, damaged, failed, required};

impl Driver {
    pub(crate) fn create_snapshot(
        &self,
        request: CreateSnapshotRequest,
    ) -> Result<CreateSnapshotResponse, Status> {
        check_name("name", &request.name)?;
        let volume = required("source_volume_id", &request.source_volume_id)?;
        let foreign = crate::parameters::own(&request.parameters);
        if let Some(key) = foreign.keys().next() {
            return Err(Status::invalid_argument(format!("parameters: there is no parameter {key:?}")));
        }
        let id = id_of(&request.name);
        let _lock = self.locks.write(format!("snapshot {id}"))?;
        let source = Source::Volume(volume.to_owned());
        if let Some(record) = self.existing(&self.snapshots, &id)? {
            return match record.source.as_ref() == Some(&source) {
                true => Ok(CreateSnapshotResponse { snapshot: Some(self.snapshot(&record)) }),
                false => Err(Status::already_exists(format!(
                    "the snapshot {id} exists, with another source_volume_id"
                ))),
            };
        }
        let origin = self.origin(&source)?;
        let mut record = new_record(&request.name, origin.record.size);
        // An image that grows now may have its new size already.
        record.size = std::fs::metadata(&origin.image).map_or(record.size, |meta| meta.len());
        record.content = origin.record.content.clone();
        record.parameters = Parameters { preallocate: false, ..origin.record.parameters.clone() };
        record.source = Some(source);
        self.make(&self.snapshots, &mut record, Some(origin))?;
        Ok(CreateSnapshotResponse { snapshot: Some(self.snapshot(&record)) })
    }

    pub(crate) fn delete_snapshot(&self, request: DeleteSnapshotRequest) -> Result<Empty, Status> {
        let id = required("snapshot_id", &request.snapshot_id)?;
        let _lock = self.locks.write(format!("snapshot {id}"))?;
        match self.snapshots.load(id) {
            Found::Nothing => Ok(Empty {}),
            Found::Damaged(why) => Err(damaged(&why)),
            Found::Record(record) => {
                let deleted = image::delete(&self.snapshots, *record);
                deleted.map(|()| Empty {}).map_err(|error| failed(format_args!("cannot delete {id}"), &error))
            }
        }
    }

    pub(crate) fn snapshot(&self, record: &Record) -> Snapshot {
        let source_volume_id = match &record.source {
            Some(Source::Volume(id)) => id.clone(),
            _ => String::new(),
        };
        let seconds = record.created_ns.div_euclid(1_000_000_000);
        let nanos = i32::try_from(record.created_ns.rem_euclid(1_000_000_000)).unwrap_or_default();
        Snapshot {
            size_bytes: record.size.cast_signed(),
            snapshot_id: id_of(&record.name),
            source_volume_id,
            creation_time: Some(Timestamp { seconds, nanos }),
            ready_to_use: true,
        }
    }
}
