// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Writes back the kernel's caches of disks that are about to be stopped in use.
//!
//! Knows nodes and a deadline. Does not stop anything.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use super::instance::Instance;
use crate::sys::usage::{self, Disks};

/// Deadline for the kernel's write-back before devices in use are stopped.
const WRITE_BACK_LIMIT: Duration = Duration::from_secs(10);
/// Disks written back in parallel.
const WRITE_BACK_PARALLEL: usize = 16;

/// Devices of an instance, and those stacked on them.
pub(super) fn nodes_of(instance: &Instance) -> Vec<PathBuf> {
    let nodes = instance.live().into_iter().map(|attached| attached.node());
    nodes
        .flat_map(|node| {
            Disks::of(&node).nodes().into_iter().chain((!node.starts_with("/dev")).then_some(node))
        })
        .collect()
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
