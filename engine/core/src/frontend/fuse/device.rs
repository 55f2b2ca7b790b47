// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The lifecycle of one file: configure, start, resize, stop.
//!
//! Knows the order that the kernel requires. Whatever may wait for our own threads has a deadline.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Instant;

use super::call_queue::CallQueue;
use super::mount::FuseFileSystem;
use super::node::{FuseNode, POLL_INTERVAL, RELEASE_TIMEOUT};
use super::queue::FuseQueue;
use super::with_timeout;
use crate::error::{Error, Kind, Result};
use crate::frontend::{DeviceParameters, FrontendQueue, StopMode};
use crate::image::{Geometry, Image};
use crate::sys;

#[derive(Debug, Default)]
struct FuseDeviceState {
    geometry: Option<Geometry>,
    image: Weak<Image>,
    call_queues: Vec<Arc<CallQueue>>,
    node: Option<Arc<FuseNode>>,
}

/// One file.
#[derive(Debug)]
pub struct FuseDevice {
    files: Arc<FuseFileSystem>,
    name: String,
    parameters: DeviceParameters,
    state: Mutex<FuseDeviceState>,
}

impl FuseDevice {
    pub(in crate::frontend) fn new(
        files: Arc<FuseFileSystem>,
        number: u32,
        parameters: DeviceParameters,
    ) -> FuseDevice {
        FuseDevice { files, name: format!("loop{number}"), parameters, state: Mutex::default() }
    }

    fn state(&self) -> MutexGuard<'_, FuseDeviceState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(in crate::frontend) fn parameters(&self) -> DeviceParameters {
        self.parameters
    }

    pub(in crate::frontend) fn node(&self) -> PathBuf {
        self.files.nodes().directory.join(&self.name)
    }

    pub(in crate::frontend) fn describe(&self, image: &Arc<Image>) -> Result<()> {
        let mut state = self.state();
        state.geometry = Some(image.geometry());
        state.image = Arc::downgrade(image);
        Ok(())
    }

    pub(in crate::frontend) fn queues(&self) -> Result<Vec<FrontendQueue>> {
        let DeviceParameters { queues, depth, .. } = self.parameters;
        let call_queues = (0..queues).map(|_| CallQueue::new().map(Arc::new)).collect::<Result<Vec<_>>>()?;
        self.state().call_queues.clone_from(&call_queues);
        let buffers = &self.files.nodes().buffers;
        let queue =
            |call_queue| FrontendQueue::Fuse(Box::new(FuseQueue::new(call_queue, buffers.clone(), depth)));
        Ok(call_queues.into_iter().map(queue).collect())
    }

    pub(in crate::frontend) fn start(&self) -> Result<()> {
        self.files.check_mounted()?;
        let mut state = self.state();
        let Some(geometry) = state.geometry else {
            return Err(Error::new(Kind::Internal, "the file has no image yet"));
        };
        let (image, call_queues) = (state.image.clone(), state.call_queues.clone());
        state.node = Some(self.files.nodes().insert(self.name.clone(), &geometry, image, call_queues)?);
        Ok(())
    }

    pub(in crate::frontend) fn is_open(&self) -> bool {
        self.state().node.as_ref().is_some_and(|node| node.state().opens > 0)
    }

    pub(in crate::frontend) fn resize(&self, bytes: u64) -> Result<()> {
        let Some(node) = self.state().node.clone() else {
            return Err(Error::new(Kind::Internal, "the file was not started"));
        };
        let before = node.size();
        // A cached page at the old end ends in zeroes, which must not overwrite what the image has
        // there now.
        let path = self.node();
        with_timeout(&format!("writing back {}", self.name), move || {
            std::fs::File::open(path).and_then(|file| file.sync_all())
        })?
        .map_err(|error| Error::os(error, "the kernel cannot write back the page cache"))?;
        self.invalidate(&node, "writing back");
        node.set_size(bytes);
        // With write-back caching the kernel tracks the file's size itself: only a truncation
        // changes it.
        let path = self.node();
        let outcome = with_timeout(&format!("resizing {}", self.name), move || sys::truncate(&path, bytes))
            .and_then(|done| done.map_err(|error| Error::os(error, "the kernel rejects the new size")));
        outcome.inspect_err(|_| node.set_size(before))
    }

    pub(in crate::frontend) fn stop(&self, when: StopMode) -> Result<()> {
        let state = self.state();
        if let Some(node) = &state.node {
            match when {
                StopMode::IfUnused | StopMode::IfUnusedNow => close_if_unused(node)?,
                StopMode::Always => self.close_in_use(node),
            }
            self.files.nodes().remove(node);
        }
        for call_queue in &state.call_queues {
            call_queue.close();
        }
        if let Some(node) = &state.node {
            self.invalidate_entry(node);
        }
        Ok(())
    }

    /// Refuses further opens, and has the kernel write back its cache.
    fn close_in_use(&self, node: &FuseNode) {
        let used = {
            let mut state = node.state();
            state.closed = true;
            state.opens > 0
        };
        if used {
            self.invalidate(node, "writing back");
        }
    }

    /// Removes name and content from the kernel's caches.
    fn invalidate_entry(&self, node: &FuseNode) {
        let (notifier, name) = (self.files.notifier(), node.name.clone());
        let forgotten = with_timeout("invalidating a directory entry", move || {
            // Fails if the kernel does not know the name.
            let _ = notifier.inval_entry(fuser::INodeNo::ROOT, name.as_ref());
        });
        if let Err(error) = forgotten {
            tracing::warn!(%error, "the name {} may stay visible for a while", self.name);
        }
        self.invalidate(node, "dropping cached pages");
    }

    /// Writes back and drops all cached pages. The kernel does not report which pages it could not
    /// write: their writers get the error from fsync and close.
    fn invalidate(&self, node: &FuseNode, what: &str) {
        let (notifier, ino) = (self.files.notifier(), fuser::INodeNo(node.ino));
        let done = with_timeout(what, move || notifier.inval_inode(ino, 0, 0));
        match done.map(|done| done.map_err(|error| (error.raw_os_error(), error))) {
            // ENOENT: the kernel does not know the file. ENODEV: it was unmounted.
            Ok(Ok(()) | Err((Some(libc::ENOENT | libc::ENODEV), _))) => {}
            Ok(Err((_, error))) => tracing::warn!(%error, "cannot write back {}", self.name),
            Err(error) => tracing::warn!(%error, "cannot write back all of {}", self.name),
        }
    }
}

/// Closes a file that is not open, now or soon.
fn close_if_unused(node: &FuseNode) -> Result<()> {
    let deadline = Instant::now() + RELEASE_TIMEOUT;
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
        std::thread::sleep(POLL_INTERVAL);
    }
}
