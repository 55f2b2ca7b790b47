//! The methods of the interface: what they take, what they answer, and nothing else.
//!
//! Every method hands its work to a blocking thread, because the engine blocks. The comments of
//! the methods, and of the types, are part of the description that varlink clients get.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::apart::failed;
use super::reply::*;
use super::{EngineApi, Fault, Inbox};
use crate::error::{Error, Kind, Result};
use crate::instance::Selector;
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

/// Exactly one of `device`, `instance` and `all`: what takes devices away has no default.
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

/// The image that comes with a call.
fn only_one(came: impl IntoIterator<Item = Received>) -> Result<OwnedFd> {
    let files: Vec<_> = came.into_iter().filter_map(Received::take).collect();
    <[OwnedFd; 1]>::try_from(files).map(|[image]| image).map_err(|files| {
        let message = format!("{} file descriptors came with the call", files.len());
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
        AttachSpec, IoMode, DeviceInfo, DeviceState, DeviceStats, Features, FrontendKind,
        InstanceInfo, InstanceSpec, LatencySummary, RecoverSpec
    ]
)]
impl ControlService {
    /// What this kernel grants.
    async fn get_features(&self) -> std::result::Result<Granted, Fault> {
        let features = self.ask(|backend| backend.features()).await?;
        Ok(Granted { features })
    }

    /// Creates an instance.
    async fn create_instance(&self, spec: InstanceSpec) -> std::result::Result<Instance, Fault> {
        let instance = self.ask(move |backend| backend.create_instance(&spec)).await?;
        tracing::info!("created instance {}", instance.name);
        Ok(Instance { instance })
    }

    /// All instances.
    async fn list_instances(&self) -> std::result::Result<Instances, Fault> {
        let instances = self.ask(|backend| Ok(backend.instances())).await?;
        Ok(Instances { instances })
    }

    /// Removes an instance; with `force`, with devices that are in use.
    async fn remove_instance(&self, name: String, force: Option<bool>) -> std::result::Result<(), Fault> {
        let force = force.unwrap_or(false);
        self.ask(move |backend| {
            backend.remove_instance(&name, force)?;
            tracing::info!("removed instance {name}");
            Ok(())
        })
        .await
    }

    /// Serves an image, which comes as the call's only file descriptor; with `force`, also one that others use.
    async fn attach(&self, spec: AttachSpec, force: Option<bool>) -> std::result::Result<Device, Fault> {
        let came = self.inbox.take();
        let force = force.unwrap_or(false);
        let device = self.ask(move |backend| backend.attach(&spec, force, only_one(came)?)).await?;
        tracing::info!("attached {:?} as {} ({})", device.image, device.path, device.node);
        Ok(Device { device })
    }

    /// Takes devices away: exactly one of `device`, `instance` and `all`.
    async fn detach(
        &self,
        device: Option<String>,
        instance: Option<String>,
        all: Option<bool>,
        force: Option<bool>,
    ) -> std::result::Result<Detached, Fault> {
        let detached = self
            .ask(move |backend| {
                let which = select_strictly(device, instance, all.unwrap_or(false))?;
                backend.detach(&which, force.unwrap_or(false))
            })
            .await?;
        for path in &detached {
            tracing::info!("detached {path}");
        }
        Ok(Detached { detached })
    }

    /// Adapts a device to the present size of its image, or both to `size`. It becomes smaller only with
    /// `shrink`, and while it is in use only with `force`, too.
    async fn resize(
        &self,
        device: String,
        size: Option<u64>,
        shrink: Option<bool>,
        force: Option<bool>,
    ) -> std::result::Result<Device, Fault> {
        let (shrink, force) = (shrink.unwrap_or(false), force.unwrap_or(false));
        let spec = ResizeSpec { device, size, shrink, force };
        let device = self.ask(move |backend| backend.resize(&spec)).await?;
        tracing::info!("resized {} ({:?}) to {} bytes", device.path, device.image, device.size);
        Ok(Device { device })
    }

    /// Recovers a device that is stuck with an image, which comes as the call's only file descriptor.
    async fn recover(&self, spec: RecoverSpec) -> std::result::Result<Device, Fault> {
        let came = self.inbox.take();
        let device = self.ask(move |backend| backend.recover(&spec, only_one(came)?)).await?;
        tracing::warn!("recovered {} by hand with {:?}", device.path, device.image);
        Ok(Device { device })
    }

    /// Devices: one, those of an instance, or all.
    async fn list_devices(
        &self,
        device: Option<String>,
        instance: Option<String>,
    ) -> std::result::Result<Devices, Fault> {
        let devices = self.ask(move |backend| backend.devices(&select(device, instance)?)).await?;
        Ok(Devices { devices })
    }

    /// Figures of devices: one, those of an instance, or all.
    async fn get_stats(
        &self,
        device: Option<String>,
        instance: Option<String>,
    ) -> std::result::Result<Stats, Fault> {
        let stats = self.ask(move |backend| backend.stats(&select(device, instance)?)).await?;
        Ok(Stats { stats })
    }
}
