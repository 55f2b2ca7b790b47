// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The engine's interface for the control service. A trait, so that tests can replace it.

use std::os::fd::OwnedFd;

use crate::error::Result;
use crate::instance::activity::DeviceActivity;
use crate::instance::spec::*;
use crate::instance::{Engine, Selector};

/// The calls of [`Engine`] that clients can make. All may block: the service runs them on blocking
/// threads, several in parallel.
pub trait EngineApi: Send + Sync + 'static {
    /// See [`Engine::features`].
    fn features(&self) -> Result<Features>;
    /// See [`Engine::create_instance`].
    fn create_instance(&self, spec: &InstanceSpec) -> Result<InstanceInfo>;
    /// See [`Engine::instances`].
    fn instances(&self) -> Vec<InstanceInfo>;
    /// See [`Engine::set_max_devices`].
    fn set_max_devices(&self, name: &str, max_devices: u32) -> Result<()>;
    /// See [`Engine::remove_instance`].
    fn remove_instance(&self, name: &str, force: bool) -> Result<()>;
    /// See [`Engine::attach`].
    fn attach(&self, spec: &AttachSpec, force: bool, image: OwnedFd) -> Result<DeviceInfo>;
    /// See [`Engine::detach`].
    fn detach(&self, which: &Selector, force: bool) -> Result<Vec<String>>;
    /// See [`Engine::resize`].
    fn resize(&self, spec: &ResizeSpec) -> Result<DeviceInfo>;
    /// See [`Engine::set_io_limits`].
    fn set_io_limits(&self, spec: &IoLimitsSpec) -> Result<DeviceInfo>;
    /// See [`Engine::recover`].
    fn recover(&self, spec: &RecoverSpec, image: OwnedFd) -> Result<DeviceInfo>;
    /// See [`Engine::devices`].
    fn devices(&self, which: &Selector) -> Result<Vec<DeviceInfo>>;
    /// See [`Engine::stats`].
    fn stats(&self, which: &Selector) -> Result<Vec<DeviceStats>>;
    /// See [`Engine::activity`].
    fn activity(&self) -> Result<Vec<DeviceActivity>>;
}

impl EngineApi for Engine {
    fn features(&self) -> Result<Features> {
        Engine::features()
    }

    fn create_instance(&self, spec: &InstanceSpec) -> Result<InstanceInfo> {
        Engine::create_instance(self, spec)
    }

    fn instances(&self) -> Vec<InstanceInfo> {
        Engine::instances(self)
    }

    fn set_max_devices(&self, name: &str, max_devices: u32) -> Result<()> {
        Engine::set_max_devices(self, name, max_devices)
    }

    fn remove_instance(&self, name: &str, force: bool) -> Result<()> {
        Engine::remove_instance(self, name, force)
    }

    fn attach(&self, spec: &AttachSpec, force: bool, image: OwnedFd) -> Result<DeviceInfo> {
        Engine::attach(self, spec, force, image)
    }

    fn detach(&self, which: &Selector, force: bool) -> Result<Vec<String>> {
        Engine::detach(self, which, force)
    }

    fn resize(&self, spec: &ResizeSpec) -> Result<DeviceInfo> {
        Engine::resize(self, spec)
    }

    fn set_io_limits(&self, spec: &IoLimitsSpec) -> Result<DeviceInfo> {
        Engine::set_io_limits(self, spec)
    }

    fn recover(&self, spec: &RecoverSpec, image: OwnedFd) -> Result<DeviceInfo> {
        Engine::recover(self, spec, image)
    }

    fn devices(&self, which: &Selector) -> Result<Vec<DeviceInfo>> {
        Engine::devices(self, which)
    }

    fn stats(&self, which: &Selector) -> Result<Vec<DeviceStats>> {
        Engine::stats(self, which)
    }

    fn activity(&self) -> Result<Vec<DeviceActivity>> {
        Engine::activity(self)
    }
}
