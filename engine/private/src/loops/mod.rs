// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Private pools of loop devices: loop(4) on ublk, or on the kernel's own driver.
//!
//! A pool is an independent `/dev/loop-control` with its own `loopN`, numbered from 0 and limited
//! in number, for one owner. This module knows the effect of each operation, with the real driver's
//! values and errnos, and when a device is created, reused and removed. It does not know how
//! operations arrive (`intercept`), nor which file system has the nodes (`loopfs`).

mod close_signs;
mod close_watcher;
mod deletion_queue;
mod device;
mod disk_allocator;
mod file_binding;
mod file_closer;
mod loop_slot;
mod name_watcher;
mod partition_disk;
mod pool;
mod pool_disk;
mod pool_mounts;
mod pools;
mod quota;
mod shadow_disk;

use std::collections::BTreeSet;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

pub use partition_disk::POOL_MAX as PARTITIONS_MAX;
pub use pool::{LoopOp, LoopReply, Pool};
pub use pools::Pools;
pub use quota::Quotas;
pub use rustix::io::Errno;
pub use shadow_disk::MountSource;

use serde::{Deserialize, Serialize};
use zlink::introspect::CustomType;

use crate::error::{Error, Kind};
use crate::frontend::BackendKind;
use crate::image::partitions;
use crate::sys::stack::Stack;

/// The result of an operation, as its caller gets it.
pub type Answer<T> = std::result::Result<T, Errno>;

/// Flags of a device, as in linux/loop.h.
pub mod flag {
    /// Writes are refused.
    pub const READ_ONLY: u32 = 1;
    /// The last close unbinds.
    pub const AUTOCLEAR: u32 = 4;
    /// Partitions are requested.
    pub const PARTSCAN: u32 = 8;
    /// Direct I/O is requested, and possible.
    pub const DIRECT_IO: u32 = 16;
}

/// Bytes of a name in `struct loop_info64`.
pub const NAME_BYTES: usize = 64;

/// The properties of a pool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PoolSpec {
    /// Its name, unique in the daemon.
    pub name: String,
    /// Maximum number of devices.
    pub max: u32,
    /// The user whose limit counts its devices, and owner of the nodes.
    pub uid: u32,
    /// Group of the nodes.
    pub gid: u32,
    /// Permission bits of the nodes.
    pub mode: u32,
    /// All devices exist from the start, and the set of device numbers of its disks never changes:
    /// for containers, whose device cgroup lists these numbers.
    pub fixed: bool,
    /// Calls of its users on loop-control are intercepted.
    pub intercepted: bool,
    /// Numbers that no device gets: the tenant has another device of that name.
    pub reserved: BTreeSet<u32>,
    /// What serves its disks; none: as the daemon chooses.
    pub backend: Option<BackendKind>,
}

impl PoolSpec {
    /// Allowed device numbers, lowest first.
    pub fn numbers(&self) -> impl Iterator<Item = u32> {
        (0..=NUMBER_MAX.cast_unsigned()).filter(|number| !self.reserved.contains(number))
    }
}

/// Highest number, as with the kernel's.
pub const NUMBER_MAX: i32 = (1 << 20) - 1;

/// The arguments of LOOP_CONFIGURE. LOOP_SET_FD is the same with everything 0.
#[derive(Debug)]
pub struct LoopConfig {
    /// The backing file: a duplicate of the caller's descriptor.
    pub file: OwnedFd,
    /// Logical block size; 0: 512.
    pub block_size: u32,
    /// `struct loop_info64`.
    pub info: LoopInfo,
}

/// The fields of `struct loop_info64` that are used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoopInfo {
    /// First byte of the file that is part of the device.
    pub offset: u64,
    /// Maximum size in bytes; 0: to the end of the file.
    pub size_limit: u64,
    /// See [`flag`].
    pub flags: u32,
    /// The caller's name of the file.
    pub file_name: [u8; NAME_BYTES],
    /// Must be 0.
    pub encrypt_type: u32,
    /// At most 32.
    pub encrypt_key_size: u32,
}

impl Default for LoopInfo {
    fn default() -> Self {
        LoopInfo {
            offset: 0,
            size_limit: 0,
            flags: 0,
            file_name: [0; NAME_BYTES],
            encrypt_type: 0,
            encrypt_key_size: 0,
        }
    }
}

/// The result of LOOP_GET_STATUS64.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoopStatus {
    /// N of loopN.
    pub number: u32,
    /// Device number of the file system of the backing file.
    pub device: u64,
    /// Its inode number.
    pub inode: u64,
    /// Device number of the backing file, if it is a device.
    pub rdevice: u64,
    /// The other fields of `struct loop_info64`.
    pub info: LoopInfo,
}

/// A device as listings and sysfs have it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, CustomType)]
#[serde(rename_all = "camelCase")]
#[zlink(rename_all = "camelCase")]
pub struct DeviceEntry {
    /// N of loopN.
    pub number: u32,
    /// Device number of its disk.
    pub rdev: u64,
    /// Changes with the disk: names of an earlier disk must not open the present one.
    pub generation: u64,
    /// Bytes.
    #[serde(rename = "sizeBytes")]
    #[zlink(rename = "sizeBytes")]
    pub size: u64,
    /// Logical block size in bytes.
    #[serde(rename = "blockSizeBytes")]
    #[zlink(rename = "blockSizeBytes")]
    pub block_size: u32,
    /// Its backing file, if it is bound.
    pub bound: Option<Bound>,
    /// Its partitions, if they were requested.
    pub partitions: Vec<PartitionEntry>,
}

