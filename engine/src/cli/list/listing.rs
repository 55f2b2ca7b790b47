// SPDX-License-Identifier: Apache-2.0 OR MIT
//! All devices, pools and tenants that a user can see, and their users.
//!
//! Queries both sockets of the daemon. Looks up mount points and open files in /proc itself, since
//! the daemon must not wait for that. Does not format lists.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use zlink::introspect::CustomType;

use crate::cli::daemon;
use crate::cli::losetup::LoopDevices;
use crate::cli::losetup::remote::Remote;
use crate::cli::mount::MountPool;
use crate::cli::run::user_name;
use crate::control::{PRIVATE_SOCKET, PrivateClient};
use crate::error::{Error, Kind, Result};
use crate::instance::{Selector, spec::DeviceInfo};
use crate::loops::{DeviceEntry, flag};
use crate::private::PoolInfo;
use crate::sys::processes::{self, Process};
use crate::sys::uses::{Names, Uses};

/// Devices that the user can see: all for root, own pools for others.
#[derive(Debug, Default, Serialize, Deserialize, CustomType)]
pub(crate) struct Listing {
    /// Devices of instances, by instance and number.
    pub(crate) devices: Vec<InstanceDevice>,
    /// Private pools, oldest first.
    pub(crate) pools: Vec<ListedPool>,
}

/// A device of an instance and its users.
#[derive(Debug, Serialize, Deserialize, CustomType)]
#[serde(rename_all = "camelCase")]
#[zlink(rename_all = "camelCase")]
pub(crate) struct InstanceDevice {
    /// The device.
    pub(crate) device: DeviceInfo,
    /// Mount points of the device, its partitions and disks stacked on it, in all mount namespaces.
    pub(crate) mounted_on: Vec<String>,
    /// Processes that have the device open.
    pub(crate) open_in: Vec<Process>,
}

/// A private pool and its tenant.
#[derive(Debug, Serialize, Deserialize, CustomType)]
#[serde(rename_all = "camelCase")]
#[zlink(rename_all = "camelCase")]
pub(crate) struct ListedPool {
    /// Name.
    pub(crate) name: String,
    /// User id that the devices count against.
    pub(crate) uid: u32,
    /// Name of that user, if in /etc/passwd.
    pub(crate) user: Option<String>,
    /// Process that opened the pool; with 'loopengine run', the command. Absent if it has ended.
    pub(crate) process: Option<Process>,
    /// Container that the pool serves, or that contains its process.
    pub(crate) container: Option<String>,
    /// Time of creation, in seconds since 1970.
    pub(crate) since_unix_seconds: Option<u64>,
    /// Maximum number of devices.
    pub(crate) max_devices: u32,
    /// What serves the devices: ublk, or the kernel's loop driver (loop). Absent while the pool opens.
    pub(crate) backend: Option<String>,
    /// True if the pool accepts no operations and ends with the last use of its devices.
    pub(crate) ending: bool,
    /// Devices, by number.
    pub(crate) devices: Vec<LoopDevice>,
}

/// A device of a private pool.
#[derive(Debug, Serialize, Deserialize, CustomType)]
#[serde(rename_all = "camelCase")]
#[zlink(rename_all = "camelCase")]
pub(crate) struct LoopDevice {
    /// N of loopN.
    pub(crate) number: u32,
    /// Path of the backing file as its opener sees it. Absent if the device is not bound.
    pub(crate) image: Option<String>,
    /// Size in bytes.
    pub(crate) size_bytes: u64,
    /// Offset in the backing file, in bytes.
    pub(crate) offset_bytes: u64,
    /// Size limit in bytes; 0: none.
    pub(crate) size_limit_bytes: u64,
    /// Logical block size in bytes.
    pub(crate) block_size_bytes: u32,
    /// True if the device refuses writes.
    pub(crate) read_only: bool,
    /// Mount points of the device and its partitions, in all mount namespaces.
    pub(crate) mounted_on: Vec<String>,
    /// Processes that have the device open.
    pub(crate) open_in: Vec<Process>,
}

/// An image to search for: by identity, or by path if the file no longer exists.
pub(in crate::cli) struct ImageQuery {
    path: PathBuf,
    /// Device and inode of the file, or the number of the block device and 0.
    identity: Option<(u64, u64)>,
}

impl ImageQuery {
    pub(in crate::cli) fn named(path: &Path) -> Result<ImageQuery> {
        use std::os::unix::fs::FileTypeExt;
        let cannot = |error| Error::os(error, format!("cannot access {}", path.display()));
        let identity = match std::fs::metadata(path) {
            Ok(meta) if meta.file_type().is_block_device() => Some((meta.rdev(), 0)),
            Ok(meta) => Some((meta.dev(), meta.ino())),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
            Err(error) => return Err(cannot(error)),
        };
        Ok(ImageQuery { path: std::path::absolute(path).map_err(cannot)?, identity })
    }

    pub(in crate::cli) fn is_of(&self, device: &DeviceInfo) -> bool {
        match self.identity {
            Some(identity) => identity == (device.image_device, device.image_inode),
            None => self.path == Path::new(&device.image),
        }
    }

