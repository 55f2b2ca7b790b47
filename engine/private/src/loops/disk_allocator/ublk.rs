// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Disks of a pool that ublk serves.
//!
//! Knows the order in which such a disk starts and stops, and how a replacement gets its number. A
//! disk of another shape replaces one whose block size or workers do not fit an image.

use std::time::{Duration, Instant};

use super::{CANNOT_RELEASE, DEFAULT_BLOCK_SIZE, DiskAllocator, NotReplaced, lock};
use crate::error::{Error, Kind, Result};
use crate::frontend::ublk::StartLock;
use crate::frontend::{BackendKind, DeviceParameters};
use crate::image::{Identity, Image};
use crate::instance::served::{Served, StartMode};
use crate::instance::spec::IoLimits;
use crate::loops::pool_disk::{DiskServer, DiskShape, PoolDisk};
use crate::sys::stack;

/// Queue depth of a loop device.
const DEPTH: u16 = 128;
/// Placeholders that occupy lower minors while a disk starts under its predecessor's number.
const PLACEHOLDERS_MAX: usize = 256;
/// How long the kernel may take to free a number, and the interval between two attempts.
const NUMBER_MAX: Duration = Duration::from_secs(2);
const NUMBER_INTERVAL: Duration = Duration::from_millis(20);
/// Magic numbers of tmpfs and btrfs.
const LOCAL: [u32; 2] = [0x0102_1994, 0x9123_683e];

/// Whether somebody may be able to make I/O on this image hang: it lies on FUSE or on a network, or on
/// a block device of this program or of other tenants.
fn may_hang(image: &Image) -> bool {
    let Identity { dev, rdev, .. } = image.identity();
    let is_known = || match rustix::fs::major(dev) {
        // No disk is known. Only root mounts these.
        0 => rustix::fs::fstatfs(image.fd()).is_ok_and(|stat| LOCAL.contains(&(stat.f_type as u32))),
        _ => !stack::may_lie_on(dev, &|name| BackendKind::of_disk(name).is_some()),
    };
    image.may_block() || rdev != 0 || !is_known()
}

impl DiskAllocator {
    /// The shape of a disk without a file.
    pub(super) fn default_shape(&self) -> DiskShape {
        DiskShape { block_size: DEFAULT_BLOCK_SIZE, may_hang: !self.workers.are_shared() }
    }

    /// The shape of a disk that can serve this image.
    pub fn shape_for(&self, image: &Image) -> DiskShape {
        let may_hang = !self.workers.are_shared() || may_hang(image);
        DiskShape { block_size: image.geometry().block_size, may_hang }
    }

    pub(super) fn allocate_ublk(&self, shape: DiskShape) -> Result<PoolDisk> {
        let fixed = self.fixed().is_some();
        let free = if shape == self.default_shape() || fixed { self.free_list().pop() } else { None };
        match free {
            Some(free) if free.shape == shape => Ok(free),
            Some(free) => self.replace_with(free, shape).map_err(|failure| match failure {
                NotReplaced::InUse(free) => {
                    self.keep(free);
                    Error::new(Kind::Busy, "the free disk of the pool is in use")
                }
                NotReplaced::Lost(error) => error,
            }),
            None if fixed => Err(Error::new(Kind::Quota, "the pool has no free disk left")),
            None => self.new_ublk(shape),
        }
    }

    pub(super) fn new_ublk(&self, shape: DiskShape) -> Result<PoolDisk> {
        let served = self.prepare(shape)?;
        if let Err(error) = served.start_deferred() {
            self.discard(&served);
            return Err(error);
        }
        self.register(served, shape)
    }

    fn register(&self, served: Served, shape: DiskShape) -> Result<PoolDisk> {
        match served.device().device_number() {
            Ok(rdev) => {
                lock(&self.started).insert(rdev, None);
                Ok(PoolDisk { server: DiskServer::Ublk(Box::new(served)), rdev, shape })
            }
            Err(error) => {
                self.discard(&served);
                Err(error)
            }
        }
    }

