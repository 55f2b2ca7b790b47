//! Who owns what: instances own devices and workers, devices own images.
//!
//! Every call here may block for as long as its deadline says (seconds at worst): callers on an
//! asynchronous runtime use a blocking thread.

pub mod spec;

use std::os::fd::OwnedFd;
use std::path::PathBuf;

use crate::error::{Error, Kind, Result};
use spec::*;

/// What the engine needs to know to start.
#[derive(Clone, Debug)]
pub struct EngineConfig {
    /// Where instance directories, device names and state live, e.g. `/run/loopengine`.
    pub run_dir: PathBuf,
    /// What the instance `default` may have.
    pub default_instance: InstanceSpec,
    /// Worker switches.
    pub tuning: Tuning,
}

/// Switches of the workers; the defaults are the measured best.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tuning {
    /// Read or write and its commit go to the kernel as one chain where that is possible.
    pub linked_commit: bool,
    /// Microseconds for which a worker that had work looks for more before it sleeps; 0: never.
    pub poll_us: u32,
}

/// Which devices a call is about.
#[derive(Clone, Debug)]
pub enum Selector {
    /// One device, by a path that leads to it (`/run/loopengine/default/loop0`, `/dev/ublkb3`), or
    /// as `NAME/loopN`, or `loopN` for the instance `default`.
    Device(String),
    /// All devices of one instance.
    Instance(String),
    /// All devices of all instances.
    All,
}

/// All instances of one daemon.
#[derive(Debug)]
pub struct Engine {}

impl Engine {
    /// Checks that ublk is there, takes back the devices of a previous daemon that used the same
    /// run directory, and creates the instance `default`. The strings are notes for the log about
    /// what was and was not taken back.
    pub fn start(config: EngineConfig) -> Result<(Engine, Vec<String>)> {
        let _ = config;
        Err(Error::new(Kind::Unsupported, "not built yet"))
    }

    /// What the kernel grants. Works without an engine.
    pub fn features() -> Result<Features> {
        Err(Error::new(Kind::Unsupported, "not built yet"))
    }

    /// Creates an instance.
    pub fn create_instance(&self, _spec: &InstanceSpec) -> Result<InstanceInfo> {
        Err(Error::new(Kind::Unsupported, "not built yet"))
    }

    /// All instances, by name.
    pub fn instances(&self) -> Vec<InstanceInfo> {
        Vec::new()
    }

    /// Removes an instance; with `force`, detaches its devices even if they are in use.
    pub fn remove_instance(&self, _name: &str, _force: bool) -> Result<()> {
        Err(Error::new(Kind::Unsupported, "not built yet"))
    }

    /// Serves `image` (opened by the caller, for writing unless the device is read-only) as a
    /// device, and returns once it can be used. Nothing is left behind when it fails.
    pub fn attach(&self, _spec: &AttachSpec, _image: OwnedFd) -> Result<DeviceInfo> {
        Err(Error::new(Kind::Unsupported, "not built yet"))
    }

    /// Takes devices away. Without `force` a device in use is left alone, and the error says so.
    /// With [`Selector::All`] or `Instance` goes on after a failure and reports the first.
    /// Returns the paths of the devices that are gone.
    pub fn detach(&self, _which: &Selector, _force: bool) -> Result<Vec<String>> {
        Err(Error::new(Kind::Unsupported, "not built yet"))
    }

    /// Adapts a device to the present size of its image.
    pub fn resize(&self, _device: &str) -> Result<DeviceInfo> {
        Err(Error::new(Kind::Unsupported, "not built yet"))
    }

    /// Devices, by instance and number.
    pub fn devices(&self, _which: &Selector) -> Result<Vec<DeviceInfo>> {
        Ok(Vec::new())
    }

    /// Figures of devices.
    pub fn stats(&self, _which: &Selector) -> Result<Vec<DeviceStats>> {
        Ok(Vec::new())
    }

    /// Drains and stops all devices, ends all workers. Returns notes about what did not stop.
    pub fn shutdown(self) -> Vec<String> {
        Vec::new()
    }
}
