// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A pool as a directory: `loop-control`, `loopN`, `loopNpM`.
//!
//! A FUSE file system without data: its nodes are block special inodes, so that no byte of a device
//! passes through it. It is created as a detached mount. Whoever gets the descriptor can attach it
//! ([`attach`]), in any namespace. The pool ends with the last mount and the last descriptor. Knows
//! names, inodes, owners and lifetimes. Does not know what operations do ([`crate::loops`]).

pub mod attach;
mod inode_table;
mod request_handler;
mod session;
#[cfg(test)]
mod tests;
mod wire;

use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Weak};
use std::time::Duration;

use crate::error::Result;
use crate::loops::{Answer, DeviceEntry, LoopOp, OwnerCaller, Pool, PoolSpec, PoolWatcher};

use inode_table::InodeTable;
use request_handler::RequestHandler;
use session::StopRequest;
use wire::CONTROL;

/// The interface that a directory needs of a pool.
pub trait DeviceSource: fmt::Debug + Send + Sync {
    /// Limits and owner.
    fn spec(&self) -> &PoolSpec;
    /// All devices, by number.
    fn entries(&self) -> Vec<DeviceEntry>;
    /// One device, for a lookup that an open follows.
    fn entry(&self, number: u32) -> Option<DeviceEntry>;
    /// One device, for other purposes.
    fn snapshot(&self, number: u32) -> Option<DeviceEntry> {
        self.entry(number)
    }
    /// Whether the disk with this number serves the file that it was published with.
    fn is_intact(&self, _rdev: u64) -> bool {
        true
    }
    /// Runs an operation of loop-control. Returns its number.
    fn control_op(&self, op: LoopOp) -> Answer<u32>;
    /// Notifies the directory of changes.
    fn watch(&self, changes: ChangeListener);
}

/// Timeout of an operation of loop-control.
const CONTROL_TIMEOUT: Duration = Duration::from_secs(60);

impl DeviceSource for Pool {
    fn spec(&self) -> &PoolSpec {
        self.spec()
    }

    fn entries(&self) -> Vec<DeviceEntry> {
        self.entries()
    }

    fn entry(&self, number: u32) -> Option<DeviceEntry> {
        self.entry(number)
    }

    fn snapshot(&self, number: u32) -> Option<DeviceEntry> {
        self.snapshot(number)
    }

    fn is_intact(&self, rdev: u64) -> bool {
        self.allocator.is_intact(rdev)
    }

    fn control_op(&self, op: LoopOp) -> Answer<u32> {
        self.execute(op, &OwnerCaller::with_timeout(CONTROL_TIMEOUT))?.number()
    }

    fn watch(&self, changes: ChangeListener) {
        self.watch(Arc::new(changes));
    }
}

/// Receives the changes of a pool. Does not keep the directory alive.
#[derive(Debug)]
pub struct ChangeListener {
    nodes: Weak<InodeTable>,
    stop: Weak<StopRequest>,
}

impl ChangeListener {
    /// A device was added, changed or removed.
    pub fn changed(&self, number: u32) {
        if let Some(nodes) = self.nodes.upgrade() {
            nodes.remove_gone(number);
        }
    }

    /// The pool has ended.
    pub fn ended(&self) {
        if let Some(stop) = self.stop.upgrade() {
            stop.request();
        }
    }
}

impl PoolWatcher for ChangeListener {
    fn changed(&self, _: &Pool, number: u32) {
        self.changed(number);
    }

    fn ended(&self, _: &Pool) {
        self.ended();
    }
}

/// The daemon's handle of a directory. To drop it changes nothing: the directory lives while it is
/// mounted or open.
#[derive(Debug)]
pub struct Directory {
    stop: Arc<StopRequest>,
    device: u64,
}

impl Directory {
    /// Creates the directory of a pool, and its detached mount. Calls `on_end` when the last mount
    /// and descriptor are gone, unless [`Directory::end`] or the end of the pool is the reason.
    pub fn open(
        devices: Arc<dyn DeviceSource>,
        on_end: impl FnOnce() + Send + Sync + 'static,
    ) -> Result<(Directory, OwnedFd)> {
        let stop = Arc::new(StopRequest::default());
        let nodes = Arc::new(InodeTable::new(devices.clone()));
        devices.watch(ChangeListener { nodes: Arc::downgrade(&nodes), stop: Arc::downgrade(&stop) });
        let source = devices.spec().name.clone();
        let (mount, device) =
            session::start(&source, RequestHandler::new(nodes), stop.clone(), Box::new(on_end))?;
        Ok((Directory { stop, device }, mount))
    }

    /// Device number of the file system, as in stat(2).
    pub fn device(&self) -> u64 {
        self.device
    }

    /// Whether this file is the loop-control of this directory.
    pub fn is_control(&self, st_dev: u64, st_ino: u64) -> bool {
        (st_dev, st_ino) == (self.device, CONTROL)
    }

    /// Ends it, mounted or not, after the requests in progress. Later requests fail with ENOTCONN.
    pub fn end(&self) {
        self.stop.request();
    }
}
