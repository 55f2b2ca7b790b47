//! Doors through which requests come in, and what all of them have in common.
//!
//! Two: block devices of the ublk driver, and files of FUSE. An engine uses one of them. The rooms
//! above say [`Frontend`], [`Door`] and [`Device`], the workers say [`Queue`]; only this file and
//! its two neighbours name a driver.

mod device;
pub mod fuse;
mod queue;
pub mod ublk;

use std::path::Path;
use std::sync::Arc;

use crate::error::{Error, Kind, Result};
use crate::instance::spec::{DataPath, FrontendKind};
use crate::kernels::BLOCK_DEVICES;

pub use device::Device;
pub use queue::Queue;

/// What a device is made with; it cannot change later.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parameters {
    /// How data travels.
    pub path: DataPath,
    /// Hardware queues.
    pub queues: u16,
    /// Requests in flight in each.
    pub depth: u16,
    /// Marks the device as ours, where it outlives the daemon; see [`Frontend::examine`].
    pub owner: u64,
    /// It waits for the next daemon when this one dies; otherwise it ends.
    pub outlives: bool,
    /// The kernel looks for partitions when it starts.
    pub partscan: bool,
}

/// When to stop a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// Only if nobody has it open.
    IfUnused,
    /// The same, without waiting for those who only take a look at a new disk.
    IfUnusedNow,
    /// In any case; what its users do from now on fails.
    Always,
}

/// What a device without a daemon is in the middle of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Waiting {
    /// It was never started, or is stopped: nobody can have it open.
    ForNothing,
    /// It has users, whose requests wait.
    ForDaemon,
}

/// A device as its driver knows it.
#[derive(Clone, Copy, Debug)]
pub struct Found {
    /// What it was made with.
    pub parameters: Parameters,
    /// What it waits for.
    pub waiting: Waiting,
}

/// The door that all instances of an engine use.
#[derive(Clone, Debug)]
pub enum Frontend {
    /// Block devices.
    Ublk(ublk::Granted),
    /// Files.
    Fuse(fuse::Mounts),
}

impl Frontend {
    /// Looks whether the kernel has what this one needs.
    pub fn open(kind: FrontendKind) -> Result<Frontend> {
        match kind {
            FrontendKind::Ublk => {
                let granted = ublk::Granted::ask()?;
                if granted.paths().is_empty() {
                    let hint = format!("Linux {} or newer is needed", BLOCK_DEVICES.version());
                    return Err(
                        Error::new(Kind::Unsupported, "this kernel's ublk driver is too old").hint(hint)
                    );
                }
                Ok(Frontend::Ublk(granted))
            }
            FrontendKind::Fuse => fuse::check().map(|()| Frontend::Fuse(fuse::Mounts::default())),
        }
    }

    /// Which of the two.
    pub fn kind(&self) -> FrontendKind {
        match self {
            Frontend::Ublk(_) => FrontendKind::Ublk,
            Frontend::Fuse(_) => FrontendKind::Fuse,
        }
    }

    /// Whether devices can be told to be unused, and be given a size later: what private loop devices
    /// are made of.
    pub fn has_private_pools(&self) -> bool {
        match self {
            Frontend::Ublk(granted) => granted.binds_in_place(),
            Frontend::Fuse(_) => false,
        }
    }

    /// Whether devices wait for the next daemon when this one ends.
    pub fn devices_outlive_daemon(&self) -> bool {
        match self {
            Frontend::Ublk(granted) => granted.recovers(),
            Frontend::Fuse(_) => false,
        }
    }

    /// An instance's own door: its devices' names appear in `directory`, and whatever threads it
    /// needs for so many queues run on these CPUs (on all for none).
    pub fn door(&self, directory: &Path, queues: usize, cpus: &[usize]) -> Result<Door> {
        match self {
            Frontend::Ublk(granted) => Ok(Door::Ublk(*granted)),
            Frontend::Fuse(mounts) => fuse::FileSystem::mount(directory, queues, cpus, mounts)
                .map(|files| Door::Fuse(Arc::new(files))),
        }
    }

    /// Whether a file on the file system with this device number is served by this very engine.
    pub fn serves(&self, device_number: u64) -> bool {
        match self {
            // Its own mount namespace has no mounts of its disks.
            Frontend::Ublk(_) => false,
            Frontend::Fuse(mounts) => mounts.contains(device_number),
        }
    }

