// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Frontends: the drivers that deliver requests, and what they have in common.
//!
//! There are three: block devices of the ublk driver, those of the kernel's loop driver, and files
//! of FUSE. An engine has one or several of them, and each instance uses one.
//! The modules above use [`Frontends`], [`Backend`] and [`FrontendDevice`], the workers use
//! [`FrontendQueue`]; only this file and its neighbours name a driver.

mod device;
mod disk_list;
mod frontends;
pub mod fuse;
pub mod kernel_loop;
mod mode;
mod queue;
mod timeout;
pub mod ublk;

use std::ffi::OsStr;
use std::path::Path;
use std::sync::Arc;

use crate::error::{Error, Kind, Result};
use crate::image::BLOCK_MAX;
use crate::kernels::BLOCK_DEVICES;
use crate::worker::IoLimits;

pub use device::FrontendDevice;
use disk_list::DiskList;
pub use frontends::Frontends;
pub use mode::{BackendKind, IoMode};
pub use queue::FrontendQueue;

/// The parameters of a device, fixed when it is added.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceParameters {
    /// The I/O mode.
    pub io_mode: IoMode,
    /// Hardware queues.
    pub queues: u16,
    /// Requests in flight in each.
    pub depth: u16,
    /// The cookie that identifies the owner of a device that outlives the daemon; see
    /// [`examine_disk`].
    pub owner_cookie: u64,
    /// It waits for the next daemon when this one dies; otherwise it ends.
    pub recoverable: bool,
    /// The kernel scans for partitions when it starts.
    pub partscan: bool,
}

/// The condition for stopping a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StopMode {
    /// Only if it is not open.
    IfUnused,
    /// Likewise, without waiting for udev and blkid to close a new disk.
    IfUnusedNow,
    /// Unconditionally; I/O of its users fails from now on.
    Always,
}

/// The state of a device without a daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OrphanState {
    /// It was never started, or is stopped: it cannot be open.
    Unused,
    /// It may have users, whose requests wait.
    Waiting,
}

/// A device as reported by its driver.
#[derive(Clone, Copy, Debug)]
pub struct ExistingDevice {
    /// Its parameters.
    pub parameters: DeviceParameters,
    /// Its state.
    pub state: OrphanState,
}

/// A driver that delivers requests.
#[derive(Clone, Debug)]
pub enum Frontend {
    /// Block devices that this program serves.
    Ublk(ublk::DriverFeatures),
    /// Block devices that the kernel's loop driver serves.
    Loop,
    /// Files.
    Fuse(fuse::FuseMounts),
}

impl Frontend {
    /// Checks that the kernel supports this frontend.
    pub fn open(kind: BackendKind) -> Result<Frontend> {
        match kind {
            BackendKind::Ublk => {
                let features = ublk::DriverFeatures::query()?;
                if features.io_modes().is_empty() {
                    let hint = format!("Linux {} or newer is needed", BLOCK_DEVICES.version());
                    return Err(
                        Error::new(Kind::Unsupported, "this kernel's ublk driver is too old").hint(hint)
                    );
                }
                Ok(Frontend::Ublk(features))
            }
            BackendKind::Loop => kernel_loop::check().map(|()| Frontend::Loop),
            BackendKind::Fuse => fuse::check().map(|()| Frontend::Fuse(fuse::FuseMounts::default())),
        }
    }

    /// Its kind.
    pub fn kind(&self) -> BackendKind {
        match self {
            Frontend::Ublk(_) => BackendKind::Ublk,
            Frontend::Loop => BackendKind::Loop,
            Frontend::Fuse(_) => BackendKind::Fuse,
        }
    }

    /// Whether devices stay for the next daemon when this one ends.
    pub fn devices_outlive_daemon(&self) -> bool {
        match self {
            Frontend::Ublk(features) => features.supports_recovery(),
            Frontend::Loop => true,
            Frontend::Fuse(_) => false,
        }
    }

    /// A device of the driver that belongs to no instance.
    pub fn leftover(&self, id: u32, parameters: DeviceParameters) -> Result<FrontendDevice> {
        match self {
            Frontend::Ublk(features) => {
                Ok(FrontendDevice::Ublk(ublk::UblkDevice::existing(*features, id, parameters)))
            }
            Frontend::Loop => Ok(FrontendDevice::Loop(kernel_loop::KernelLoop::existing(id, parameters))),
            Frontend::Fuse(_) => Err(Error::new(Kind::Internal, "FUSE files never outlive the daemon")),
        }
    }

