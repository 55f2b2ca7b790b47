// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The methods of the interface: arguments and replies only.
//!
//! Every method runs its work on a blocking thread. The comments of the methods and of the types
//! are part of the description that varlink clients get.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::blocking::failed;
use super::reply::*;
use super::{EngineApi, Fault, Inbox};
use crate::counters::DaemonCounters;
use crate::error::{Error, Kind, Result};
use crate::instance::Selector;
use crate::instance::activity::{BlockTimes, DeviceActivity};
use crate::instance::spec::*;
use crate::received::Received;

/// One connection's view of the engine.
pub struct ControlService {
    backend: Arc<dyn EngineApi>,
    inbox: Inbox,
}

impl ControlService {
    /// A service for one connection, whose descriptors come to `inbox`.
    pub fn new(backend: Arc<dyn EngineApi>, inbox: Inbox) -> Self {
        Self { backend, inbox }
    }

    async fn ask<T: Send + 'static>(
        &self,
        work: impl FnOnce(&dyn EngineApi) -> Result<T> + Send + 'static,
    ) -> std::result::Result<T, Fault> {
        let backend = Arc::clone(&self.backend);
        match tokio::task::spawn_blocking(move || work(&*backend)).await {
            Ok(answer) => answer.map_err(Fault::from),
            Err(_) => Err(failed().into()),
        }
    }
}

/// At most one of `device` and `instance`; neither means all.
fn select(device: Option<String>, instance: Option<String>) -> Result<Selector> {
    match (device, instance) {
        (Some(device), None) => Ok(Selector::Device(device)),
        (None, Some(instance)) => Ok(Selector::Instance(instance)),
        (None, None) => Ok(Selector::All),
        (Some(_), Some(_)) => Err(Error::new(Kind::Invalid, "both a device and an instance given")
            .hint("give one of them, or neither for all devices")),
    }
}

/// Exactly one of `device`, `instance` and `all`: detaching has no default.
fn select_strictly(device: Option<String>, instance: Option<String>, all: bool) -> Result<Selector> {
    match (select(device, instance)?, all) {
        (Selector::All, false) => {
            Err(Error::new(Kind::Invalid, "no device given").hint("give a device, an instance, or all"))
        }
        (which @ Selector::All, true) => Ok(which),
        (which, false) => Ok(which),
        (_, true) => Err(Error::new(Kind::Invalid, "both all devices and some given")
            .hint("give a device, an instance, or all")),
    }
}

/// The only file descriptor of a call.
fn only_one(received: impl IntoIterator<Item = Received>) -> Result<OwnedFd> {
    let files: Vec<_> = received.into_iter().filter_map(Received::take).collect();
    <[OwnedFd; 1]>::try_from(files).map(|[image]| image).map_err(|files| {
        let message = format!("{} file descriptors were passed with the call", files.len());
        Error::new(Kind::Invalid, message).hint("pass the open image, and only that")
    })
}

#[zlink::service(
    interface = "io.loopengine",
    vendor = "loopengine",
    product = "loopengine",
    version = env!("CARGO_PKG_VERSION"),
    url = env!("CARGO_PKG_REPOSITORY"),
    types = [
        AttachSpec, IoMode, DeviceInfo, DeviceState, DeviceStats, Features, BackendKind,
        InstanceInfo, InstanceSpec, LatencySummary, LatencyBucket, DaemonCounters, RecoverSpec,
        DeviceActivity, BlockTimes
    ]
)]
impl ControlService {
    /// The features of this kernel.
    async fn get_features(&self) -> std::result::Result<FeaturesReply, Fault> {
        let features = self.ask(|backend| backend.features()).await?;
        Ok(FeaturesReply { features })
    }

    /// Creates an instance.
    async fn create_instance(&self, spec: InstanceSpec) -> std::result::Result<InstanceReply, Fault> {
        let instance = self.ask(move |backend| backend.create_instance(&spec)).await?;
        tracing::info!("created instance {}", instance.name);
        Ok(InstanceReply { instance })
    }

    /// All instances.
    async fn list_instances(&self) -> std::result::Result<InstancesReply, Fault> {
        let instances = self.ask(|backend| Ok(backend.instances())).await?;
        Ok(InstancesReply { instances })
    }

