//! What is asked of private pools, and what is answered. The comments are part of the description
//! that varlink clients get.

use std::collections::BTreeSet;
use std::os::fd::OwnedFd;

use serde::{Deserialize, Serialize};
use zlink::introspect::CustomType;

use crate::error::{Error, Kind, Result};
use crate::loops::NUMBER_MAX;

/// Who calls, as the kernel knows it.
#[derive(Clone, Copy, Debug)]
pub struct Caller {
    /// User.
    pub uid: u32,
    /// Primary group.
    pub gid: u32,
    /// Process that connected; none: not one that the daemon sees.
    pub pid: Option<u32>,
}

/// What is asked of a new pool. What is left out has a default.
#[derive(Clone, Debug, Default, Serialize, Deserialize, CustomType)]
#[serde(rename_all = "camelCase")]
#[zlink(rename_all = "camelCase")]
pub struct OpenSpec {
    /// Its name; left out: a number.
    pub name: Option<String>,
    /// Devices at the most; left out: 8, or as many as the user may still have.
    pub max: Option<u32>,
    /// Whom the limit charges, and who owns the nodes; left out: the caller. Others only by root.
    pub uid: Option<u32>,
    /// Group of the nodes; left out: the caller's. Others only by root.
    pub gid: Option<u32>,
    /// Permission bits of the nodes; left out: 0660.
    pub mode: Option<u32>,
    /// Whether parts of /dev and /sys are wanted, too.
    pub dev_and_sys: Option<bool>,
    /// File systems that the kernel is to mount when a process under the filter mounts a device, if the
    /// caller may have that: always nosuid and nodev, with owners as the user namespace has them.
    pub kernel_mounts: Option<Vec<String>>,
    /// Whether it is for containers, one after the other: all devices are there from the start, under device
    /// numbers that stay, and the pool stays when a container has gone. Parts of /dev and /sys come, too.
    /// Only for root.
    pub container: Option<bool>,
    /// Numbers that no device is to have, since loopN means another device where the pool is used: at most
    /// 4096.
    pub reserved: Option<Vec<u32>>,
}

/// Numbers that may be reserved at the most.
pub const RESERVED_MAX: usize = 4096;

impl OpenSpec {
    /// The numbers that no device is to have, if they can be had.
    pub(super) fn reserved(&self) -> Result<BTreeSet<u32>> {
        let reserved: BTreeSet<u32> = self.reserved.iter().flatten().copied().collect();
        let message = match reserved.last() {
            Some(last) if *last > NUMBER_MAX.cast_unsigned() => format!("there is no loop device {last}"),
            _ if reserved.len() > RESERVED_MAX => format!("{} numbers cannot be reserved", reserved.len()),
            _ => return Ok(reserved),
        };
        Err(Error::new(Kind::Invalid, message)
            .hint(format!("reserve at most {RESERVED_MAX} numbers up to {NUMBER_MAX}")))
    }
}

/// A pool's name, if it can be one.
pub(super) fn full_name(asked: Option<&str>, id: u64, caller: Caller) -> Result<String> {
    let own = asked.map_or_else(|| id.to_string(), str::to_owned);
    let fits = (1..=48).contains(&own.len())
        && own.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte))
        && !own.starts_with(['.', '-']);
    if !fits {
        return Err(Error::new(Kind::Invalid, format!("{own:?} cannot be the name of a pool"))
            .hint("use 1 to 48 letters, digits, '.', '_' or '-', not starting with '.' or '-'"));
    }
    Ok(if caller.uid == 0 { own } else { format!("{}.{own}", caller.uid) })
}

/// A private pool, as lists show it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, CustomType)]
#[serde(rename_all = "camelCase")]
#[zlink(rename_all = "camelCase")]
pub struct PoolInfo {
    /// Its name.
    pub name: String,
    /// Whom its devices count for.
    pub uid: u32,
    /// Devices at the most.
    pub max: u32,
    /// Devices that are there.
    pub devices: u32,
    /// Of these, bound to a file.
    pub bound: u32,
    /// Whether calls of a process tree are served.
    pub supervised: bool,
    /// Device numbers that its disks have, if it was made for containers.
    pub device_numbers: Vec<u64>,
    /// File systems that the kernel mounts for who is served.
    pub kernel_mounts: Vec<String>,
    /// Numbers that none of its devices has.
    pub reserved: Vec<u32>,
    /// Whether it takes nothing more, and ends with the last use of its devices.
    pub ending: bool,
    /// Process that opened it, as the daemon numbers it.
    #[serde(default)]
    pub pid: Option<u32>,
    /// When that process started, in clock ticks since boot: tells it from a later one of its number.
    #[serde(default)]
    pub pid_start_ticks: Option<u64>,
    /// Container that uses it, as its runtime calls it.
    #[serde(default)]
    pub container: Option<String>,
    /// When it was opened, in seconds since 1970.
    #[serde(default)]
    pub since_unix_seconds: Option<u64>,
}

/// What [`super::Registry::open`] answers.
#[derive(Debug)]
pub struct Opened {
    /// The pool's name.
    pub name: String,
    /// The file system with the nodes; then, if they were asked for, the tenant's /dev, and the
    /// directories for its /sys. None is mounted anywhere yet.
    pub mounts: Vec<OwnedFd>,
}
