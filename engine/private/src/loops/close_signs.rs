// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Signs of last closes, which ublk does not report itself: a node of a pool is closed, or a file
//! system unmounted.
//!
//! Knows inotify and fanotify. Both report before the disk is closed, so a sign says only that polls
//! are worth while. Not each last close has a sign: mounts are copied into other namespaces, and
//! device mapper opens disks by number. So pools without a sign are polled, too, once a second.

use std::collections::BTreeMap;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};
use rustix::io::Errno;

use super::close_watcher::PoolWaker;
use crate::error::{Error, Result};
use crate::sys::unmounts;

const CLOSES: WatchFlags = WatchFlags::CLOSE_WRITE.union(WatchFlags::CLOSE_NOWRITE);
/// The interval between two reads.
const READ_INTERVAL: Duration = Duration::from_millis(10);
const BUFFER_BYTES: usize = 16 << 10;

/// The signs of all pools.
#[derive(Debug)]
pub struct CloseSigns {
    nodes: OwnedFd,
    unmounts: OwnedFd,
    /// Pools by the watch descriptor of their directory.
    pools: Mutex<BTreeMap<i32, PoolWaker>>,
    /// Nobody reads the signs any more.
    failed: AtomicBool,
}

impl CloseSigns {
    /// `unmounts`: see [`unmounts::open`].
    pub fn new(unmounts: OwnedFd) -> Result<CloseSigns> {
        let nodes = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)
            .map_err(|error| Error::os(error, "cannot watch the nodes of pools"))?;
        let signs = CloseSigns { nodes, unmounts, pools: Mutex::default(), failed: AtomicBool::new(false) };
        // For mounts by root of the host, which nobody intercepts.
        match std::fs::File::open("/proc/1/ns/mnt") {
            Ok(namespace) => signs.watch_unmounts(namespace.as_fd()),
            Err(error) => tracing::debug!(%error, "cannot watch the mounts of the host"),
        }
        Ok(signs)
    }

    /// Reports to a pool when a node in its directory is closed. This keeps no mount of the directory
    /// alive.
    pub fn watch_nodes(&self, directory: BorrowedFd<'_>, pool: PoolWaker) -> Result<()> {
        let path = format!("/proc/self/fd/{}", directory.as_raw_fd());
        let added = inotify::add_watch(&self.nodes, &*path, CLOSES | WatchFlags::ONLYDIR);
        let watch = added.map_err(|error| Error::os(error, "cannot watch the nodes of a pool"))?;
        pool.expect_signs();
        let mut pools = self.pools();
        if self.failed.load(Relaxed) {
            pool.lose_signs();
        }
        pools.insert(watch, pool);
        Ok(())
    }

    /// Reports unmounts in this namespace to all pools. This does not keep it alive.
    pub fn watch_unmounts(&self, namespace: BorrowedFd<'_>) {
        if let Err(error) = unmounts::watch(self.unmounts.as_fd(), namespace) {
            tracing::debug!(%error, "cannot watch a mount namespace");
        }
    }

    fn pools(&self) -> MutexGuard<'_, BTreeMap<i32, PoolWaker>> {
        self.pools.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Passes signs on, until they cannot be read.
    pub fn run(&self) {
        loop {
            let mut fds = [&self.nodes, &self.unmounts].map(|fd| PollFd::new(fd, PollFlags::IN));
            let read = match poll(&mut fds, None) {
                Ok(_) => self.read_nodes().and_then(|()| self.read_unmounts()),
                Err(error) => Err(error),
            };
            if let Err(error) = read
                && error != Errno::INTR
            {
                tracing::warn!(%error, "last closes are noticed late from now on");
                let pools = self.pools();
                self.failed.store(true, Relaxed);
                return pools.values().for_each(PoolWaker::lose_signs);
            }
            std::thread::sleep(READ_INTERVAL);
        }
    }

    /// One buffer of events: a tenant can cause any number of them.
    fn read_nodes(&self) -> rustix::io::Result<()> {
        let mut buffer = [MaybeUninit::uninit(); BUFFER_BYTES];
        let mut events = inotify::Reader::new(self.nodes.as_fd(), &mut buffer);
        loop {
            match events.next() {
                // The file system of the pool is gone.
                Ok(event) if event.events().contains(ReadFlags::IGNORED) => {
                    self.pools().remove(&event.wd());
                }
                Ok(event) if event.events().contains(ReadFlags::QUEUE_OVERFLOW) => self.sign_all(),
                Ok(event) => self.pools().get(&event.wd()).into_iter().for_each(PoolWaker::node_closed),
                Err(Errno::AGAIN) => return Ok(()),
                Err(error) => return Err(error),
            }
            if events.is_buffer_empty() {
                return Ok(());
            }
        }
    }

    fn read_unmounts(&self) -> rustix::io::Result<()> {
        match rustix::io::read(&self.unmounts, &mut [0; BUFFER_BYTES]) {
            // An event does not name its namespace.
            Ok(_) => self.sign_all(),
            Err(Errno::AGAIN) => {}
            Err(error) => return Err(error),
        }
        Ok(())
    }

    fn sign_all(&self) {
        self.pools().values().for_each(PoolWaker::some_pool_closes);
    }
}
