// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Devices that the kernel mounts, and their protection from writers meanwhile.
//!
//! A kernel file system trusts what it has read. So while one is mounted for a tenant, nobody may
//! change its bytes through loopN. The kernel mounts a shadow disk instead: a second disk over the
//! same range of the file, without a node for the tenant. The device and its partitions serve the
//! file read-only. (A read-only node would not suffice: a writer's mapped pages are written all the
//! same.) A read from the device may return old data of the mounted file system. The device is
//! writable again when the last user of the shadow disk is gone. Knows nothing of file systems.

use std::os::fd::OwnedFd;

use super::Answer;
use super::file_binding::FileBinding;
use super::partition_disk;
use super::pool_disk::PoolDisk;
use crate::image::partitions;

/// A disk that only the kernel mounts.
#[derive(Debug)]
pub struct ShadowDisk {
    /// The partition that it shadows; none: the device.
    pub(super) part: Option<u32>,
    pub(super) disk: PoolDisk,
}

/// A disk for the kernel to mount. It stays while this is held.
#[derive(Debug)]
pub struct MountSource {
    /// loopN or loopNpM.
    pub name: String,
    /// Bytes.
    pub size: u64,
    /// A detached mount of its node.
    pub node: OwnedFd,
    /// The disk, opened read-only.
    pub device: OwnedFd,
}

impl ShadowDisk {
    /// Takes over the current size of its file.
    pub fn resize_to_file(&self) -> Answer<()> {
        self.disk.resize_to_file()
    }

    /// Takes over the new size of its partition.
    pub fn show(&self, binding: &FileBinding, part: &partitions::PartitionRange) -> Answer<()> {
        self.disk
            .set_image(binding.reopen(&partition_disk::range_info(binding, part), self.disk.block_size())?.0)
    }

    /// Whether it shadows this partition.
    pub fn is_of(&self, number: u32) -> bool {
        self.part == Some(number)
    }

    pub(super) fn mount_source(&self, number: u32) -> Answer<MountSource> {
        let name = match self.part {
            Some(part) => format!("loop{number}p{part}"),
            None => format!("loop{number}"),
        };
        let device = self.disk.open(false)?;
        Ok(MountSource { name, size: self.disk.size(), node: self.disk.node()?, device })
    }
}
