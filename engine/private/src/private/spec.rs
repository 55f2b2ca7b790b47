// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Requests for private pools, and their results. The comments are part of the varlink interface
//! description.

use std::collections::BTreeSet;
use std::os::fd::OwnedFd;

use serde::{Deserialize, Serialize};
use zlink::introspect::CustomType;

use crate::error::{Error, Kind, Result};
use crate::frontend::BackendKind;
use crate::loops::NUMBER_MAX;

/// The credentials of a caller, from the kernel.
#[derive(Clone, Copy, Debug)]
pub struct Caller {
    /// User.
    pub uid: u32,
    /// Primary group.
    pub gid: u32,
    /// Process that connected; none: not in the daemon's pid namespace.
    pub pid: Option<u32>,
}

/// The properties of a new pool. All have defaults.
#[derive(Clone, Debug, Default, Serialize, Deserialize, CustomType)]
#[serde(rename_all = "camelCase")]
#[zlink(rename_all = "camelCase")]
pub struct OpenSpec {
    /// Its name; default: a number.
    pub name: Option<String>,
    /// Maximum number of devices; default: 8, or the user's limit if that is less.
    pub max: Option<u32>,
    /// The user whose limit counts its devices, and owner of the nodes; default: the caller. Only
    /// root may name others.
    pub uid: Option<u32>,
    /// Group of the nodes; default: the caller's. Only root may name others.
    pub gid: Option<u32>,
    /// Permission bits of the nodes; default: 0660.
    pub mode: Option<u32>,
    /// Whether to create a /dev and directories for a /sys, too.
    pub dev_and_sys: Option<bool>,
    /// File systems that the kernel mounts when a process under the filter mounts a device, if
    /// allowed for the caller: always nosuid and nodev, with ids mapped to the user namespace.
    pub kernel_mounts: Option<Vec<String>>,
    /// Whether it is for containers, one after the other: all devices exist from the start, device
    /// numbers do not change, and the pool stays when a container ends. Includes a /dev and
    /// directories for a /sys. Only for root.
    pub container: Option<bool>,
    /// Numbers that no device gets, because the tenant has another device of that name: at most
    /// 4096.
    pub reserved: Option<Vec<u32>>,
    /// What serves its disks, ublk or loop; default: as the daemon chooses.
    pub backend: Option<BackendKind>,
}

/// Maximum count of reserved numbers.
pub const RESERVED_MAX: usize = 4096;

impl OpenSpec {
    /// Checks the reserved numbers.
    pub(super) fn reserved(&self) -> Result<BTreeSet<u32>> {
        let reserved: BTreeSet<u32> = self.reserved.iter().flatten().copied().collect();
        let message = match reserved.last() {
            Some(last) if *last > NUMBER_MAX.cast_unsigned() => format!("number {last} cannot be reserved"),
            _ if reserved.len() > RESERVED_MAX => format!("{} numbers cannot be reserved", reserved.len()),
            _ => return Ok(reserved),
        };
        Err(Error::new(Kind::Invalid, message)
            .hint(format!("reserve at most {RESERVED_MAX} numbers up to {NUMBER_MAX}")))
    }
}

/// Checks a pool's name, and completes it.
pub(super) fn full_name(request: Option<&str>, id: u64, caller: Caller) -> Result<String> {
    let own = request.map_or_else(|| id.to_string(), str::to_owned);
    let fits = (1..=48).contains(&own.len())
        && own.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte))
        && !own.starts_with(['.', '-']);
    if !fits {
        return Err(Error::new(Kind::Invalid, format!("{own:?} cannot be the name of a pool"))
            .hint("use 1 to 48 letters, digits, '.', '_' or '-', not starting with '.' or '-'"));
    }
    Ok(if caller.uid == 0 { own } else { format!("{}.{own}", caller.uid) })
}

/// A private pool in a list.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, CustomType)]
#[serde(rename_all = "camelCase")]
#[zlink(rename_all = "camelCase")]
pub struct PoolInfo {
    /// Its name.
    pub name: String,
    /// The user whose limit counts its devices.
    pub uid: u32,
    /// Maximum number of devices.
    pub max: u32,
    /// Present devices.
    pub devices: u32,
    /// Of these, bound to a file.
    pub bound: u32,
    /// Whether the daemon serves intercepted calls for it.
    pub supervised: bool,
    /// Device numbers of its disks, if it is for containers.
    pub device_numbers: Vec<u64>,
    /// File systems that the kernel mounts for the tenant.
    pub kernel_mounts: Vec<String>,
    /// Numbers that no device gets.
    pub reserved: Vec<u32>,
    /// Whether it is ending: with the last close of its devices.
    pub ending: bool,
    /// Process that opened it, in the daemon's pid namespace.
    #[serde(default)]
    pub pid: Option<u32>,
    /// Start time of that process, in clock ticks since boot: identifies it if the pid is reused.
    #[serde(default)]
    pub pid_start_ticks: Option<u64>,
    /// What serves its disks: ublk or loop.
    #[serde(default)]
    pub backend: Option<String>,
    /// Id of the container that uses it.
    #[serde(default)]
    pub container: Option<String>,
    /// When it was opened, in seconds since 1970.
    #[serde(default)]
    pub since_unix_seconds: Option<u64>,
}

/// The result of [`super::Registry::open`].
#[derive(Debug)]
pub struct OpenedPool {
    /// The pool's name.
    pub name: String,
    /// What serves its disks, if that is known.
    pub backend: Option<&'static str>,
    /// Detached mounts: the file system with the nodes; then, if requested, the tenant's /dev, and
    /// the directories for its /sys.
    pub mounts: Vec<OwnedFd>,
}
