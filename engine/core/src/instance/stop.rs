// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The shutdown of an engine: its devices wait for the next daemon, or are detached.
//!
//! Knows the order and the deadlines. Does not know signals.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use super::Engine;
use super::attached::AttachedDevice;
use super::engine::owner_hash;
use super::instance::Instance;
use crate::error::{Error, Kind};
use crate::frontend::{StopMode, ublk};
use crate::sys::usage::{self, Disks};

/// Deadline for all devices together to complete requests in flight.
const QUIESCE_LIMIT: Duration = Duration::from_secs(5);
/// Devices quiesced in parallel.
const QUIESCE_PARALLEL: usize = 16;
/// Deadline for the kernel's write-back before devices in use are stopped.
const WRITE_BACK_LIMIT: Duration = Duration::from_secs(10);
/// Disks written back in parallel.
const WRITE_BACK_PARALLEL: usize = 16;

impl Engine {
    /// Ends all companions. Then quiesces the devices for the next daemon, keeping their names and
    /// state; or detaches them, with `detach_all` or if the kernel does not keep them. The process
    /// must end next, without dropping the engine.
    pub fn shutdown(&self, detach_all: bool) {
        let detach = detach_all || !self.context.frontend.devices_outlive_daemon();
        let companions = self.companions();
        let mut ending: Vec<PathBuf> = companions.iter().flat_map(|one| one.bound_nodes()).collect();
        let instances: Vec<Arc<Instance>> = self.table().values().cloned().collect();
        if detach {
            ending.extend(instances.iter().flat_map(|instance| nodes_of(instance)));
        }
        write_back(ending);
        companions.iter().for_each(|companion| companion.end());
        instances.iter().for_each(|instance| instance.close());
        if detach {
            instances.iter().for_each(|instance| detach_devices(instance));
        } else {
            quiesce_devices(&instances.iter().flat_map(|instance| instance.live()).collect::<Vec<_>>());
        }
    }
}

/// Disks of the daemon with this run directory: block devices, and the kernel's loop devices on its
/// files. Also the errors for disks of the driver whose owner is unknown.
pub fn disks_of(run_dir: &Path) -> (Disks, Vec<Error>) {
    let mut disks = Disks::backed_by(|file| file.starts_with(run_dir));
    let mut unknown_owner = Vec::new();
    for id in ublk::present_devices() {
        match ublk::UblkDevice::examine(id) {
            Ok(found) if found.parameters.owner_cookie >> 32 == u64::from(owner_hash(run_dir)) => {
                disks.insert(&format!("ublkb{id}"));
            }
            Ok(_) => {}
            // It was deleted meanwhile.
            Err(error) if error.kind() == Kind::NotFound => {}
            Err(error) => unknown_owner.push(error),
        }
    }
    (disks, unknown_owner)
}

/// Devices of an instance, and those stacked on them.
pub(super) fn nodes_of(instance: &Instance) -> Vec<PathBuf> {
    let nodes = instance.live().into_iter().map(|attached| attached.node());
    nodes
        .flat_map(|node| {
            Disks::of(&node).nodes().into_iter().chain((!node.starts_with("/dev")).then_some(node))
        })
        .collect()
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

/// In parallel, because each may wait for a slow image.
fn quiesce_devices(devices: &[Arc<AttachedDevice>]) {
    if devices.is_empty() {
        return;
    }
    let until = Instant::now() + QUIESCE_LIMIT;
    let next = AtomicUsize::new(0);
    let quiesce = || {
        while let Some(device) = devices.get(next.fetch_add(1, Ordering::Relaxed)) {
            if let Err(error) = device.quiesce(until) {
                tracing::warn!("{}: {error}; the next daemon repeats the requests in flight", device.name());
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..devices.len().min(QUIESCE_PARALLEL) {
            // If a thread fails to start, the others do its part.
            let _ = std::thread::Builder::new().name("quiesce".into()).spawn_scoped(scope, quiesce);
        }
        quiesce();
    });
    tracing::info!(
        "{} devices wait for the next daemon, with their I/O: start the daemon again; to detach devices, \
         run 'loopengine detach --all' before a stop",
        devices.len()
    );
}

/// Writes back the kernel's caches of disks that will be stopped in use: once they are stopping,
/// the driver fails late writes. Data that is not written in time is lost, as if the disk were
/// pulled out. Waits for these disks only: a thread that waits for others might never end.
pub(super) fn write_back(nodes: Vec<PathBuf>) {
    let nodes = Arc::new(nodes);
    let next = Arc::new(AtomicUsize::new(0));
    let (done, is_done) = crossbeam::channel::bounded(WRITE_BACK_PARALLEL);
    for _ in 0..nodes.len().min(WRITE_BACK_PARALLEL) {
        let (nodes, next, done) = (Arc::clone(&nodes), Arc::clone(&next), done.clone());
        std::thread::spawn(move || {
            while let Some(node) = nodes.get(next.fetch_add(1, Ordering::Relaxed)) {
                if let Err(error) = usage::write_back(node) {
                    tracing::debug!("{} could not be written back: {error}", node.display());
                }
            }
            drop(done);
        });
    }
    drop(done);
    // Nothing is sent: the channel disconnects when all threads have ended.
    let ended: Result<(), _> = is_done.recv_timeout(WRITE_BACK_LIMIT);
    if ended == Err(crossbeam::channel::RecvTimeoutError::Timeout) {
        tracing::warn!("could not write back all data before stopping the devices");
    }
}
