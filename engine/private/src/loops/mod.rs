//! Private pools of loop devices: what loop(4) promises, on ublk.
//!
//! A pool is an independent `/dev/loop-control` with its `loopN`, from 0, at most so many, for one
//! owner. This room knows what each operation does, in the real driver's values and errnos, and when
//! a device comes, goes and is reused. It does not know how operations arrive (`intercept`), nor where
//! the nodes are shown (`loopfs`).

mod binding;
mod closer;
mod device;
mod disk;
mod maker;
mod mounted;
mod parts;
mod place;
mod pool;
mod pools;
mod quota;
mod reaper;
mod used;

use std::collections::BTreeSet;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

pub use mounted::Lent;
pub use parts::POOL_MAX as PARTITIONS_MAX;
pub use pool::{LoopOp, LoopReply, Pool};
pub use pools::Pools;
pub use quota::Quotas;
pub use rustix::io::Errno;

use serde::{Deserialize, Serialize};
use zlink::introspect::CustomType;

use crate::error::{Error, Kind};
use crate::image::partitions;
use crate::sys::stack::Stack;

/// What an operation answers to its caller.
pub type Answer<T> = std::result::Result<T, Errno>;

/// Flags of a device, as in linux/loop.h.
pub mod flag {
    /// Writes are refused.
    pub const READ_ONLY: u32 = 1;
    /// The last close unbinds.
    pub const AUTOCLEAR: u32 = 4;
    /// Partitions are wanted.
    pub const PARTSCAN: u32 = 8;
    /// Direct I/O is wanted, and possible.
    pub const DIRECT_IO: u32 = 16;
}

/// Bytes of a name in `struct loop_info64`.
pub const NAME_BYTES: usize = 64;

/// What a pool is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PoolSpec {
    /// Its name, for logs and lists; unique in the daemon.
    pub name: String,
    /// Devices at the most.
    pub max: u32,
    /// Whom the limit per user charges, and who owns the nodes.
    pub uid: u32,
    /// Group of the nodes.
    pub gid: u32,
    /// Permission bits of the nodes.
    pub mode: u32,
    /// All devices are there from the start, and no disk of it ever has a device number that none had
    /// then: for those who may open what a list of numbers says.
    pub fixed: bool,
    /// Who uses it has the calls on loop-control intercepted.
    pub intercepted: bool,
    /// Numbers that no device gets: where the tenant is, loopN with such an N means another device.
    pub reserved: BTreeSet<u32>,
}

impl PoolSpec {
    /// The numbers that devices may have, lowest first.
    pub fn numbers(&self) -> impl Iterator<Item = u32> {
        (0..=NUMBER_MAX.cast_unsigned()).filter(|number| !self.reserved.contains(number))
    }
}

/// Highest number, as with the kernel's.
pub const NUMBER_MAX: i32 = (1 << 20) - 1;

/// What LOOP_CONFIGURE asks for; LOOP_SET_FD asks for the same with everything 0.
#[derive(Debug)]
pub struct Configure {
    /// The backing file: a duplicate of the caller's descriptor.
    pub file: OwnedFd,
    /// Logical block size; 0: 512.
    pub block_size: u32,
    /// The rest.
    pub info: Info,
}

/// What `struct loop_info64` says that matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Info {
    /// First byte of the file that the device shows.
    pub offset: u64,
    /// Bytes at the most; 0: to the end of the file.
    pub size_limit: u64,
    /// See [`flag`].
    pub flags: u32,
    /// What the caller calls the file.
    pub file_name: [u8; NAME_BYTES],
    /// Must be 0.
    pub encrypt_type: u32,
    /// At most 32.
    pub encrypt_key_size: u32,
}

impl Default for Info {
    fn default() -> Self {
        Info {
            offset: 0,
            size_limit: 0,
            flags: 0,
            file_name: [0; NAME_BYTES],
            encrypt_type: 0,
            encrypt_key_size: 0,
        }
    }
}

/// What LOOP_GET_STATUS64 answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Status {
    /// N of loopN.
    pub number: u32,
    /// Device number of the file system of the backing file.
    pub device: u64,
    /// Its inode number.
    pub inode: u64,
    /// Device number of the backing file, if it is a device.
    pub rdevice: u64,
    /// The rest; nothing is encrypted.
    pub info: Info,
}

