// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Frontends: the drivers that deliver requests, and what they have in common.
//!
//! There are three: block devices of the ublk driver, those of the kernel's loop driver, and files
//! of FUSE. An engine uses one of them.
//! The modules above use [`Frontend`], [`Backend`] and [`FrontendDevice`], the workers use
//! [`FrontendQueue`]; only this file and its two neighbours name a driver.

mod device;
mod disk_list;
pub mod fuse;
pub mod kernel_loop;
mod mode;
mod queue;
mod timeout;
pub mod ublk;

use std::path::Path;
use std::sync::Arc;

use rustix::process::{PidfdFlags, pidfd_open};
use rustix::thread::gettid;

use crate::error::{Error, Kind, Result};
use crate::kernels::{BLOCK_DEVICES, PRIVATE};

pub use device::FrontendDevice;
use disk_list::DiskList;
pub use mode::{BackendKind, IoMode};
pub use queue::FrontendQueue;

/// A pidfd of a thread (Linux 6.9).
const PIDFD_THREAD: PidfdFlags = PidfdFlags::from_bits_retain(libc::O_EXCL.cast_unsigned());

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
    /// [`Frontend::examine`].
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

/// The frontend that all instances of an engine use.
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

    /// The backend of private pools: ublk needs to stop a device only if it is unused, and to
    /// resize it later.
    pub fn pool_backend(&self) -> Result<BackendKind> {
        match self {
            Frontend::Ublk(features) if features.supports_binding() => Ok(BackendKind::Ublk),
            // Without it nobody can serve an intercepted call (Linux 6.9).
            _ if pidfd_open(gettid(), PIDFD_THREAD).is_err() => {
                let missing = PRIVATE.missing();
                let context = missing.unwrap_or_else(|| "this kernel has no pidfd of threads".to_owned());
                Err(Error::new(Kind::Unsupported, context)
                    .hint("'loopengine doctor --for run' says what works with this kernel"))
            }
            _ => kernel_loop::check().map(|()| BackendKind::Loop).map_err(|error| {
                Error::new(
                    Kind::Unsupported,
                    format!("this daemon has no private devices: {}", error.message()),
                )
                .hint("'loopengine doctor --for run' says what works with this kernel")
            }),
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

    /// The ids of all devices of the driver, of any owner. Files end with their daemon.
    pub fn present(&self) -> Vec<u32> {
        match self {
            Frontend::Ublk(_) => ublk::present_devices(),
            Frontend::Loop => kernel_loop::present_devices(),
            Frontend::Fuse(_) => Vec::new(),
        }
    }

    /// Queries the driver about a device.
    pub fn examine(&self, id: u32) -> Result<ExistingDevice> {
        match self {
            Frontend::Ublk(_) => ublk::UblkDevice::examine(id),
            Frontend::Loop => kernel_loop::KernelLoop::examine(id),
            Frontend::Fuse(_) => Err(Error::new(Kind::NotFound, "FUSE files have no driver ids")),
        }
    }

    /// Updates the list of disks that udev reads, at the start of a daemon with these devices at the
    /// driver: disks that wait for it stay listed, disks that are gone do not.
    pub fn update_disk_list<'a>(&self, own: impl IntoIterator<Item = (&'a u32, &'a ExistingDevice)>) {
        let list = DiskList::of_machine();
        let exists = |disk: &str, owner_cookie| match examine_disk(disk) {
            Ok(found) => found.parameters.owner_cookie == owner_cookie,
            // A device that the driver cannot describe may have users.
            Err(error) => error.kind() != Kind::NotFound,
        };
        for disk in list.sweep(exists) {
            tracing::info!("{disk} is no longer listed for udev: its device does not exist");
        }
        for (id, found) in own {
            let disk = self.disk(*id);
            // A daemon before this list was kept, or somebody who deleted it.
            if let Err(error) = list.add(&disk, found.parameters.owner_cookie) {
                tracing::warn!("the host may probe /dev/{disk}: {error}");
            }
        }
    }

    /// The name of the disk with this id at the driver.
    pub fn disk(&self, id: u32) -> String {
        match self {
            Frontend::Loop => format!("loop{id}"),
            Frontend::Ublk(_) | Frontend::Fuse(_) => format!("ublkb{id}"),
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
                let context =
                    format!("I/O mode {} does not apply to a daemon that serves {serves}", mode.as_str());
                Err(Error::new(Kind::Unsupported, context)
                    .hint("leave out --io-mode, or start the daemon with another --backend"))
            }
        }
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

    /// Unmounts the file system. All devices must be gone.
    pub fn close(&self) {
        if let Backend::Fuse(files) = self {
            files.end();
        }
    }
}

/// Queries the drivers about a disk, by its name.
fn examine_disk(disk: &str) -> Result<ExistingDevice> {
    let id = |prefix: &str| disk.strip_prefix(prefix)?.parse().ok();
    match (id("ublkb"), id("loop")) {
        (Some(id), _) => ublk::UblkDevice::examine(id),
        (_, Some(number)) => kernel_loop::KernelLoop::examine(number),
        _ => Err(Error::new(Kind::NotFound, format!("{disk} is not the name of a disk"))),
    }
}

/// Devices of any backend that outlive their daemon, by the names of their disks.
pub fn lasting() -> Vec<(String, Result<ExistingDevice>)> {
    let ublk = ublk::present_devices().into_iter().map(|id| format!("ublkb{id}"));
    let loops = kernel_loop::present_devices().into_iter().map(|number| format!("loop{number}"));
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
