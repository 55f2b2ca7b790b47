//! A pool as a directory: `loop-control`, `loopN`, `loopNpM`.
//!
//! A FUSE file system without content: its nodes are block special inodes, so that no byte of a
//! device goes through it. It is made as a mount that is attached nowhere; whoever gets the
//! descriptor attaches it where he likes ([`attach`]), in whatever namespace, and when the last
//! mount and the last descriptor are gone, so is the pool. Knows names, inodes, owners and
//! lifetimes; what the operations mean is the pool's business ([`crate::loops`]).

mod answers;
pub mod attach;
mod nodes;
mod session;
#[cfg(test)]
mod tests;
mod wire;

use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Weak};
use std::time::Duration;

use crate::error::Result;
use crate::loops::{Answer, Entry, LoopOp, Owner, Pool, PoolSpec, Watcher};

use answers::Answers;
use nodes::{CONTROL, Nodes};
use session::Stop;

/// What a directory needs of a pool.
pub trait Devices: fmt::Debug + Send + Sync {
    /// Limits and owner.
    fn spec(&self) -> &PoolSpec;
    /// All devices, by number.
    fn entries(&self) -> Vec<Entry>;
    /// One device, for who opens it next.
    fn entry(&self, number: u32) -> Option<Entry>;
    /// One device, for who does not.
    fn shown(&self, number: u32) -> Option<Entry> {
        self.entry(number)
    }
    /// An operation of loop-control; its number.
    fn control(&self, op: LoopOp) -> Answer<u32>;
    /// Has the directory told of changes.
    fn watch(&self, changes: Changes);
}

/// How long an operation of loop-control may take.
const CONTROL_MAX: Duration = Duration::from_secs(60);

impl Devices for Pool {
    fn spec(&self) -> &PoolSpec {
        self.spec()
    }

    fn entries(&self) -> Vec<Entry> {
        self.entries()
    }

    fn entry(&self, number: u32) -> Option<Entry> {
        self.entry(number)
    }

    fn shown(&self, number: u32) -> Option<Entry> {
        self.shown(number)
    }

    fn control(&self, op: LoopOp) -> Answer<u32> {
        self.execute(op, &Owner::waiting(CONTROL_MAX))?.number()
    }

    fn watch(&self, changes: Changes) {
        self.watch(Arc::new(changes));
    }
}

/// Takes note of what changes in a pool. Does not keep the directory alive.
#[derive(Debug)]
pub struct Changes {
    nodes: Weak<Nodes>,
    stop: Weak<Stop>,
}

impl Changes {
    /// A device has come, changed or gone.
    pub fn changed(&self, number: u32) {
        if let Some(nodes) = self.nodes.upgrade() {
            nodes.forget_gone(number);
        }
    }

    /// The pool has ended.
    pub fn ended(&self) {
        if let Some(stop) = self.stop.upgrade() {
            stop.ask();
        }
    }
}

impl Watcher for Changes {
    fn changed(&self, _: &Pool, number: u32) {
        self.changed(number);
    }

    fn ended(&self, _: &Pool) {
        self.ended();
    }
}

/// The daemon's hold of a directory. Dropping it changes nothing: the directory lives as long as it
/// is mounted or open somewhere.
#[derive(Debug)]
pub struct Directory {
    stop: Arc<Stop>,
    device: u64,
}

impl Directory {
    /// Makes the directory of a pool, and its mount: attached nowhere, to be given away. `on_end` is
    /// called when nobody has it any more, unless [`Directory::end`] or the pool's end was the reason.
    pub fn open(
        devices: Arc<dyn Devices>,
        on_end: impl FnOnce() + Send + Sync + 'static,
    ) -> Result<(Directory, OwnedFd)> {
        let stop = Arc::new(Stop::new()?);
        let nodes = Arc::new(Nodes::new(devices.clone()));
        devices.watch(Changes { nodes: Arc::downgrade(&nodes), stop: Arc::downgrade(&stop) });
        let source = devices.spec().name.clone();
        let (mount, device) = session::start(&source, Answers::new(nodes), stop.clone(), Box::new(on_end))?;
        Ok((Directory { stop, device }, mount))
    }

    /// Number of the file system, as stat(2) has it.
    pub fn device(&self) -> u64 {
        self.device
    }

    /// Whether this file is the loop-control of this directory.
    pub fn is_control(&self, st_dev: u64, st_ino: u64) -> bool {
        (st_dev, st_ino) == (self.device, CONTROL)
    }

    /// Ends it, mounted or not, as soon as what is being answered is answered. Whoever asks it for
    /// anything later gets ENOTCONN.
    pub fn end(&self) {
        self.stop.ask();
    }
}
