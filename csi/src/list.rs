// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What there is: volumes, snapshots, space.

use tonic::Status;

use crate::capability::Use;
use crate::messages::*;
use crate::parameters::Parameters;
use crate::record::{Found, Record, State, Store};
use crate::{Driver, failed, ready, required};

/// Begins a token, which an identifier follows: the list goes on after it.
const TOKEN: &str = "after:";

impl Driver {
    pub(crate) fn list_volumes(&self, request: ListVolumesRequest) -> Result<ListVolumesResponse, Status> {
        let devices = self.engine.devices();
        let list = |found: &Found, id: &str| {
            let volume = match found {
                Found::Record(record) if record.state == State::Ready && !record.ephemeral => {
                    self.volume(record)
                }
                Found::Damaged(_) => Volume { volume_id: id.to_owned(), ..Volume::default() },
                _ => return None,
            };
            let condition = self.condition(id, found, &devices);
            let status = VolumeStatus { volume_condition: Some(condition), ..VolumeStatus::default() };
            Some(ListedVolume { volume: Some(volume), status: Some(status) })
        };
        let (entries, next_token) = page(&self.volumes, request.max_entries, &request.starting_token, list)?;
        Ok(ListVolumesResponse { entries, next_token })
    }

    pub(crate) fn get_volume(&self, request: ControllerGetVolumeRequest) -> Result<ListedVolume, Status> {
        let id = required("volume_id", &request.volume_id)?;
        let found = self.volumes.load(id);
        let volume = match &found {
            Found::Record(record) if record.state == State::Ready => self.volume(record),
            Found::Damaged(_) => Volume { volume_id: id.to_owned(), ..Volume::default() },
            _ => return Err(Status::not_found(format!("there is no volume {id:?} on this node"))),
        };
        let condition = self.condition(id, &found, &self.engine.devices());
        let status = VolumeStatus { volume_condition: Some(condition), ..VolumeStatus::default() };
        Ok(ListedVolume { volume: Some(volume), status: Some(status) })
    }

    pub(crate) fn list_snapshots(
        &self,
        request: ListSnapshotsRequest,
    ) -> Result<ListSnapshotsResponse, Status> {
        let (only, of) = (request.snapshot_id, request.source_volume_id);
        let list = |found: &Found, id: &str| {
            let Found::Record(record) = found else { return None };
            let snapshot = self.snapshot(record);
            let wanted = record.state == State::Ready
                && (only.is_empty() || only == id)
                && (of.is_empty() || of == snapshot.source_volume_id);
            wanted.then_some(CreateSnapshotResponse { snapshot: Some(snapshot) })
        };
        let (entries, next_token) =
            page(&self.snapshots, request.max_entries, &request.starting_token, list)?;
        Ok(ListSnapshotsResponse { entries, next_token })
    }

    pub(crate) fn capacity(&self, request: GetCapacityRequest) -> Result<GetCapacityResponse, Status> {
        let parameters =
            Parameters::parse("parameters", &request.parameters).map_err(Status::invalid_argument)?;
        if !request.volume_capabilities.is_empty() {
            Use::parse_all(&request.volume_capabilities, &parameters)?;
        }
        let here = request.accessible_topology.is_none_or(|topology| self.is_here(&topology));
        let free = if here { self.free()?.cast_signed() } else { 0 };
        let maximum_volume_size = Some(Int64Value { value: free });
        Ok(GetCapacityResponse { available_capacity: free, maximum_volume_size, minimum_volume_size: None })
    }

    pub(crate) fn validate_capabilities(
        &self,
        request: ValidateVolumeCapabilitiesRequest,
    ) -> Result<ValidateVolumeCapabilitiesResponse, Status> {
        let id = required("volume_id", &request.volume_id)?;
        if request.volume_capabilities.is_empty() {
            return Err(Status::invalid_argument("volume_capabilities is missing"));
        }
        let record: Record = ready(&self.volumes, "volume", id)?;
        let differs =
            !request.parameters.is_empty() && crate::parameters::own(&request.parameters) != record.given;
        let message = match Use::parse_all(&request.volume_capabilities, &record.parameters) {
            Err(status) => status.message().to_owned(),
            Ok(_) if differs => "the volume has other parameters".to_owned(),
            Ok(_) => String::new(),
        };
        let confirmed = message.is_empty().then_some(Confirmed {
            volume_context: request.volume_context,
            volume_capabilities: request.volume_capabilities,
            parameters: request.parameters,
        });
        Ok(ValidateVolumeCapabilitiesResponse { confirmed, message })
    }
}

/// At most `max` entries after `token`, and the token for more.
fn page<T>(
    store: &Store,
    max: i32,
    token: &str,
    entry: impl Fn(&Found, &str) -> Option<T>,
) -> Result<(Vec<T>, String), Status> {
    let max = usize::try_from(max).map_err(|_| Status::invalid_argument("max_entries is negative"))?;
    let after = match token {
        "" => "",
        token => token.strip_prefix(TOKEN).ok_or_else(|| {
            Status::aborted(format!("starting_token: {token:?} is none of this driver; start again without"))
        })?,
    };
    let ids = store.ids().map_err(|error| failed("cannot read the directory", &error))?;
    let (mut entries, mut last) = (Vec::new(), String::new());
    for id in ids.into_iter().filter(|id| id.as_str() > after) {
        let Some(one) = entry(&store.load(&id), &id) else { continue };
        if max != 0 && entries.len() == max {
            return Ok((entries, format!("{TOKEN}{last}")));
        }
        entries.push(one);
        last = id;
    }
    Ok((entries, String::new()))
}
