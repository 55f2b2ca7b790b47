// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Recovery of one device of a previous daemon: with its image, as stuck without it, or with an
//! image that the administrator gives.
//!
//! Such a device keeps its geometry, which the driver reports. It is never dropped: it may have
//! users. `recovery` finds these devices.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use super::attached::AttachedDevice;
use super::claims::sharing::{self, Sharing};
use super::instance::{Instance, image_spec};
use super::served::{Served, StartMode};
use super::spec::{AttachSpec, DeviceInfo, DeviceState, RecoverSpec};
use super::state::DeviceRecord;
use crate::error::{Error, Kind, Result};
use crate::frontend::{DeviceParameters, ExistingDevice, FrontendDevice};
use crate::image::{Geometry, Identity, Image, ImageSpec};
use crate::ring::SlotId;

/// Opens the image of an existing device, in its geometry.
type OpenImage<'a> = &'a dyn Fn(&ImageSpec, &Geometry) -> Result<Image>;

impl Instance {
    /// Recovers a device. On failure it keeps its entry: a device with users is never dropped.
    pub fn recover(&self, number: u32, record: DeviceRecord, found: ExistingDevice) -> Result<()> {
        let reservation = self.table.reserve_existing(number)?;
        let device = self.backend.existing(record.id, found.parameters)?;
        let (path, identity) = (record.spec.path.clone(), record.identity);
        let open = |image_spec: &ImageSpec, shape: &Geometry| {
            Image::reopen(Path::new(&path), image_spec, &identity, shape)
        };
        // The device has users, whoever else uses the image.
        let (attached, outcome) = self.resume(number, reservation.slot, device, record, &open, Sharing::Warn);
        reservation.fill(Arc::new(attached));
        outcome
    }

    /// Lists a device as stuck whose record was not read. Its state file stays.
    pub fn list_stuck(&self, number: u32, id: u32, found: ExistingDevice, reason: String) -> Result<()> {
        let reservation = self.table.reserve_existing(number)?;
        let device = self.backend.existing(id, found.parameters)?;
        let record = self.placeholder_record(number, id, found.parameters);
        let geometry = device.driver_geometry(0).unwrap_or_else(|_| last_known(&record));
        let spec = AttachSpec { read_only: geometry.read_only, ..record.spec };
        let record = DeviceRecord { spec, block_size: geometry.block_size, size: geometry.size, ..record };
        let served = Served::unserved(device, &self.workers, reservation.slot, geometry);
        let linked = self.link(number, &served);
        let reason = format!("{reason}; {}", self.next_step(number));
        reservation.fill(Arc::new(AttachedDevice { record, served, reason: Some(reason), hold: None }));
        linked
    }

    /// Recovers a stuck device with an image that the caller opened.
    pub fn recover_with_image(&self, number: u32, spec: &RecoverSpec, image: OwnedFd) -> Result<DeviceInfo> {
        let attached = self.table.withdraw(number)?;
        let path = self.table.path(number).display().to_string();
        let refusal = match attached.served.state() {
            DeviceState::Stuck if matches!(attached.served.device(), FrontendDevice::Loop(device) if !device.is_bound()) => {
                Some(("another program has unbound it", "detach it, and attach its image again"))
            }
            DeviceState::Stuck if attached.served.has_no_queues() => None,
            DeviceState::Stuck => Some(("recovery has begun and did not end", "restart the daemon")),
            _ => Some(("it is served", "'loopengine list' shows which devices are stuck")),
        };
        if let Some((why, hint)) = refusal {
            self.table.put_back(number, attached);
            return Err(Error::new(Kind::Busy, format!("{path} cannot be recovered: {why}")).hint(hint));
        }
        let old = &attached.record;
        let known = AttachSpec {
            path: spec.path.clone(),
            offset: spec.offset.unwrap_or(old.spec.offset),
            size_limit: spec.size_limit.unwrap_or(old.spec.size_limit),
            buffered: spec.buffered.unwrap_or(old.spec.buffered),
            ..old.spec.clone()
        };
        let record = DeviceRecord { spec: known, ..old.clone() };
        let served = &attached.served;
        let opened = self
            .backend
            .existing(old.id, served.device().parameters())
            .and_then(|device| self.open_replacement(&device, &record, image).map(|image| (device, image)));
        let (device, (image, identity)) = match opened {
            Ok(opened) => opened,
            Err(error) => {
                self.table.put_back(number, attached);
                return Err(error);
            }
        };
        let record = DeviceRecord { identity, ..record };
        let image = std::cell::Cell::new(Some(image));
        let open = |_: &ImageSpec, _: &Geometry| {
            image.take().ok_or_else(|| Error::new(Kind::Internal, "the image was taken twice"))
        };
        let (recovered, outcome) = self.resume(number, served.slot(), device, record, &open, Sharing::Refuse);
        let recovered = Arc::new(recovered);
        self.table.put_back(number, recovered.clone());
        outcome.map(|()| self.describe(number, &recovered))
    }