    /// Creates an instance's backend. Device names appear in `directory`. Its threads for this many
    /// queues run on these CPUs (on all if empty).
    pub fn backend(&self, directory: &Path, queues: usize, cpus: &[usize]) -> Result<Backend> {
        match self {
            Frontend::Ublk(features) => Ok(Backend::Ublk(*features)),
            Frontend::Loop => Ok(Backend::Loop),
            Frontend::Fuse(mounts) => fuse::FuseFileSystem::mount(directory, queues, cpus, mounts)
                .map(|files| Backend::Fuse(Arc::new(files))),
        }
    }

    /// Whether this engine serves the file system with this device number.
    pub fn serves(&self, device_number: u64) -> bool {
        match self {
            // The daemon's mount namespace has no mounts of its disks.
            Frontend::Ublk(_) => false,
            // The kernel serves them.
            Frontend::Loop => false,
            Frontend::Fuse(mounts) => mounts.contains(device_number),
        }
    }

    /// Whether the driver can stop a device only if it is not open.
    pub fn can_stop_if_unused(&self) -> bool {
        match self {
            Frontend::Ublk(features) => features.supports_binding(),
            Frontend::Loop => true,
            Frontend::Fuse(_) => false,
        }
    }
}

/// An instance's backend: how its devices are made.
#[derive(Debug)]
pub enum Backend {
    /// Stateless: all instances share the driver.
    Ublk(ublk::DriverFeatures),
    /// Likewise.
    Loop,
    /// A file system, mounted on the instance's directory.
    Fuse(Arc<fuse::FuseFileSystem>),
}

impl Backend {
    /// Its kind.
    pub fn kind(&self) -> BackendKind {
        match self {
            Backend::Ublk(_) => BackendKind::Ublk,
            Backend::Loop => BackendKind::Loop,
            Backend::Fuse(_) => BackendKind::Fuse,
        }
    }

    /// The best supported I/O mode.
    pub fn best_io_mode(&self) -> IoMode {
        match self {
            Backend::Ublk(features) => features.io_modes().first().copied().unwrap_or(IoMode::Copy),
            Backend::Loop => IoMode::Loop,
            Backend::Fuse(_) => IoMode::Fuse,
        }
    }

    /// Rejects an unsupported I/O mode.
    pub fn check_io_mode(&self, mode: IoMode) -> Result<()> {
        let (allowed, wrong) = match self {
            Backend::Ublk(features) => (features.allows(mode), matches!(mode, IoMode::Loop | IoMode::Fuse)),
            Backend::Loop => (mode == IoMode::Loop, mode != IoMode::Loop),
            Backend::Fuse(_) => (mode == IoMode::Fuse, mode != IoMode::Fuse),
        };
        match (allowed, wrong) {
            (true, _) => Ok(()),
            (false, false) => {
                let context = format!("this kernel does not support I/O mode {}", mode.as_str());
                Err(Error::new(Kind::Unsupported, context)
                    .hint("'loopengine features' lists the supported modes"))
            }
            (false, true) => {
                let serves = match self {
                    Backend::Ublk(_) => "block devices (ublk)",
                    Backend::Loop => "block devices (kernel loop)",
                    Backend::Fuse(_) => "files (FUSE)",
                };
                let context = format!("I/O mode {} does not apply to an instance of {serves}", mode.as_str());
                Err(Error::new(Kind::Unsupported, context)
                    .hint("leave out --io-mode, or create an instance with another --backend"))
            }
        }
    }

    /// Rejects a logical block size that no device can have; 0 is always allowed. The kernel's loop
    /// driver decides by itself: more than a page since Linux 6.15.
    pub fn check_block_size(&self, bytes: u32) -> Result<()> {
        if matches!(self, Backend::Loop) || bytes <= BLOCK_MAX {
            return Ok(());
        }
        let context = format!("devices of {} have blocks of at most {BLOCK_MAX} bytes", self.kind().as_str());
        Err(Error::new(Kind::Invalid, context)
            .hint("choose a smaller --block-size, or an instance with the backend loop"))
    }

    /// Adds a device. It has no size and no users yet.
    pub fn add(&self, number: u32, parameters: DeviceParameters) -> Result<FrontendDevice> {
        match self {
            Backend::Ublk(features) => ublk::UblkDevice::add(*features, parameters).map(FrontendDevice::Ublk),
            Backend::Loop => Ok(FrontendDevice::Loop(kernel_loop::KernelLoop::new(parameters))),
            Backend::Fuse(files) => {
                Ok(FrontendDevice::Fuse(fuse::FuseDevice::new(files.clone(), number, parameters)))
            }
        }
    }

    /// A device of a previous daemon, to be recovered.
    pub fn existing(&self, id: u32, parameters: DeviceParameters) -> Result<FrontendDevice> {
        match self {
            Backend::Ublk(features) => {
                Ok(FrontendDevice::Ublk(ublk::UblkDevice::existing(*features, id, parameters)))
            }
            Backend::Loop => Ok(FrontendDevice::Loop(kernel_loop::KernelLoop::existing(id, parameters))),
            Backend::Fuse(_) => Err(Error::new(Kind::Unsupported, "FUSE files do not outlive the daemon")),
        }
    }