/// The backing file of a bound device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, CustomType)]
#[serde(rename_all = "camelCase")]
#[zlink(rename_all = "camelCase")]
pub struct Bound {
    /// Path of the file in the mounts of its opener, with " (deleted)" if it is deleted. In JSON,
    /// bytes that are not UTF-8 become U+FFFD.
    #[serde(serialize_with = "lossy")]
    pub backing_file: PathBuf,
    /// Device number of the file system of the file, or of the block device itself, if it is one.
    pub image_device: u64,
    /// Inode number of the file; 0: it is a block device.
    pub image_inode: u64,
    /// First byte of the file.
    #[serde(rename = "offsetBytes")]
    #[zlink(rename = "offsetBytes")]
    pub offset: u64,
    /// Maximum size in bytes; 0: to the end of the file.
    #[serde(rename = "sizeLimitBytes")]
    #[zlink(rename = "sizeLimitBytes")]
    pub size_limit: u64,
    /// LO_FLAGS_* of linux/loop.h.
    pub flags: u32,
}

fn lossy<S: serde::Serializer>(path: &Path, serializer: S) -> std::result::Result<S::Ok, S::Error> {
    serializer.collect_str(&path.display())
}

/// A partition of a device, itself a block device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, CustomType)]
#[serde(rename_all = "camelCase")]
#[zlink(rename_all = "camelCase")]
pub struct PartitionEntry {
    /// M of loopNpM.
    pub number: u32,
    /// Device number of its block device.
    pub rdev: u64,
    /// As that of a device.
    pub generation: u64,
    /// First sector of 512 bytes on the device.
    #[serde(rename = "startSectors")]
    #[zlink(rename = "startSectors")]
    pub start: u64,
    /// Bytes.
    #[serde(rename = "sizeBytes")]
    #[zlink(rename = "sizeBytes")]
    pub size: u64,
}

/// A request of BLKPG, in bytes of the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PartitionChange {
    /// Adds a partition.
    Add(partitions::PartitionRange),
    /// Deletes the partition with this number.
    Delete(u32),
    /// Changes the size of a partition.
    Resize(partitions::PartitionRange),
}

/// The caller of an operation on a device, through a descriptor of the device.
pub trait LoopCaller {
    /// Whether the descriptor was opened for writing.
    fn can_write(&self) -> bool;
    /// Whether the caller administrates the pool (CAP_SYS_ADMIN in the user namespace of the pool).
    fn is_admin(&self) -> bool;
    /// Whether the caller still waits for the result. To be checked before each side effect.
    fn is_waiting(&self) -> bool;
    /// Replaces the caller's descriptor by this file. EOPNOTSUPP without a descriptor.
    fn replace_descriptor(&self, file: OwnedFd) -> Answer<()>;
    /// Whether the caller has a descriptor that can be replaced.
    fn has_descriptor(&self) -> bool;
    /// Whether a file system of the disk with this number is mounted in the caller's namespace.
    fn has_mounted(&self, _rdev: u64) -> bool {
        false
    }
    /// The caller's mount namespace, if it is known.
    fn mount_namespace(&self) -> Option<OwnedFd> {
        None
    }
}

/// A caller without a descriptor of a device: the owner of the pool, or root.
#[derive(Clone, Copy, Debug)]
pub struct OwnerCaller {
    until: Instant,
}

impl OwnerCaller {
    /// A caller that waits at most for this time.
    pub fn with_timeout(timeout: Duration) -> OwnerCaller {
        OwnerCaller { until: Instant::now() + timeout }
    }
}

impl LoopCaller for OwnerCaller {
    fn can_write(&self) -> bool {
        true
    }

    fn is_admin(&self) -> bool {
        true
    }

    fn is_waiting(&self) -> bool {
        Instant::now() < self.until
    }

    fn replace_descriptor(&self, _file: OwnedFd) -> Answer<()> {
        Err(Errno::OPNOTSUPP)
    }

    fn has_descriptor(&self) -> bool {
        false
    }
}

/// Is notified of changes of a pool, after the change and before the operation returns. Must not
/// call operations of the pool; may read entries.
pub trait PoolWatcher: Send + Sync {
    /// The device with this number was added, changed, or removed.
    fn changed(&self, pool: &Pool, number: u32);
    /// A disk stacked on devices of the pool was added or removed.
    fn stack_changed(&self, _stack: &Stack, _is_there: bool) {}
    /// The pool has ended: it has no device left.
    fn ended(&self, _pool: &Pool) {}
}

/// The errno of a failure for a caller of loop(4): the kernel's own, if there is one.
fn errno(error: &Error) -> Errno {
    let mut source = std::error::Error::source(error);
    while let Some(inner) = source {
        if let Some(inner) = inner.downcast_ref::<std::io::Error>() {
            return errno_of(inner);
        }
        source = inner.source();
    }
    match error.kind() {
        Kind::Invalid => Errno::INVAL,
        Kind::NotFound => Errno::NXIO,
        Kind::Exists | Kind::Busy => Errno::BUSY,
        Kind::Quota => Errno::NOSPC,
        Kind::Denied => Errno::PERM,
        Kind::Unsupported => Errno::OPNOTSUPP,
        Kind::Unavailable | Kind::Deadline | Kind::Io | Kind::Internal => Errno::IO,
    }
}

fn errno_of(error: &std::io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn skips_reserved_numbers() {
        let reserved = BTreeSet::from([0, 2]);
        let spec = PoolSpec {
            name: String::new(),
            max: 2,
            uid: 0,
            gid: 0,
            mode: 0,
            fixed: false,
            intercepted: false,
            reserved,
            backend: None,
        };
        assert_eq!(spec.numbers().take(3).collect::<Vec<_>>(), [1, 3, 4]);
    }
}
