// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Attaches the devices of the configuration that are not attached yet, at start and on reload.
//!
//! Opening an image may block forever on its file system. So each image has a thread of its own,
//! waits are bounded, and no image has two threads.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::time::{Instant, timeout_at};

use super::image;
use crate::config::DeviceTable;
use crate::control::{self, EngineApi};
use crate::error::Result;
use crate::instance::Selector;
use crate::instance::spec::{DeviceInfo, DeviceState};

/// Maximum wait of the daemon's start for one image.
const ONE_MAX: Duration = Duration::from_secs(5);
/// Maximum wait of the daemon's start for all images.
const ALL_MAX: Duration = Duration::from_secs(20);

/// Entries whose devices are being attached.
type Attaching = Arc<Mutex<Vec<DeviceTable>>>;

/// Attaches the devices of the configuration.
#[derive(Clone)]
pub(super) struct ConfiguredDevices {
    backend: Arc<dyn EngineApi>,
    attaching: Attaching,
}

impl ConfiguredDevices {
    pub(super) fn new(backend: Arc<dyn EngineApi>) -> ConfiguredDevices {
        ConfiguredDevices { backend, attaching: Attaching::default() }
    }

    /// Attaches the devices of `tables` that are missing, those with a fixed number first. Logs
    /// each result. An attach that exceeds its wait continues in the background.
    pub(super) async fn attach(&self, mut tables: Vec<DeviceTable>) {
        tables.sort_by_key(|table| table.number.is_none());
        let end = Instant::now() + ALL_MAX;
        for table in tables {
            let Some(guard) = AttachGuard::begin(&self.attaching, &table) else {
                tracing::warn!("{}: {} is still being attached", table.location, table.image);
                continue;
            };
            let (backend, place) =
                (Arc::clone(&self.backend), format!("{}: {}", table.location, table.image));
            let attaching = control::run_blocking(move || {
                let (place, instance) = (format!("{}: {}", table.location, table.image), &table.instance);
                match attach(&table, &*backend) {
                    Ok(done) => tracing::info!("{place} {done}"),
                    Err(error) => {
                        tracing::error!("{place} is not attached to instance '{instance}': {error}")
                    }
                }
                drop(guard);
                Ok(())
            });
            match timeout_at(end.min(Instant::now() + ONE_MAX), attaching).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::error!("{place} is not attached: {error}"),
                Err(_) => tracing::error!(
                    "{place} is not attached yet: its file system does not answer; the attach continues in the background"
                ),
            }
        }
    }
}

/// Attaches the device of an entry unless it exists. Returns the log text.
fn attach(table: &DeviceTable, backend: &dyn EngineApi) -> Result<String> {
    if let Some(device) = backend.devices(&Selector::All)?.into_iter().find(|device| table.is(device)) {
        return Ok(found(&device));
    }
    let mut spec = table.spec();
    let image = image::open(table.image.as_ref(), &mut spec)?;
    let device = backend.attach(&spec, table.force, image)?;
    Ok(format!("is attached as {}", device.path))
}

fn found(device: &DeviceInfo) -> String {
    let DeviceInfo { path, state, reason, .. } = device;
    match (state, reason) {
        (DeviceState::Live, _) | (_, None) => format!("is already attached as {path}"),
        (_, Some(reason)) => format!("is already attached as {path}, which does not work: {reason}"),
    }
}

/// Marks an entry as being attached until it is dropped.
struct AttachGuard {
    attaching: Attaching,
    table: DeviceTable,
}

impl AttachGuard {
    /// None if the entry is being attached.
    fn begin(attaching: &Attaching, table: &DeviceTable) -> Option<AttachGuard> {
        let mut tables = attaching.lock().unwrap_or_else(PoisonError::into_inner);
        if tables.iter().any(|other| other.same_device(table)) {
            return None;
        }
        tables.push(table.clone());
        Some(AttachGuard { attaching: Arc::clone(attaching), table: table.clone() })
    }
}

impl Drop for AttachGuard {
    fn drop(&mut self) {
        let mut tables = self.attaching.lock().unwrap_or_else(PoisonError::into_inner);
        tables.retain(|other| !other.same_device(&self.table));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::reload::tests::RecordedCalls;
    use crate::config::Config;

    #[test]
    fn attaches_missing_devices_once() {
        let dir = tempfile::tempdir().unwrap();
        let [a, b, missing] = ["a", "b", "missing"].map(|name| dir.path().join(name).display().to_string());
        for image in [&a, &b] {
            std::fs::write(image, [0; 4096]).unwrap();
        }
        let text = format!(
            "[[device]]\nimage='{missing}'\n[[device]]\nimage='{a}'\n[[device]]\nimage='{b}'\nnumber=0\nforce=true\n\
             [[device]]\nimage='{a}'\noffset=512\n"
        );
        let config = Config::parse(&text, "x.toml").unwrap();
        let calls = Arc::new(RecordedCalls::default());
        let devices = ConfiguredDevices::new(Arc::clone(&calls) as Arc<dyn EngineApi>);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        // The second round is a reload.
        for _ in 0..2 {
            runtime.block_on(devices.attach(config.devices().cloned().collect()));
            let attached =
                [format!("attach {b} true"), format!("attach {a} false"), format!("attach {a} false")];
            assert_eq!(*calls.0.lock().unwrap(), attached);
        }
        assert!(devices.attaching.lock().unwrap().is_empty());
        let [table] = &config.devices().take(1).collect::<Vec<_>>()[..] else { panic!() };
        let refused = attach(table, &*calls).unwrap_err().to_string();
        assert!(refused.contains(&missing), "{refused}");
    }

    #[test]
    fn attaches_no_image_concurrently() {
        let config = Config::parse("[[device]]\nimage='/a'\n[[device]]\nimage='/b'\n", "x.toml").unwrap();
        let [a, b] = &config.devices().collect::<Vec<_>>()[..] else { panic!() };
        let attaching = Attaching::default();
        let guard = AttachGuard::begin(&attaching, a);
        assert!(
            guard.is_some()
                && AttachGuard::begin(&attaching, a).is_none()
                && AttachGuard::begin(&attaching, b).is_some()
        );
        drop(guard);
        assert!(AttachGuard::begin(&attaching, a).is_some());
    }
}