    /// Skips the identity check, on the caller's responsibility, but not the size check.
    fn open_replacement(
        &self,
        device: &FrontendDevice,
        record: &DeviceRecord,
        file: OwnedFd,
    ) -> Result<(Image, Identity)> {
        let AttachSpec { path, offset, read_only, .. } = &record.spec;
        self.check_not_served_here(&file, path)?;
        let shape = device.driver_geometry(*offset)?;
        let image_spec = ImageSpec { read_only: *read_only, ..recovered_spec(record, &shape) };
        let image = Image::recover(file, &image_spec, &shape, path)?;
        let (length, needed) = (image.length()?, offset.saturating_add(shape.size));
        if length < needed {
            let context = format!(
                "{path} has {length} bytes, but the device needs {needed} (offset {offset}, size {})",
                shape.size
            );
            return Err(Error::new(Kind::Invalid, context).hint("give the image that the device had"));
        }
        let identity = image.identity();
        Ok((image, identity))
    }

    /// Serves an existing device with its image, or lists it as stuck with the returned error.
    fn resume(
        &self,
        number: u32,
        slot: SlotId,
        device: FrontendDevice,
        record: DeviceRecord,
        open: OpenImage<'_>,
        sharing: Sharing,
    ) -> (AttachedDevice, Result<()>) {
        let geometry = device.driver_geometry(record.spec.offset).unwrap_or_else(|_| last_known(&record));
        let opened = open(&recovered_spec(&record, &geometry), &geometry).and_then(|image| {
            let DeviceRecord { spec, owner_cookie, .. } = &record;
            sharing::claim_image(&self.context.claims, image, spec, number, *owner_cookie, sharing)
        });
        let record = DeviceRecord { size: geometry.size, block_size: geometry.block_size, ..record };
        let (served, hold, outcome) = match opened {
            Ok((image, hold)) => {
                if let Some(why) = image.buffered_reason() {
                    let (instance, path) = (&record.spec.instance, &record.spec.path);
                    tracing::warn!("{instance}/loop{number} ({path}) uses the page cache: {why}");
                }
                let (served, outcome) = Served::start(
                    device,
                    &self.workers,
                    slot,
                    image,
                    record.spec.io_limits(),
                    StartMode::Recovered,
                );
                (served, Some(hold), outcome)
            }
            Err(error) => (Served::unserved(device, &self.workers, slot, geometry), None, Err(error)),
        };
        let outcome = outcome.map_err(|error| error.hint(self.next_step(number)));
        let reason = outcome.as_ref().err().map(ToString::to_string);
        if let Err(error) = self.publish(number, &record, &served) {
            let instance = &record.spec.instance;
            tracing::error!("cannot save the state of {instance}/loop{number} for the next daemon: {error}");
        }
        (AttachedDevice { record, served, reason, hold }, outcome)
    }

    fn next_step(&self, number: u32) -> String {
        let path = self.table.path(number);
        let path = path.display();
        format!("run 'loopengine recover {path} --image PATH', or 'detach --force' to remove it")
    }

    /// A record for a device that only the driver knows.
    fn placeholder_record(&self, number: u32, id: u32, parameters: DeviceParameters) -> DeviceRecord {
        DeviceRecord {
            spec: AttachSpec {
                instance: self.info().name,
                number: Some(number),
                io_mode: Some(parameters.io_mode),
                partscan: parameters.partscan,
                ..AttachSpec::default()
            },
            id,
            owner_cookie: parameters.owner_cookie,
            identity: Identity { dev: 0, ino: 0, rdev: 0, btime_ns: 0 },
            io_mode: parameters.io_mode,
            queues: parameters.queues,
            depth: parameters.depth,
            block_size: 512,
            size: 0,
            since: None,
        }
    }
}

/// The image options for a device of this geometry.
fn recovered_spec(record: &DeviceRecord, shape: &Geometry) -> ImageSpec {
    // Of the record and the driver, only the driver's knowledge is never lost.
    ImageSpec { block_size: shape.block_size, durable: shape.durable_writes, ..image_spec(&record.spec) }
}

/// The recorded geometry of a device that the driver does not describe.
fn last_known(record: &DeviceRecord) -> Geometry {
    Geometry {
        size: record.size,
        offset: record.spec.offset,
        block_size: record.block_size,
        physical_block_size: record.block_size,
        dma_align: record.block_size,
        discard_granularity: record.block_size,
        read_only: record.spec.read_only,
        can_discard: false,
        can_write_zeroes: false,
        durable_writes: record.spec.durable,
    }
}
