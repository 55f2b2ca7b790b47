// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The calls to the engine.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use loopengine::control::Client;
use loopengine::instance::Selector;
use loopengine::instance::spec::{
    AttachSpec, BackendKind, DeviceInfo, InstanceSpec, IoLimitsSpec, IoMode, ResizeSpec,
};
use loopengine::{Error, Kind};
use tonic::Status;

use crate::parameters::Parameters;

/// How long a device may be busy after its last unmount.
const BUSY_MAX: Duration = Duration::from_secs(5);

/// The engine of this node.
#[derive(Debug)]
pub struct Engine {
    pub run_dir: PathBuf,
    /// Maximum number of volumes.
    pub max_devices: u32,
}

/// The status for an error of the engine.
pub fn status(error: &Error) -> Status {
    let text = error.to_string();
    match error.kind() {
        Kind::Unavailable => Status::unavailable(text),
        Kind::Deadline => Status::deadline_exceeded(text),
        Kind::Quota => Status::resource_exhausted(text),
        Kind::Busy | Kind::Unsupported => Status::failed_precondition(text),
        _ => Status::internal(text),
    }
}

impl Engine {
    /// Runs `work` with a client of the engine.
    fn ask<T>(&self, work: impl AsyncFnOnce(&mut Client) -> Result<T, Error>) -> Result<T, Error> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(|error| Error::os(error, "cannot start an async runtime"))?;
        runtime.block_on(async {
            let mut client = Client::connect(&self.run_dir).await?;
            work(&mut client).await
        })
    }

    pub fn answers(&self) -> bool {
        self.ask(async |client| client.instances().await).is_ok()
    }

    pub fn devices(&self) -> Result<Vec<DeviceInfo>, Error> {
        self.ask(async |client| client.devices(&Selector::All).await)
    }

    /// The device of the image at `path`, whatever it was attached for.
    pub fn find(&self, path: &Path) -> Result<Option<DeviceInfo>, Error> {
        let devices = self.devices()?;
        Ok(find(devices.iter(), path).cloned())
    }

    /// Attaches the image at `path`, or returns its device.
    pub fn attach(&self, path: &Path, parameters: &Parameters, read_only: bool) -> Result<DeviceInfo, Error> {
        if let Some(device) = self.find(path)? {
            return self.limit(device, parameters);
        }
        let image = File::options().read(true).write(!read_only).open(path);
        let image = image.map_err(|error| Error::os(error, format!("cannot open {}", path.display())))?;
        let instance = InstanceSpec {
            name: instance(parameters.backend).to_owned(),
            max_devices: self.max_devices,
            workers: 0,
            cpus: None,
            backend: parameters.backend,
        };
        let spec = AttachSpec {
            instance: instance.name.clone(),
            path: path.display().to_string(),
            read_only,
            block_size: parameters.block(),
            iops: parameters.iops,
            bytes_per_second: parameters.bandwidth,
            ..AttachSpec::default()
        };
        self.ask(async |client| {
            match client.create_instance(&instance).await {
                Err(error) if error.kind() != Kind::Exists => return Err(error),
                _ => {}
            }
            let copy = image.try_clone().map_err(|error| Error::os(error, "cannot copy a descriptor"))?;
            match client.attach(&spec, false, copy.into()).await {
                // Direct I/O may need larger blocks than the volume began with, or may not work at all.
                Err(error) if matches!(error.kind(), Kind::Invalid | Kind::Unsupported) => {
                    client.attach(&AttachSpec { buffered: true, ..spec }, false, image.into()).await
                }
                attached => attached,
            }
        })
    }

    /// Gives the device the limits of its class: those that it had may be an administrator's.
    fn limit(&self, device: DeviceInfo, parameters: &Parameters) -> Result<DeviceInfo, Error> {
        let Parameters { iops, bandwidth, .. } = *parameters;
        if (device.iops, device.bytes_per_second) == (iops, bandwidth) {
            return Ok(device);
        }
        let spec = IoLimitsSpec { device: device.path, iops: Some(iops), bytes_per_second: Some(bandwidth) };
        self.ask(async |client| client.set_io_limits(&spec).await)
    }

    /// Detaches the image at `path`. A device that is in use stays.
    pub fn detach(&self, path: &Path) -> Result<(), Error> {
        let until = Instant::now() + BUSY_MAX;
        loop {
            let Some(device) = self.find(path)? else { return Ok(()) };
            let which = Selector::Device(device.path);
            match self.ask(async |client| client.detach(&which, false).await) {
                // The kernel holds a device for a moment after its unmount.
                Err(error) if error.kind() == Kind::Busy && Instant::now() < until => {
                    std::thread::sleep(Duration::from_millis(100));
                }
                Err(error) if error.kind() == Kind::NotFound => return Ok(()),
                done => return done.map(drop),
            }
        }
    }

    /// Gives a device the size of its image.
    pub fn resize(&self, device: &DeviceInfo) -> Result<DeviceInfo, Error> {
        let spec = ResizeSpec { device: device.path.clone(), size: None, shrink: false, force: false };
        self.ask(async |client| client.resize(&spec).await)
    }
}

/// The device of the image at `path` among `devices`.
pub fn find<'a>(mut devices: impl Iterator<Item = &'a DeviceInfo>, path: &Path) -> Option<&'a DeviceInfo> {
    let meta = std::fs::metadata(path).ok();
    devices.find(|device| match &meta {
        Some(meta) if device.image_inode != 0 => {
            (device.image_device, device.image_inode) == (meta.dev(), meta.ino())
        }
        _ => Path::new(&device.image) == path,
    })
}

/// True if users get a file instead of a block device.
pub fn is_file(device: &DeviceInfo) -> bool {
    device.io_mode == IoMode::Fuse
}

/// The instance for volumes of a backend.
fn instance(backend: Option<BackendKind>) -> &'static str {
    match backend {
        None => "csi",
        Some(BackendKind::Loop) => "csi-loop",
        Some(_) => "csi-ublk",
    }
}
