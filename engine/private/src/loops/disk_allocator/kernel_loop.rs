// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Disks of a pool that the kernel's loop driver serves.
//!
//! A disk without a file is bound to an empty one: nobody else's `losetup -f` gets it. An unused
//! disk is bound to another file under its number, which takes the driver far less time than a new
//! one. Bound to a tenant's file, it is allocated anew: the driver binds only what nobody has open.

use super::{DiskAllocator, NotReplaced, lock};
use crate::error::{Error, Kind, Result};
use crate::frontend::StopMode;
use crate::frontend::kernel_loop::HeldLoop;
use crate::image::Image;
use crate::loops::pool_disk::{DiskServer, PoolDisk};

impl DiskAllocator {
    /// Allocates a disk that serves this image.
    pub(super) fn allocate_loop(&self, image: Image) -> Result<PoolDisk> {
        if image.may_block() && self.uid != 0 {
            // The driver would wait for the tenant's FUSE server, uninterruptibly.
            let context = format!("{} lies on a FUSE file system", image.name());
            return Err(Error::new(Kind::Unsupported, context));
        }
        let block_size = image.geometry().block_size;
        let Some(spare) = self.free_list().pop() else {
            return match self.fixed() {
                Some(_) => Err(Error::new(Kind::Quota, "the pool has no free disk left")),
                None => self.register_loop(HeldLoop::start(image, self.shared.new_owner_cookie())?, block_size),
            };
        };
        let DiskServer::Loop(held) = &spare.server else {
            return Err(Error::new(Kind::Internal, "a disk of another backend is on the free list"));
        };
        if let Err(error) = held.unbind() {
            if error.kind() == Kind::Busy {
                self.keep(spare);
            }
            return Err(error);
        }
        held.rebind(image).map(|held| PoolDisk { block_size, ..of_loop(held) }).inspect_err(|_| {
            // The image was refused.
            match Image::empty(super::DEFAULT_BLOCK_SIZE).and_then(|empty| held.rebind(empty)) {
                Ok(held) => self.keep(of_loop(held)),
                Err(error) => self.lose_loop(&spare, &error),
            }
        })
    }

    /// Replaces a disk that nobody has open by one without a size, under the same number.
    pub(super) fn replace_loop(&self, disk: PoolDisk) -> std::result::Result<PoolDisk, NotReplaced> {
        let DiskServer::Loop(held) = &disk.server else { return Err(NotReplaced::InUse(disk)) };
        match held.unbind() {
            Err(error) if error.kind() == Kind::Busy => return Err(NotReplaced::InUse(disk)),
            Err(error) => {
                self.lose_loop(&disk, &error);
                return Err(NotReplaced::Lost(error));
            }
            Ok(()) => {}
        }
        Image::empty(super::DEFAULT_BLOCK_SIZE).and_then(|empty| held.rebind(empty)).map(of_loop).map_err(
            |error| {
                self.lose_loop(&disk, &error);
                NotReplaced::Lost(error)
            },
        )
    }

    /// Removes a disk. One in use stays: the driver cannot take it away.
    pub(super) fn remove_loop(&self, disk: PoolDisk, when: StopMode) -> std::result::Result<(), PoolDisk> {
        let DiskServer::Loop(held) = &disk.server else { return Err(disk) };
        match held.unbind() {
            Ok(()) => {
                lock(&self.started).remove(&disk.rdev);
                self.deletion_queue.push(disk.server);
                Ok(())
            }
            Err(error) if error.kind() == Kind::Busy => Err(disk),
            Err(error) if when == StopMode::Always => {
                self.lose_loop(&disk, &error);
                Ok(())
            }
            Err(error) => {
                tracing::debug!(%error, "a disk is not removed");
                Err(disk)
            }
        }
    }

    fn register_loop(&self, held: HeldLoop, block_size: u32) -> Result<PoolDisk> {
        let disk = PoolDisk { block_size, ..of_loop(held) };
        lock(&self.started).insert(disk.rdev);
        Ok(disk)
    }

    fn lose_loop(&self, disk: &PoolDisk, error: &Error) {
        lock(&self.started).remove(&disk.rdev);
        tracing::error!(%error, rdev = disk.rdev, "a disk of a pool is lost");
    }
}

fn of_loop(held: HeldLoop) -> PoolDisk {
    PoolDisk { rdev: held.rdev(), block_size: super::DEFAULT_BLOCK_SIZE, server: DiskServer::Loop(held) }
}