    /// Removes an instance; with `force`, even if devices are in use.
    async fn remove_instance(&self, name: String, force: Option<bool>) -> std::result::Result<(), Fault> {
        let force = force.unwrap_or(false);
        self.ask(move |backend| {
            backend.remove_instance(&name, force)?;
            tracing::info!("removed instance {name}");
            Ok(())
        })
        .await
    }

    /// Attaches an image, passed as the call's only file descriptor; with `force`, even if it is in
    /// use.
    async fn attach(&self, spec: AttachSpec, force: Option<bool>) -> std::result::Result<DeviceReply, Fault> {
        let received = self.inbox.take();
        let force = force.unwrap_or(false);
        let device = self.ask(move |backend| backend.attach(&spec, force, only_one(received)?)).await?;
        tracing::info!("attached {:?} as {} ({})", device.image, device.path, device.node);
        Ok(DeviceReply { device })
    }

    /// Detaches devices: exactly one of `device`, `instance` and `all`.
    async fn detach(
        &self,
        device: Option<String>,
        instance: Option<String>,
        all: Option<bool>,
        force: Option<bool>,
    ) -> std::result::Result<DetachReply, Fault> {
        let detached = self
            .ask(move |backend| {
                let which = select_strictly(device, instance, all.unwrap_or(false))?;
                backend.detach(&which, force.unwrap_or(false))
            })
            .await?;
        for path in &detached {
            tracing::info!("detached {path}");
        }
        Ok(DetachReply { detached })
    }

    /// Resizes a device to the present size of its image, or both to `size`. It shrinks only with
    /// `shrink`, and while in use only with `force`, too.
    async fn resize(
        &self,
        device: String,
        size: Option<u64>,
        shrink: Option<bool>,
        force: Option<bool>,
    ) -> std::result::Result<DeviceReply, Fault> {
        let (shrink, force) = (shrink.unwrap_or(false), force.unwrap_or(false));
        let spec = ResizeSpec { device, size, shrink, force };
        let device = self.ask(move |backend| backend.resize(&spec)).await?;
        tracing::info!("resized {} ({:?}) to {} bytes", device.path, device.image, device.size);
        Ok(DeviceReply { device })
    }

    /// Changes the limits of a device's I/O per second; what is not given stays, 0 means no limit.
    async fn set_io_limits(
        &self,
        device: String,
        iops: Option<u64>,
        bytes_per_second: Option<u64>,
    ) -> std::result::Result<DeviceReply, Fault> {
        let spec = IoLimitsSpec { device, iops, bytes_per_second };
        let device = self.ask(move |backend| backend.set_io_limits(&spec)).await?;
        let DeviceInfo { path, iops, bytes_per_second, .. } = &device;
        tracing::info!(
            "limited {path} to {iops} requests and {bytes_per_second} bytes per second (0: no limit)"
        );
        Ok(DeviceReply { device })
    }

    /// Recovers a stuck device with an image, passed as the call's only file descriptor.
    async fn recover(&self, spec: RecoverSpec) -> std::result::Result<DeviceReply, Fault> {
        let received = self.inbox.take();
        let device = self.ask(move |backend| backend.recover(&spec, only_one(received)?)).await?;
        tracing::warn!("recovered {} with the given image {:?}", device.path, device.image);
        Ok(DeviceReply { device })
    }

    /// Devices: one, those of an instance, or all.
    async fn list_devices(
        &self,
        device: Option<String>,
        instance: Option<String>,
    ) -> std::result::Result<DevicesReply, Fault> {
        let devices = self.ask(move |backend| backend.devices(&select(device, instance)?)).await?;
        Ok(DevicesReply { devices })
    }

    /// Counts of the daemon since its start.
    async fn get_counters(&self) -> std::result::Result<CountersReply, Fault> {
        Ok(CountersReply { counters: DaemonCounters::now() })
    }

    /// Counts and times of all devices. The difference of two readings gives rates.
    async fn get_activity(&self) -> std::result::Result<ActivityReply, Fault> {
        let devices = self.ask(|backend| backend.activity()).await?;
        Ok(ActivityReply { devices })
    }

    /// Statistics of devices: one, those of an instance, or all.
    async fn get_stats(
        &self,
        device: Option<String>,
        instance: Option<String>,
    ) -> std::result::Result<StatsReply, Fault> {
        let stats = self.ask(move |backend| backend.stats(&select(device, instance)?)).await?;
        Ok(StatsReply { stats })
    }
}
