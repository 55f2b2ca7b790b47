//! All devices, pools and tenants that a user may see, with who uses them.
//!
//! Asks the daemon which there are; what they are mounted on and who has them open is looked up here, in
//! /proc: the daemon must not wait for that. Knows both sockets. Does not know how a list is shown.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use zlink::introspect::CustomType;

use crate::cli::daemon;
use crate::cli::losetup::Devices;
use crate::cli::mount::Mounted;
use crate::cli::private::user_name;
use crate::cli::remote::Remote;
use crate::control::PrivateClient;
use crate::error::{Error, Kind, Result};
use crate::instance::{Selector, spec::DeviceInfo};
use crate::loops::{DeviceEntry, flag};
use crate::private::PoolInfo;
use crate::sys::processes::{self, Process};
use crate::sys::uses::{Names, Uses};

/// All that a user may see: root all, others their own pools.
#[derive(Debug, Default, Serialize, Deserialize, CustomType)]
pub(crate) struct Listing {
    /// Devices of instances, by instance and number.
    pub(crate) devices: Vec<InstanceDevice>,
    /// Private pools, by age.
    pub(crate) pools: Vec<Pool>,
}

/// A device of an instance, and who uses it.
#[derive(Debug, Serialize, Deserialize, CustomType)]
#[serde(rename_all = "camelCase")]
#[zlink(rename_all = "camelCase")]
pub(crate) struct InstanceDevice {
    /// The device.
    pub(crate) device: DeviceInfo,
    /// Directories that it, a partition of it or a stack upon it is mounted on, in any mount namespace.
    pub(crate) mounted_on: Vec<String>,
    /// Processes that have it open.
    pub(crate) open_in: Vec<Process>,
}

/// A private pool, and its tenant.
#[derive(Debug, Serialize, Deserialize, CustomType)]
#[serde(rename_all = "camelCase")]
#[zlink(rename_all = "camelCase")]
pub(crate) struct Pool {
    /// Its name.
    pub(crate) name: String,
    /// User whom its devices count for.
    pub(crate) uid: u32,
    /// That user's name; none: not in /etc/passwd.
    pub(crate) user: Option<String>,
    /// Process that opened it; with 'loopengine run', the command. None: it has ended.
    pub(crate) process: Option<Process>,
    /// Container that it serves, or that its process is in.
    pub(crate) container: Option<String>,
    /// When it was opened, in seconds since 1970.
    pub(crate) since_unix_seconds: Option<u64>,
    /// Devices at the most.
    pub(crate) max_devices: u32,
    /// Whether it takes nothing more, and ends with the last use of its devices.
    pub(crate) ending: bool,
    /// By number.
    pub(crate) devices: Vec<LoopDevice>,
}

/// A device of a private pool.
#[derive(Debug, Serialize, Deserialize, CustomType)]
#[serde(rename_all = "camelCase")]
#[zlink(rename_all = "camelCase")]
pub(crate) struct LoopDevice {
    /// N of loopN.
    pub(crate) number: u32,
    /// The file's path as its opener sees it; none: the device is not bound.
    pub(crate) image: Option<String>,
    /// Bytes.
    pub(crate) size_bytes: u64,
    /// First byte of the file that the device shows.
    pub(crate) offset_bytes: u64,
    /// Bytes at the most; 0: to the end of the file.
    pub(crate) size_limit_bytes: u64,
    /// Logical block size in bytes.
    pub(crate) block_size_bytes: u32,
    /// Writes are refused.
    pub(crate) read_only: bool,
    /// Directories that it or a partition of it is mounted on, in any mount namespace.
    pub(crate) mounted_on: Vec<String>,
    /// Processes that have it open.
    pub(crate) open_in: Vec<Process>,
}

/// An image that is looked for: by what it is, or, once it has no name any more, by the name that it had.
pub(in crate::cli) struct Image {
    path: PathBuf,
    /// File system and inode, or the block device's number and 0.
    identity: Option<(u64, u64)>,
}

impl Image {
    pub(in crate::cli) fn named(path: &Path) -> Result<Image> {
        use std::os::unix::fs::FileTypeExt;
        let cannot = |error| Error::os(error, format!("cannot look for {}", path.display()));
        let identity = match std::fs::metadata(path) {
            Ok(meta) if meta.file_type().is_block_device() => Some((meta.rdev(), 0)),
            Ok(meta) => Some((meta.dev(), meta.ino())),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
            Err(error) => return Err(cannot(error)),
        };
        Ok(Image { path: std::path::absolute(path).map_err(cannot)?, identity })
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

/// Whatever the caller may see; of `image`, if one is given.
pub(in crate::cli) fn gather(run_dir: &Path, image: Option<&Image>) -> Result<Listing> {
    let devices = match daemon::ask(run_dir, async |client| client.devices(&Selector::All).await) {
        Err(error) if error.kind() != Kind::Denied => return Err(error),
        devices => devices,
    };
    let (mut devices, pools) = match (devices, pools(run_dir)) {
        // Nobody serves pools.
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

/// The caller's pools; for root, all.
pub(in crate::cli) fn pools(run_dir: &Path) -> Result<Vec<PoolInfo>> {
    daemon::runtime()?.block_on(async { PrivateClient::connect(run_dir).await?.list().await })
}

fn in_use(device: DeviceInfo, uses: &Uses) -> InstanceDevice {
    let names = Names::of_node(Path::new(&device.node));
    InstanceDevice { mounted_on: uses.mounted_on(&names), open_in: uses.open_in(&names), device }
}

/// None: it has ended meanwhile, or has nothing of the image.
fn pool_of(info: PoolInfo, run_dir: &Path, image: Option<&Image>, uses: &Uses) -> Result<Option<Pool>> {
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
    // By a program of FUSE, which has the device open and says nothing of it.
    let by_us = match info.supervised {
        true => Vec::new(),
        false => Mounted::named(&info.name).dirs()?,
    };
    let process =
        info.pid.filter(|pid| processes::started(*pid) == info.pid_start_ticks).and_then(Process::of);
    let devices = entries.into_iter().map(|entry| {
        let mut device = loop_device(&entry, uses);
        if device.mounted_on.is_empty() && device.image.is_some() {
            device.mounted_on = by_us.iter().map(|dir| dir.display().to_string()).collect();
        }
        device
    });
    Ok(Some(Pool {
        devices: devices.collect(),
        uid: info.uid,
        user: user_name(info.uid),
        container: info.container.or_else(|| processes::container(process.as_ref()?.pid)),
        process,
        since_unix_seconds: info.since_unix_seconds,
        max_devices: info.max,
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
        open_in: uses.open_in(&names),
    }
}
