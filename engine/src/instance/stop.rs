//! How an engine ends: its devices wait for the next daemon, or are detached.
//!
//! Knows in which order, and how long that may take. Does not know signals, nor what a device is.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use super::attached::Attached;
use super::pool::Instance;
use super::{Engine, owner_mark};
use crate::frontend::{Found, Stop, ublk};
use crate::sys::usage::Disks;

/// For all devices together to answer what is in flight.
const QUIESCE_LIMIT: Duration = Duration::from_secs(5);
/// Devices that are quiesced at a time.
const QUIESCED_TOGETHER: usize = 16;
/// For the kernel to write back before devices in use are stopped.
const WRITE_BACK_LIMIT: Duration = Duration::from_secs(10);

impl Engine {
    /// Ends all pools. Then leaves the devices to the next daemon, with their names and state; or detaches
    /// them, with `detach_all` and where the kernel does not keep them. The process must end next, without
    /// dropping the engine.
    pub fn shutdown(&self, detach_all: bool) {
        let detach = detach_all || !self.shared.frontend.devices_outlive_daemon();
        let pools = self.pools();
        if detach || !pools.is_empty() {
            write_everything_back();
        }
        pools.iter().for_each(|pool| pool.end(true));
        let instances: Vec<Arc<Instance>> = self.table().values().cloned().collect();
        instances.iter().for_each(|instance| instance.close());
        if detach {
            instances.iter().for_each(|instance| detach_devices(instance));
        } else {
            leave_waiting(&instances.iter().flat_map(|instance| instance.live()).collect::<Vec<_>>());
        }
    }
}

/// Disks of the daemon with this run directory: block devices, and what the kernel's loop driver makes of
/// its files.
pub(crate) fn disks_of(run_dir: &Path) -> Disks {
    let mut disks = Disks::backed_by(|file| file.starts_with(run_dir));
    for id in ublk::present_devices() {
        let ours = |found: Found| found.parameters.owner >> 32 == u64::from(owner_mark(run_dir));
        if ublk::Device::examine(id).is_ok_and(ours) {
            disks.insert(&format!("ublkb{id}"));
        }
    }
    disks
}

fn detach_devices(instance: &Instance) {
    for number in instance.numbers() {
        if let Err(error) = instance.detach(number, Stop::Always) {
            tracing::warn!("{}/loop{number} did not stop: {error}", instance.info().name);
        }
    }
    if instance.numbers().is_empty() {
        instance.erase();
    }
}

/// Some at a time, because each may wait for a slow image.
fn leave_waiting(devices: &[Arc<Attached>]) {
    if devices.is_empty() {
        return;
    }
    let until = Instant::now() + QUIESCE_LIMIT;
    let next = AtomicUsize::new(0);
    let quiesce = || {
        while let Some(device) = devices.get(next.fetch_add(1, Ordering::Relaxed)) {
            if let Err(error) = device.quiesce(until) {
                tracing::warn!("{}: {error}; the next daemon repeats what is not answered", device.name());
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..devices.len().min(QUIESCED_TOGETHER) {
            // Without a thread the others do its part.
            let _ = std::thread::Builder::new().name("quiesce".into()).spawn_scoped(scope, quiesce);
        }
        quiesce();
    });
    tracing::info!(
        "{} devices wait for the next daemon, and so does their I/O: start it again; \
         'loopengine detach --all' before a stop detaches them",
        devices.len()
    );
}

/// Has the kernel write back what its caches hold for devices that are going to be stopped in use:
/// once they are stopping, the driver fails what is written late. What takes too long is lost then,
/// as it would be with a disk that is pulled out.
pub(super) fn write_everything_back() {
    let (done, is_done) = crossbeam::channel::bounded(1);
    std::thread::spawn(move || {
        rustix::fs::sync();
        let _ = done.send(());
    });
    if is_done.recv_timeout(WRITE_BACK_LIMIT).is_err() {
        tracing::warn!("not all data could be written back before the devices are stopped");
    }
}