    fn is_bound_to(&self, entry: &DeviceEntry) -> bool {
        let Some(bound) = &entry.bound else { return false };
        if let Some(identity) = self.identity {
            return identity == (bound.image_device, bound.image_inode);
        }
        let name = bound.backing_file.display().to_string();
        self.path == Path::new(name.strip_suffix(" (deleted)").unwrap_or(&name))
    }
}

/// Collects all that the caller can see, restricted to `image` if given.
pub(in crate::cli) fn gather(run_dir: &Path, image: Option<&ImageQuery>) -> Result<Listing> {
    let devices = match daemon::ask(run_dir, async |client| client.devices(&Selector::All).await) {
        Err(error) if error.kind() != Kind::Denied => return Err(error),
        devices => devices,
    };
    let (mut devices, pools) = match (devices, pools(run_dir)) {
        // The daemon has ended: a user is told that, and not to be root.
        (Err(denied), Err(error))
            if denied.kind() == Kind::Denied && run_dir.join(PRIVATE_SOCKET).exists() =>
        {
            return Err(error);
        }
        // The daemon serves no pools.
        (devices, Err(error)) if error.kind() == Kind::Unavailable => (devices?, Vec::new()),
        (devices, pools) => (devices.unwrap_or_default(), pools?),
    };
    let uses = Uses::look();
    devices.retain(|device| image.is_none_or(|image| image.is_of(device)));
    let pools = pools.into_iter().filter_map(|pool| pool_of(pool, run_dir, image, &uses).transpose());
    Ok(Listing {
        devices: devices.into_iter().map(|device| in_use(device, &uses)).collect(),
        pools: pools.collect::<Result<_>>()?,
    })
}

/// The pools of the caller; for root, all pools.
pub(in crate::cli) fn pools(run_dir: &Path) -> Result<Vec<PoolInfo>> {
    daemon::runtime()?.block_on(async { PrivateClient::connect(run_dir).await?.list().await })
}

/// The processes that have it open, without the daemon, which has nodes open for moments.
fn open_in(uses: &Uses, names: &Names) -> Vec<Process> {
    let mut processes = uses.open_in(names);
    processes.retain(|process| process.command != "loopengine");
    processes
}

fn in_use(device: DeviceInfo, uses: &Uses) -> InstanceDevice {
    let names = Names::of_node(Path::new(&device.node));
    InstanceDevice { mounted_on: uses.mounted_on(&names), open_in: open_in(uses, &names), device }
}

/// None if the pool has ended or has no device of the image.
fn pool_of(
    info: PoolInfo,
    run_dir: &Path,
    image: Option<&ImageQuery>,
    uses: &Uses,
) -> Result<Option<ListedPool>> {
    let mut remote = match Remote::open(Some(&info.name), run_dir) {
        Err(error) if [Kind::NotFound, Kind::Unavailable].contains(&error.kind()) => return Ok(None),
        remote => remote?,
    };
    let mut entries = remote.entries().unwrap_or_default();
    entries.retain(|entry| image.is_none_or(|image| image.is_bound_to(entry)));
    if image.is_some() && entries.is_empty() {
        return Ok(None);
    }
    entries.sort_by_key(|entry| entry.number);
    // A FUSE driver has the device open; the mount table does not show the device.
    let fuse_dirs = match info.supervised {
        true => Vec::new(),
        false => MountPool::named(&info.name).dirs()?,
    };
    let process =
        info.pid.filter(|pid| processes::started(*pid) == info.pid_start_ticks).and_then(Process::of);
    let devices = entries.into_iter().map(|entry| {
        let mut device = loop_device(&entry, uses);
        if device.mounted_on.is_empty() && device.image.is_some() {
            device.mounted_on = fuse_dirs.iter().map(|dir| dir.display().to_string()).collect();
        }
        device
    });
    Ok(Some(ListedPool {
        devices: devices.collect(),
        uid: info.uid,
        user: user_name(info.uid),
        container: info.container.or_else(|| processes::container(process.as_ref()?.pid)),
        process,
        since_unix_seconds: info.since_unix_seconds,
        max_devices: info.max,
        backend: info.backend,
        ending: info.ending,
        name: info.name,
    }))
}

fn loop_device(entry: &DeviceEntry, uses: &Uses) -> LoopDevice {
    let names = Names::of_number(entry.rdev, entry.partitions.iter().map(|partition| partition.rdev));
    let bound = entry.bound.as_ref();
    LoopDevice {
        number: entry.number,
        image: bound.map(|bound| bound.backing_file.display().to_string()),
        size_bytes: entry.size,
        offset_bytes: bound.map_or(0, |bound| bound.offset),
        size_limit_bytes: bound.map_or(0, |bound| bound.size_limit),
        block_size_bytes: entry.block_size,
        read_only: bound.is_some_and(|bound| bound.flags & flag::READ_ONLY != 0),
        mounted_on: uses.mounted_on(&names),
        open_in: open_in(uses, &names),
    }
}
