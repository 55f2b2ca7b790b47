//! Devices of the configuration: those that are not there are attached, at start and at a reload.
//!
//! Knows which devices are there already. A file system may never answer who opens an image of it. So every
//! image has a thread, nothing waits long for one, and no image has two.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::time::{Instant, timeout_at};

use super::image;
use crate::config::DeviceTable;
use crate::control::{self, EngineApi};
use crate::error::Result;
use crate::instance::Selector;
use crate::instance::spec::{DeviceInfo, DeviceState};

/// How long the start of the daemon waits for one image,
const ONE_MAX: Duration = Duration::from_secs(5);
/// and for all of them together.
const ALL_MAX: Duration = Duration::from_secs(20);

/// Entries whose devices are being attached now.
type Busy = Arc<Mutex<Vec<DeviceTable>>>;

/// Attaches what the configuration names.
#[derive(Clone)]
pub(super) struct Devices {
    backend: Arc<dyn EngineApi>,
    busy: Busy,
}

impl Devices {
    pub(super) fn new(backend: Arc<dyn EngineApi>) -> Devices {
        Devices { backend, busy: Busy::default() }
    }

    /// Attaches the devices of `tables` that are not there, in their order; first those with a number,
    /// so that no other takes it. Logs each. What does not answer in time goes on by itself.
    pub(super) async fn attach(&self, mut tables: Vec<DeviceTable>) {
        tables.sort_by_key(|table| table.number.is_none());
        let end = Instant::now() + ALL_MAX;
        for table in tables {
            let Some(slot) = Slot::take(&self.busy, &table) else {
                tracing::warn!("{}: {} is still being attached", table.place, table.image);
                continue;
            };
            let (backend, place) = (Arc::clone(&self.backend), format!("{}: {}", table.place, table.image));
            let attaching = control::apart(move || {
                let (place, instance) = (format!("{}: {}", table.place, table.image), &table.instance);
                match attach(&table, &*backend) {
                    Ok(done) => tracing::info!("{place} {done}"),
                    Err(error) => {
                        tracing::error!("{place} is not attached to instance '{instance}': {error}")
                    }
                }
                drop(slot);
                Ok(())
            });
            match timeout_at(end.min(Instant::now() + ONE_MAX), attaching).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::error!("{place} is not attached: {error}"),
                Err(_) => tracing::error!(
                    "{place} is not attached yet: its file system does not answer; it is attached when it does"
                ),
            }
        }
    }
}

/// Attaches the device of an entry, unless it is there. Answers what the log says of it.
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
        (DeviceState::Live, _) | (_, None) => format!("is attached already, as {path}"),
        (_, Some(reason)) => format!("is attached already, as {path}, which does not work: {reason}"),
    }
}

/// An entry's place among those that are being attached.
struct Slot {
    busy: Busy,
    table: DeviceTable,
}

impl Slot {
    /// None: it is taken.
    fn take(busy: &Busy, table: &DeviceTable) -> Option<Slot> {
        let mut tables = busy.lock().unwrap_or_else(PoisonError::into_inner);
        if tables.iter().any(|other| other.same_device(table)) {
            return None;
        }
        tables.push(table.clone());
        Some(Slot { busy: Arc::clone(busy), table: table.clone() })
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut tables = self.busy.lock().unwrap_or_else(PoisonError::into_inner);
        tables.retain(|other| !other.same_device(&self.table));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::reload::tests::Asked;
    use crate::config::Config;

    #[test]
    fn what_is_not_there_is_attached_once() {
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
        let asked = Arc::new(Asked::default());
        let devices = Devices::new(Arc::clone(&asked) as Arc<dyn EngineApi>);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        // As by another daemon, and by a reload.
        for _ in 0..2 {
            runtime.block_on(devices.attach(config.devices().cloned().collect()));
            let attached =
                [format!("attach {b} true"), format!("attach {a} false"), format!("attach {a} false")];
            assert_eq!(*asked.0.lock().unwrap(), attached);
        }
        assert!(devices.busy.lock().unwrap().is_empty());
        let [table] = &config.devices().take(1).collect::<Vec<_>>()[..] else { panic!() };
        let refused = attach(table, &*asked).unwrap_err().to_string();
        assert!(refused.contains(&missing), "{refused}");
    }

    #[test]
    fn no_image_is_attached_twice_at_once() {
        let config = Config::parse("[[device]]\nimage='/a'\n[[device]]\nimage='/b'\n", "x.toml").unwrap();
        let [a, b] = &config.devices().collect::<Vec<_>>()[..] else { panic!() };
        let busy = Busy::default();
        let slot = Slot::take(&busy, a);
        assert!(slot.is_some() && Slot::take(&busy, a).is_none() && Slot::take(&busy, b).is_some());
        drop(slot);
        assert!(Slot::take(&busy, a).is_some());
    }
}
