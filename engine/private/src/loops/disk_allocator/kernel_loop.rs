// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Disks of a pool that the kernel's loop driver serves.
//!
//! A disk without a file is bound to an empty one: nobody else's `losetup -f` gets it. The driver
//! cannot bind a disk in place while it is bound, so a device gets another disk with its file. An
//! unused disk is bound to another file under its number, which takes the driver far less time than
//! a new number.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use super::{DEFAULT_BLOCK_SIZE, DiskAllocator, NotReplaced, lock};
use crate::error::{Error, Kind, Result};
use crate::frontend::StopMode;
use crate::frontend::kernel_loop::PrivateLoop;
use crate::image::Image;
use crate::loops::pool_disk::{DiskServer, DiskShape, PoolDisk};

impl DiskAllocator {
    /// Allocates a disk that serves this image.
    pub(super) fn allocate_loop(&self, image: Image) -> Result<PoolDisk> {
        if image.may_block() && self.uid != 0 {
            // The driver would wait for the tenant's FUSE server, uninterruptibly.
            let context = format!("{} lies on a FUSE file system", image.name());
            return Err(Error::new(Kind::Unsupported, context));
        }
        let (block_size, image) = (image.geometry().block_size, Arc::new(image));
        let spares = std::mem::take(&mut *self.free_list());
        let mut spares = spares.into_iter().rev();
        let mut bound = Err(Error::new(Kind::Quota, "the pool has no free disk left"));
        for spare in spares.by_ref() {
            let DiskServer::Loop(device) = &spare.server else { continue };
            // Somebody has opened it by a name that it had before.
            if let Err(error) = device.unbind() {
                self.keep(spare);
                bound = Err(error);
                continue;
            }
            match device.rebind(&image) {
                Ok(device) => {
                    bound = Ok(self.register_loop(device, block_size));
                    break;
                }
                Err(error) if error.kind() == Kind::Busy => self.lose_loop(&spare, &error),
                // The image was refused.
                Err(error) => {
                    match self.bind_nothing(device) {
                        Ok(free) => self.keep(free),
                        Err(error) => self.lose_loop(&spare, &error),
                    }
                    self.free_list().extend(spares.rev());
                    return Err(error);
                }
            }
        }
        self.free_list().extend(spares.rev());
        match (bound, self.fixed()) {
            (Err(_), None) => PrivateLoop::start(&image, self.shared.new_owner_cookie())
                .map(|started| self.register_loop(started, block_size)),
            (bound, _) => bound,
        }
    }

    /// Replaces a disk that nobody has open by one without a size, under the same number.
    pub(super) fn replace_loop(&self, disk: PoolDisk) -> std::result::Result<PoolDisk, NotReplaced> {
        let DiskServer::Loop(device) = &disk.server else { return Err(NotReplaced::InUse(disk)) };
        match device.unbind().and_then(|()| self.bind_nothing(device)) {
            Ok(next) => Ok(next),
            // Its file system may answer later.
            Err(error) if matches!(error.kind(), Kind::Busy | Kind::Deadline) => {
                Err(NotReplaced::InUse(disk))
            }
            Err(error) => {
                self.lose_loop(&disk, &error);
                Err(NotReplaced::Lost(error))
            }
        }
    }

    fn bind_nothing(&self, device: &PrivateLoop) -> Result<PoolDisk> {
        let bound = Image::empty(DEFAULT_BLOCK_SIZE).and_then(|empty| device.rebind(&Arc::new(empty)));
        // It is not in use: another program was faster.
        let bound = bound.map_err(|error| error.with_kind(Kind::Internal))?;
        Ok(self.register_loop(bound, DEFAULT_BLOCK_SIZE))
    }

    /// Removes a disk. One in use stays until its last close: the driver cannot take it away.
    pub(super) fn remove_loop(&self, disk: PoolDisk, when: StopMode) -> std::result::Result<(), PoolDisk> {
        let DiskServer::Loop(device) = &disk.server else { return Err(disk) };
        match device.unbind() {
            Ok(()) => {
                lock(&self.started).remove(&disk.rdev);
                self.deletion_queue.push(disk.server);
                Ok(())
            }
            Err(error) => {
                tracing::debug!(%error, "a disk is not removed");
                if when == StopMode::Always {
                    disk.set_autoclear(true);
                }
                Err(disk)
            }
        }
    }

    fn register_loop(&self, device: PrivateLoop, block_size: u32) -> PoolDisk {
        let (rdev, device) = (device.rdev(), Arc::new(device));
        lock(&self.started).insert(rdev, Some(Arc::clone(&device)));
        let shape = DiskShape { block_size, may_hang: true };
        PoolDisk { rdev, shape, server: DiskServer::Loop(device) }
    }

    /// Whether each change of a disk is reported, its last close for instance: see
    /// `CloseWatcher::report`.
    pub fn reports_changes(&self) -> bool {
        self.is_kernel_loop() && self.notices.reporting.load(Relaxed)
    }

    /// Whether it has loop`number` of the kernel's driver.
    pub fn has_kernel_loop(&self, number: u32) -> bool {
        lock(&self.started).values().flatten().any(|device| device.number() == number)
    }

    /// Records that loop`number` has the disk with this device number.
    pub fn record_device(&self, rdev: u64, number: u32) {
        if self.is_kernel_loop() {
            lock(&self.last_devices).insert(rdev, number);
        }
    }

    /// The last device that had the disk with this device number.
    pub fn last_device(&self, rdev: u64) -> Option<u32> {
        lock(&self.last_devices).get(&rdev).copied()
    }

    fn lose_loop(&self, disk: &PoolDisk, error: &Error) {
        lock(&self.started).remove(&disk.rdev);
        if let DiskServer::Loop(device) = &disk.server {
            device.forget();
        }
        tracing::error!(%error, rdev = disk.rdev, "a disk of a pool is lost");
    }
}