    /// Whether names in the instance's directory are links to nodes, made by the instance.
    pub fn uses_links(&self) -> bool {
        matches!(self, Backend::Ublk(_) | Backend::Loop)
    }

    /// Whether this program's workers serve its devices.
    pub fn uses_workers(&self) -> bool {
        !matches!(self, Backend::Loop)
    }

    /// Rejects durable writes where they are not possible. `limited`: the device is read-only or goes
    /// through the page cache.
    pub fn check_durable(&self, durable: bool, limited: bool) -> Result<()> {
        let refuse = |kind, context: &str, hint: &str| Err(Error::new(kind, context).hint(hint));
        match self {
            _ if !durable => Ok(()),
            Backend::Ublk(_) if limited => {
                let context = "durable writes need direct I/O, and a device that can be written";
                refuse(Kind::Invalid, context, "leave out --read-only and --buffered")
            }
            Backend::Ublk(_) => Ok(()),
            Backend::Loop | Backend::Fuse(_) => {
                let context = "only block devices over ublk support durable writes";
                refuse(Kind::Unsupported, context, "attach it without --durable")
            }
        }
    }

    /// Rejects limits of I/O where this program does not serve it.
    pub fn check_io_limits(&self, limits: IoLimits) -> Result<()> {
        if self.uses_workers() || limits == IoLimits::default() {
            return Ok(());
        }
        Err(Error::new(Kind::Unsupported, "the kernel's loop driver does not limit the I/O of a device")
            .hint("attach it to an instance with another backend, or limit its users with io.max of their cgroup"))
    }

    /// Unmounts the file system. All devices must be gone.
    pub fn close(&self) {
        if let Backend::Fuse(files) = self {
            files.end();
        }
    }
}

/// Queries the driver about a disk, by its name.
pub fn examine_disk(disk: &str) -> Result<ExistingDevice> {
    match BackendKind::of_disk(disk) {
        Some((BackendKind::Loop, number)) => kernel_loop::KernelLoop::examine(number),
        Some((_, id)) => ublk::UblkDevice::examine(id),
        None => Err(Error::new(Kind::NotFound, format!("{disk} is not the name of a disk"))),
    }
}

/// Updates the list of disks that udev reads, at the start of a daemon with these disks: disks that
/// wait for it stay listed, disks that are gone do not.
pub fn update_disk_list<'a>(own: impl IntoIterator<Item = (&'a String, &'a ExistingDevice)>) {
    let list = DiskList::of_machine();
    let exists = |disk: &str, owner_cookie| match examine_disk(disk) {
        Ok(found) => found.parameters.owner_cookie == owner_cookie,
        // A device that the driver cannot describe may have users.
        Err(error) => error.kind() != Kind::NotFound,
    };
    for disk in list.sweep(exists) {
        tracing::info!("{disk} is no longer listed for udev: its device does not exist");
    }
    for (disk, found) in own {
        // A daemon before this list was kept, or somebody who deleted it.
        if let Err(error) = list.add(disk, found.parameters.owner_cookie) {
            tracing::warn!("the host may probe /dev/{disk}: {error}");
        }
    }
}

/// Tells whether a disk of this name can be one of this program.
pub fn disk_names() -> impl Fn(&OsStr) -> bool {
    let ours = kernel_loop::numbered_as_ours();
    move |name| match name.to_str().and_then(BackendKind::of_disk) {
        Some((BackendKind::Loop, number)) => ours(number),
        Some(_) => true,
        None => false,
    }
}

/// Devices of any backend that outlive their daemon, by the names of their disks.
pub fn lasting() -> Vec<(String, Result<ExistingDevice>)> {
    let ublk = ublk::present_devices().into_iter().map(|id| BackendKind::Ublk.disk(id));
    let loops = kernel_loop::present_devices().into_iter().map(|number| BackendKind::Loop.disk(number));
    let examine = |disk: String| {
        let found = examine_disk(&disk);
        (disk, found)
    };
    ublk.chain(loops).map(examine).collect()
}

/// The backends available on this machine, the preferred one first.
pub fn present() -> Vec<BackendKind> {
    let all = [
        (ublk::CONTROL_NODE, BackendKind::Ublk),
        (kernel_loop::CONTROL_NODE, BackendKind::Loop),
        (fuse::NODE, BackendKind::Fuse),
    ];
    all.into_iter().filter(|(node, _)| Path::new(node).exists()).map(|(_, kind)| kind).collect()
}
