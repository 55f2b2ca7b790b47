// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The client of the control socket: one method per call.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

use zlink::tokio::unix::Connection;

use super::SOCKET;
use super::calls::ControlCalls;
use super::session::{ClientSession, ONE_MAX, copies};
use crate::counters::DaemonCounters;
use crate::error::Result;
use crate::instance::Selector;
use crate::instance::activity::DeviceActivity;
use crate::instance::spec::*;

/// Deadline of a call for many devices.
const MANY_MAX: Duration = Duration::from_secs(600);

/// A connection to the daemon.
#[derive(Debug)]
pub struct Client(ClientSession);

impl Client {
    /// Connects to the daemon that serves `run_dir`. Needs a tokio runtime.
    pub async fn connect(run_dir: &Path) -> Result<Client> {
        ClientSession::connect(run_dir.join(SOCKET)).await.map(Client)
    }

    /// The process that listens on the socket: the service manager if this connection starts the
    /// daemon, else the daemon. `None` in another PID namespace.
    pub fn daemon_pid(&self) -> Option<i32> {
        self.0.daemon_pid()
    }

    /// See [`crate::instance::Engine::features`].
    pub async fn features(&mut self) -> Result<Features> {
        let call = async |connection: &mut Connection| connection.get_features().await;
        Ok(self.0.call(ONE_MAX, call).await?.features)
    }

    /// See [`crate::instance::Engine::create_instance`].
    pub async fn create_instance(&mut self, spec: &InstanceSpec) -> Result<InstanceInfo> {
        let call = async |connection: &mut Connection| connection.create_instance(spec).await;
        Ok(self.0.call(ONE_MAX, call).await?.instance)
    }

    /// See [`crate::instance::Engine::instances`].
    pub async fn instances(&mut self) -> Result<Vec<InstanceInfo>> {
        let call = async |connection: &mut Connection| connection.list_instances().await;
        Ok(self.0.call(ONE_MAX, call).await?.instances)
    }

    /// See [`crate::instance::Engine::remove_instance`].
    pub async fn remove_instance(&mut self, name: &str, force: bool) -> Result<()> {
        let call = async |connection: &mut Connection| connection.remove_instance(name, force).await;
        self.0.call(MANY_MAX, call).await
    }

    /// See [`crate::instance::Engine::attach`].
    pub async fn attach(&mut self, spec: &AttachSpec, force: bool, image: OwnedFd) -> Result<DeviceInfo> {
        let image = [image];
        let call = async |connection: &mut Connection| connection.attach(spec, force, copies(&image)?).await;
        Ok(self.0.call(ONE_MAX, call).await?.device)
    }

    /// See [`crate::instance::Engine::detach`].
    pub async fn detach(&mut self, which: &Selector, force: bool) -> Result<Vec<String>> {
        let (device, instance) = parts(which);
        let all = matches!(which, Selector::All);
        let limit = if device.is_some() { ONE_MAX } else { MANY_MAX };
        let call = async |connection: &mut Connection| connection.detach(device, instance, all, force).await;
        Ok(self.0.call(limit, call).await?.detached)
    }

    /// See [`crate::instance::Engine::resize`].
    pub async fn resize(&mut self, spec: &ResizeSpec) -> Result<DeviceInfo> {
        let ResizeSpec { device, size, shrink, force } = spec;
        let call =
            async |connection: &mut Connection| connection.resize(device, *size, *shrink, *force).await;
        Ok(self.0.call(ONE_MAX, call).await?.device)
    }

    /// See [`crate::instance::Engine::set_io_limits`].
    pub async fn set_io_limits(&mut self, spec: &IoLimitsSpec) -> Result<DeviceInfo> {
        let IoLimitsSpec { device, iops, bytes_per_second } = spec;
        let call = async |connection: &mut Connection| {
            connection.set_io_limits(device, *iops, *bytes_per_second).await
        };
        Ok(self.0.call(ONE_MAX, call).await?.device)
    }

    /// See [`crate::instance::Engine::recover`].
    pub async fn recover(&mut self, spec: &RecoverSpec, image: OwnedFd) -> Result<DeviceInfo> {
        let image = [image];
        let call = async |connection: &mut Connection| connection.recover(spec, copies(&image)?).await;
        Ok(self.0.call(ONE_MAX, call).await?.device)
    }

    /// See [`crate::instance::Engine::devices`].
    pub async fn devices(&mut self, which: &Selector) -> Result<Vec<DeviceInfo>> {
        let (device, instance) = parts(which);
        let call = async |connection: &mut Connection| connection.list_devices(device, instance).await;
        Ok(self.0.call(ONE_MAX, call).await?.devices)
    }

    /// See [`crate::instance::Engine::stats`].
    pub async fn stats(&mut self, which: &Selector) -> Result<Vec<DeviceStats>> {
        let (device, instance) = parts(which);
        let call = async |connection: &mut Connection| connection.get_stats(device, instance).await;
        Ok(self.0.call(ONE_MAX, call).await?.stats)
    }

    /// See [`crate::instance::Engine::activity`].
    pub async fn activity(&mut self) -> Result<Vec<DeviceActivity>> {
        let call = async |connection: &mut Connection| connection.get_activity().await;
        Ok(self.0.call(ONE_MAX, call).await?.devices)
    }

    /// See [`DaemonCounters`].
    pub async fn counters(&mut self) -> Result<DaemonCounters> {
        let call = async |connection: &mut Connection| connection.get_counters().await;
        Ok(self.0.call(ONE_MAX, call).await?.counters)
    }
}

fn parts(which: &Selector) -> (Option<&str>, Option<&str>) {
    match which {
        Selector::Device(device) => (Some(device), None),
        Selector::Instance(instance) => (None, Some(instance)),
        Selector::All => (None, None),
    }
}