    /// Whether a device can be stopped only if nobody has it open.
    pub fn stops_unused_only(&self) -> bool {
        self.has_private_pools()
    }

    /// Numbers of all devices there are at the driver, whosever they are. Files end with their
    /// daemon.
    pub fn present(&self) -> Vec<u32> {
        match self {
            Frontend::Ublk(_) => ublk::present_devices(),
            Frontend::Fuse(_) => Vec::new(),
        }
    }

    /// What the driver says of a device.
    pub fn examine(&self, id: u32) -> Result<Found> {
        match self {
            Frontend::Ublk(_) => ublk::Device::examine(id),
            Frontend::Fuse(_) => Err(Error::new(Kind::NotFound, "the driver of files numbers none")),
        }
    }

    /// A device at the driver that no instance has.
    pub fn leftover(&self, id: u32, parameters: Parameters) -> Result<Device> {
        match self {
            Frontend::Ublk(granted) => Ok(Device::Ublk(ublk::Device::existing(*granted, id, parameters))),
            Frontend::Fuse(_) => Err(Error::new(Kind::Internal, "files are never left over")),
        }
    }
}

/// One instance's way to make devices.
#[derive(Debug)]
pub enum Door {
    /// Nothing of its own: all instances share the driver.
    Ublk(ublk::Granted),
    /// A file system, mounted on the instance's directory.
    Fuse(Arc<fuse::FileSystem>),
}

impl Door {
    /// The best way for data to travel here.
    pub fn best_path(&self) -> DataPath {
        match self {
            Door::Ublk(granted) => granted.paths().first().copied().unwrap_or(DataPath::Copy),
            Door::Fuse(_) => DataPath::Fuse,
        }
    }

    /// Refuses a way that does not work here.
    pub fn check_path(&self, path: DataPath) -> Result<()> {
        let (allowed, wrong) = match self {
            Door::Ublk(granted) => (granted.allows(path), path == DataPath::Fuse),
            Door::Fuse(_) => (path == DataPath::Fuse, path != DataPath::Fuse),
        };
        match (allowed, wrong) {
            (true, _) => Ok(()),
            (false, false) => {
                let context = format!("this kernel does not grant path {}", path.as_str());
                Err(Error::new(Kind::Unsupported, context).hint("'loopengine features' shows what it grants"))
            }
            (false, true) => {
                let serves = match self {
                    Door::Ublk(_) => "block devices (ublk)",
                    Door::Fuse(_) => "files (FUSE)",
                };
                let context = format!("path {} is not for a daemon that serves {serves}", path.as_str());
                Err(Error::new(Kind::Unsupported, context)
                    .hint("leave out --path, or start the daemon with another --frontend"))
            }
        }
    }

    /// Makes a device. It has no size and no users yet.
    pub fn add(&self, number: u32, parameters: Parameters) -> Result<Device> {
        match self {
            Door::Ublk(granted) => ublk::Device::add(*granted, parameters).map(Device::Ublk),
            Door::Fuse(files) => Ok(Device::Fuse(fuse::Device::new(files.clone(), number, parameters))),
        }
    }

    /// A device that a daemon before this one made, to be taken back.
    pub fn existing(&self, id: u32, parameters: Parameters) -> Result<Device> {
        match self {
            Door::Ublk(granted) => Ok(Device::Ublk(ublk::Device::existing(*granted, id, parameters))),
            Door::Fuse(_) => Err(Error::new(Kind::Unsupported, "files end with their daemon")),
        }
    }

    /// Whether names in the instance's directory are links to nodes elsewhere, and ours to make.
    pub fn wants_links(&self) -> bool {
        matches!(self, Door::Ublk(_))
    }

    /// Ends it: the directory is an ordinary one again. All devices must be gone.
    pub fn close(&self) {
        if let Door::Fuse(files) = self {
            files.end();
        }
    }
}

/// The frontends that could work on this machine, the preferred one first.
pub fn present() -> Vec<FrontendKind> {
    [(ublk::CONTROL_NODE, FrontendKind::Ublk), (fuse::NODE, FrontendKind::Fuse)]
        .into_iter()
        .filter(|(node, _)| Path::new(node).exists())
        .map(|(_, kind)| kind)
        .collect()
}