/// A device as directories and sysfs show it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, CustomType)]
#[serde(rename_all = "camelCase")]
#[zlink(rename_all = "camelCase")]
pub struct Entry {
    /// N of loopN.
    pub number: u32,
    /// Device number of the block device that loopN is now.
    pub rdev: u64,
    /// Another whenever `rdev` has become another's: names of an earlier one must not open any more.
    pub generation: u64,
    /// Bytes.
    #[serde(rename = "sizeBytes")]
    #[zlink(rename = "sizeBytes")]
    pub size: u64,
    /// Logical block size in bytes.
    #[serde(rename = "blockSizeBytes")]
    #[zlink(rename = "blockSizeBytes")]
    pub block_size: u32,
    /// Bound to a file.
    pub bound: Option<Bound>,
    /// Partitions, if they were asked for and there are any.
    pub partitions: Vec<Partition>,
}

/// What a bound device is bound to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, CustomType)]
#[serde(rename_all = "camelCase")]
#[zlink(rename_all = "camelCase")]
pub struct Bound {
    /// Path of the file as its opener sees it, with " (deleted)" if it is. In JSON, what is not UTF-8 is U+FFFD.
    #[serde(serialize_with = "lossy")]
    pub backing_file: PathBuf,
    /// Device number of the file system that the file is in; of the block device itself, if it is one.
    pub image_device: u64,
    /// Inode number of the file; 0: it is a block device.
    pub image_inode: u64,
    /// First byte of the file.
    #[serde(rename = "offsetBytes")]
    #[zlink(rename = "offsetBytes")]
    pub offset: u64,
    /// Bytes at the most; 0: to the end.
    #[serde(rename = "sizeLimitBytes")]
    #[zlink(rename = "sizeLimitBytes")]
    pub size_limit: u64,
    /// See [`flag`].
    pub flags: u32,
}

fn lossy<S: serde::Serializer>(path: &Path, serializer: S) -> std::result::Result<S::Ok, S::Error> {
    serializer.collect_str(&path.display())
}

/// A partition of a device, itself a block device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, CustomType)]
#[serde(rename_all = "camelCase")]
#[zlink(rename_all = "camelCase")]
pub struct Partition {
    /// M of loopNpM.
    pub number: u32,
    /// Device number of its block device.
    pub rdev: u64,
    /// As with a device.
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

/// What BLKPG asks for, in bytes of the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PartitionChange {
    /// A new partition.
    Add(partitions::PartitionRange),
    /// The partition with this number goes.
    Delete(u32),
    /// One that is there gets another size.
    Resize(partitions::PartitionRange),
}

/// Who asks for an operation on a device, through a descriptor of it.
pub trait Caller {
    /// The descriptor was opened for writing.
    fn writes(&self) -> bool;
    /// The caller is the administrator of the pool (CAP_SYS_ADMIN where the pool belongs).
    fn is_admin(&self) -> bool;
    /// The caller still waits for the answer. To be asked before each side effect.
    fn waits(&self) -> bool;
    /// From now on the caller's descriptor is this file. Unsupported where there is no descriptor.
    fn replace(&self, file: OwnedFd) -> Answer<()>;
    /// The caller has such a descriptor, so that `replace` can work.
    fn has_descriptor(&self) -> bool;
    /// The caller sees a file system mounted from the disk with this device number.
    fn has_mounted(&self, _rdev: u64) -> bool {
        false
    }
}

/// A [`Caller`] without a descriptor of a device: the owner of the pool, or root.
#[derive(Clone, Copy, Debug)]
pub struct Owner {
    until: Instant,
}

impl Owner {
    /// One who waits so long for an answer.
    pub fn waiting(at_most: Duration) -> Owner {
        Owner { until: Instant::now() + at_most }
    }
}

impl Caller for Owner {
    fn writes(&self) -> bool {
        true
    }

    fn is_admin(&self) -> bool {
        true
    }

    fn waits(&self) -> bool {
        Instant::now() < self.until
    }

    fn replace(&self, _file: OwnedFd) -> Answer<()> {
        Err(Errno::OPNOTSUPP)
    }

    fn has_descriptor(&self) -> bool {
        false
    }
}

/// Is told what changes in a pool, after the change and before the operation is answered. Must not
/// call the pool's operations; may ask for entries.
pub trait Watcher: Send + Sync {
    /// The device with this number has come, changed, or gone.
    fn changed(&self, pool: &Pool, number: u32);
    /// A disk that lies upon its devices has come, or gone.
    fn stacked(&self, _stack: &Stack, _is_there: bool) {}
    /// The pool has ended: no device of it is left.
    fn ended(&self, _pool: &Pool) {}
}

/// The errno that a failure is to a caller of loop(4): the kernel's own where there is one.
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
    fn reserved_numbers_are_passed_over() {
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
        };
        assert_eq!(spec.numbers().take(3).collect::<Vec<_>>(), [1, 3, 4]);
    }
}