    /// Adds a disk at the driver without starting it.
    fn prepare(&self, shape: DiskShape) -> Result<Served> {
        let prepared = if shape == self.default_shape() { self.prepared().take() } else { None };
        if let Some(served) = prepared {
            return Ok(served);
        }
        let workers = self.workers.of_disk(shape.may_hang)?;
        let parameters = DeviceParameters {
            io_mode: self.backend.best_io_mode(),
            queues: workers.len() as u16,
            depth: DEPTH,
            owner_cookie: self.shared.new_owner_cookie(),
            // A pool does not survive the daemon.
            recoverable: false,
            partscan: false,
        };
        let image = Image::unbound(shape.block_size)?;
        // All pools and instances share the driver's numbers: free those of deleted disks first.
        self.deletion_queue.drain();
        let slot = self.workers.allocate_slot()?;
        let device = self.backend.add(0, parameters).inspect_err(|_| self.workers.slots().free(slot))?;
        let limits = IoLimits::default();
        let (served, begun) = Served::start(device, &workers, slot, image, limits, StartMode::Deferred);
        if let Err(error) = begun {
            self.discard(&served);
            return Err(error);
        }
        Ok(served)
    }

    pub(super) fn replace_with(
        &self,
        disk: PoolDisk,
        shape: DiskShape,
    ) -> std::result::Result<PoolDisk, NotReplaced> {
        let DiskServer::Ublk(served) = &disk.server else { return Err(NotReplaced::InUse(disk)) };
        let next = match self.prepare(shape) {
            Ok(next) => next,
            Err(error) => {
                tracing::warn!(%error, "cannot create the replacement of a used disk");
                return Err(NotReplaced::InUse(disk));
            }
        };
        let start_lock = StartLock::acquire();
        match served.try_stop(&start_lock) {
            Ok(()) => drop(lock(&self.started).remove(&disk.rdev)),
            Err(error) if error.kind() == Kind::Busy => {
                drop(start_lock);
                self.keep_prepared(next, shape);
                return Err(NotReplaced::InUse(disk));
            }
            // It is stopped, and its replacement cannot start: remove both.
            Err(error) => {
                drop(start_lock);
                self.discard(served);
                self.discard(&next);
                return Err(NotReplaced::Lost(error));
            }
        }
        let mut minor_placeholders = Vec::new();
        let next = self.start_in_place(next, disk.rdev, shape, &mut minor_placeholders, &start_lock);
        drop(start_lock);
        minor_placeholders.iter().for_each(|served| self.discard(served));
        match served.remove_queues() {
            Ok(()) => {
                // A file is not kept open longer than it is bound.
                self.close(served.take_image());
                self.deletion_queue.push(disk.server);
            }
            Err(error) => {
                tracing::error!(%error, "{CANNOT_RELEASE}");
                self.close(disk);
            }
        }
        next.map_err(NotReplaced::Lost)
    }

    fn keep_prepared(&self, next: Served, shape: DiskShape) {
        let surplus = match shape == self.default_shape() {
            true => self.prepared().replace(next),
            false => Some(next),
        };
        surplus.iter().for_each(|served| self.discard(served));
    }

    /// Starts a disk in place of one that has stopped. The kernel gives it the lowest free minor.
    /// Where that must be its predecessor's, `minor_placeholders` occupy the lower ones.
    fn start_in_place(
        &self,
        mut next: Served,
        old_rdev: u64,
        shape: DiskShape,
        minor_placeholders: &mut Vec<Served>,
        start_lock: &StartLock,
    ) -> Result<PoolDisk> {
        let until = Instant::now() + NUMBER_MAX;
        loop {
            if let Err(error) = next.start_exclusively(start_lock) {
                self.discard(&next);
                return Err(error.with_kind(Kind::Internal));
            }
            let disk = self.register(next, shape)?;
            if self.fixed().is_none() || disk.rdev == old_rdev {
                return Ok(disk);
            }
            // The kernel frees a number some time after it removed the disk.
            let beyond = disk.rdev > old_rdev;
            lock(&self.started).remove(&disk.rdev);
            if let DiskServer::Ublk(served) = disk.server {
                minor_placeholders.push(*served);
            }
            if minor_placeholders.len() == PLACEHOLDERS_MAX || Instant::now() >= until {
                return Err(Error::new(
                    Kind::Internal,
                    "another disk has taken the device number of a used one",
                ));
            }
            if beyond {
                std::thread::sleep(NUMBER_INTERVAL);
            }
            next = self.prepare(shape)?;
        }
    }
}
