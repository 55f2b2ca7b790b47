//! The life of one file: described, started, resized, stopped.
//!
//! Knows in which order the kernel wants things. What may wait for our own threads has a deadline.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Instant;

use super::lane::Lane;
use super::mount::FileSystem;
use super::node::{Node, PAUSE, SOON};
use super::queue::FuseQueue;
use super::with_limit;
use crate::error::{Error, Kind, Result};
use crate::frontend::{Parameters, Queue, Stop};
use crate::image::{Geometry, Image};
use crate::sys;

#[derive(Debug, Default)]
struct Made {
    geometry: Option<Geometry>,
    image: Weak<Image>,
    lanes: Vec<Arc<Lane>>,
    node: Option<Arc<Node>>,
}

/// One file.
#[derive(Debug)]
pub struct Device {
    files: Arc<FileSystem>,
    name: String,
    parameters: Parameters,
    made: Mutex<Made>,
}

impl Device {
    pub(in crate::frontend) fn new(files: Arc<FileSystem>, number: u32, parameters: Parameters) -> Device {
        Device { files, name: format!("loop{number}"), parameters, made: Mutex::default() }
    }

    fn made(&self) -> MutexGuard<'_, Made> {
        self.made.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(in crate::frontend) fn parameters(&self) -> Parameters {
        self.parameters
    }

    pub(in crate::frontend) fn node(&self) -> PathBuf {
        self.files.nodes().directory.join(&self.name)
    }

    pub(in crate::frontend) fn describe(&self, image: &Arc<Image>) -> Result<()> {
        let mut made = self.made();
        made.geometry = Some(image.geometry());
        made.image = Arc::downgrade(image);
        Ok(())
    }

    pub(in crate::frontend) fn queues(&self) -> Result<Vec<Queue>> {
        let Parameters { queues, depth, .. } = self.parameters;
        let lanes = (0..queues).map(|_| Lane::new().map(Arc::new)).collect::<Result<Vec<_>>>()?;
        self.made().lanes.clone_from(&lanes);
        let buffers = &self.files.nodes().buffers;
        let queue = |lane| Queue::Fuse(Box::new(FuseQueue::new(lane, buffers.clone(), depth)));
        Ok(lanes.into_iter().map(queue).collect())
    }

    pub(in crate::frontend) fn start(&self) -> Result<()> {
        self.files.check_mounted()?;
        let mut made = self.made();
        let Some(geometry) = made.geometry else {
            return Err(Error::new(Kind::Internal, "the file was not described"));
        };
        let (image, lanes) = (made.image.clone(), made.lanes.clone());
        made.node = Some(self.files.nodes().insert(self.name.clone(), &geometry, image, lanes)?);
        Ok(())
    }

    pub(in crate::frontend) fn is_open(&self) -> bool {
        self.made().node.as_ref().is_some_and(|node| node.state().opens > 0)
    }

    pub(in crate::frontend) fn resize(&self, bytes: u64) -> Result<()> {
        let Some(node) = self.made().node.clone() else {
            return Err(Error::new(Kind::Internal, "the file was not started"));
        };
        let before = node.size();
        // A page at the old end that is cached ends in zeroes, which must not come to lie on what
        // the image has there now.
        let path = self.node();
        with_limit("writing back", move || std::fs::File::open(path).and_then(|file| file.sync_all()))?
            .map_err(|error| Error::os(error, "the kernel does not write back what it caches"))?;
        self.invalidate(&node, "writing back");
        node.set_size(bytes);
        // The kernel minds the size of a file by itself when it caches writes, and believes nobody
        // but who truncates it.
        let path = self.node();
        let told = with_limit("truncating a file of our own", move || sys::truncate(&path, bytes))
            .and_then(|told| told.map_err(|error| Error::os(error, "the kernel does not take the new size")));
        told.inspect_err(|_| node.set_size(before))
    }

    pub(in crate::frontend) fn stop(&self, when: Stop) -> Result<()> {
        let made = self.made();
        if let Some(node) = &made.node {
            match when {
                Stop::IfUnused | Stop::IfUnusedNow => close_unused(node)?,
                Stop::Always => self.close_used(node),
            }
            self.files.nodes().remove(node);
        }
        for lane in &made.lanes {
            lane.end();
        }
        if let Some(node) = &made.node {
            self.forget(node);
        }
        Ok(())
    }

    /// Lets nobody open the file any more, and has the kernel write back what it caches.
    fn close_used(&self, node: &Node) {
        let used = {
            let mut state = node.state();
            state.closed = true;
            state.opens > 0
        };
        if used {
            self.invalidate(node, "writing back");
        }
    }

    /// The kernel is to know neither the name nor the content any more.
    fn forget(&self, node: &Node) {
        let (notifier, name) = (self.files.notifier(), node.name.clone());
        let forgotten = with_limit("forgetting a name", move || {
            // It fails when the kernel has not heard of the name.
            let _ = notifier.inval_entry(fuser::INodeNo::ROOT, name.as_ref());
        });
        if let Err(error) = forgotten {
            tracing::warn!(%error, "{} may be found for a while", self.name);
        }
        self.invalidate(node, "dropping what is cached");
    }

    /// Writes back and drops all cached pages. The kernel does not say which of them it could not write:
    /// their writers are told, by fsync and close.
    fn invalidate(&self, node: &Node, what: &str) {
        let (notifier, ino) = (self.files.notifier(), fuser::INodeNo(node.ino));
        let done = with_limit(what, move || notifier.inval_inode(ino, 0, 0));
        match done.map(|done| done.map_err(|error| (error.raw_os_error(), error))) {
            // ENOENT: the kernel has not heard of the file. ENODEV: somebody has unmounted it.
            Ok(Ok(()) | Err((Some(libc::ENOENT | libc::ENODEV), _))) => {}
            Ok(Err((_, error))) => tracing::warn!(%error, "cannot write back {}", self.name),
            Err(error) => tracing::warn!(%error, "not all of {} could be written back", self.name),
        }
    }
}

/// Closes a file that nobody has open, now or soon.
fn close_unused(node: &Node) -> Result<()> {
    let deadline = Instant::now() + SOON;
    loop {
        {
            let mut state = node.state();
            if state.opens == 0 {
                state.closed = true;
                return Ok(());
            }
        }
        if Instant::now() >= deadline {
            return Err(Error::new(Kind::Busy, "the file is open"));
        }
        std::thread::sleep(PAUSE);
    }
}
