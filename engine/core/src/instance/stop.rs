// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The shutdown of an engine: its devices wait for the next daemon, or are detached.
//!
//! Knows the order and the deadlines. Does not know signals.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::Engine;
use super::attached::AttachedDevice;
use super::engine::owner_hash;
use super::instance::Instance;
use super::write_back::{nodes_of, write_back};
use crate::error::{Error, Kind};
use crate::frontend::{self, StopMode};
use crate::parallel;
use crate::sys::usage::Disks;

/// Deadline for all devices together to complete requests in flight.
const QUIESCE_LIMIT: Duration = Duration::from_secs(5);
/// Devices quiesced in parallel.
const QUIESCE_PARALLEL: usize = 16;
impl Engine {
    /// Ends all companions. Then quiesces the devices for the next daemon, keeping their names and
    /// state; or detaches them, with `detach_all` or if the kernel does not keep them. The process
    /// must end next, without dropping the engine.
    pub fn shutdown(&self, detach_all: bool) {
        let companions = self.companions();
        let mut ending: Vec<PathBuf> = companions.iter().flat_map(|one| one.bound_nodes()).collect();
        let instances: Vec<Arc<Instance>> = self.table().values().cloned().collect();
        let ends = |instance: &&Arc<Instance>| detach_all || !instance.frontend.devices_outlive_daemon();
        let (detaching, lasting): (Vec<_>, Vec<_>) = instances.iter().partition(ends);
        ending.extend(detaching.iter().flat_map(|instance| nodes_of(instance)));
        write_back(ending);
        companions.iter().for_each(|companion| companion.end());
        instances.iter().for_each(|instance| instance.close());
        detaching.iter().for_each(|instance| detach_devices(instance));
        let (served, running): (Vec<_>, Vec<_>) =
            lasting.into_iter().partition(|instance| instance.backend.uses_workers());
        log_left_running(running.iter().map(|instance| instance.live().len()).sum());
        quiesce_devices(&served.iter().flat_map(|instance| instance.live()).collect::<Vec<_>>());
    }
}

/// Disks of the daemon with this run directory: block devices, and the kernel's loop devices on its
/// files. Also the errors for disks of the driver whose owner is unknown.
pub fn disks_of(run_dir: &Path) -> (Disks, Vec<Error>) {
    let mut disks = Disks::backed_by(|file| file.starts_with(run_dir));
    let mut unknown_owner = Vec::new();
    for (disk, found) in frontend::lasting() {
        match found {
            Ok(found) if found.parameters.owner_cookie >> 32 == u64::from(owner_hash(run_dir)) => {
                disks.insert(&disk);
            }
            Ok(_) => {}
            // It was deleted meanwhile.
            Err(error) if error.kind() == Kind::NotFound => {}
            Err(error) => unknown_owner.push(error),
        }
    }
    (disks, unknown_owner)
}

fn detach_devices(instance: &Instance) {
    for number in instance.numbers() {
        if let Err(error) = instance.detach(number, StopMode::Always) {
            tracing::warn!("{}/loop{number} did not stop: {error}", instance.info().name);
        }
    }
    if instance.numbers().is_empty() {
        instance.remove_files();
    }
}

fn log_left_running(devices: usize) {
    if devices > 0 {
        tracing::info!(
            "{devices} devices go on without the daemon: the kernel serves them; to detach devices, run \
             'loopengine detach --all' before a stop"
        );
    }
}

/// In parallel, because each may wait for a slow image.
fn quiesce_devices(devices: &[Arc<AttachedDevice>]) {
    if devices.is_empty() {
        return;
    }
    let until = Instant::now() + QUIESCE_LIMIT;
    parallel::for_each("quiesce", QUIESCE_PARALLEL, devices, |device| {
        if let Err(error) = device.quiesce(until) {
            tracing::warn!("{}: {error}; the next daemon repeats the requests in flight", device.name());
        }
    });
    tracing::info!(
        "{} devices wait for the next daemon, with their I/O: start the daemon again; to detach devices, \
         run 'loopengine detach --all' before a stop",
        devices.len()
    );
}
