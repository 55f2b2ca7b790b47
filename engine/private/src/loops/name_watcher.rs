// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Tells a pool of changes that others make: its backing files are renamed or deleted, its disks
//! unbound.
//!
//! Knows inotify. The close watcher reads all names now and then: it notices a renamed directory
//! above a file, and what is not watched.

use std::collections::BTreeMap;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};
use rustix::io::Errno;

use super::close_signs::CloseSigns;
use super::close_watcher::PoolWaker;
use crate::error::{Error, Result};

/// A rename, or a change of the number of links. chmod(1) and touch(1) are reported, too.
const CHANGES: WatchFlags = WatchFlags::MOVE_SELF.union(WatchFlags::ATTRIB);
const EVENTS_BYTES: usize = 4096;

/// How a pool learns of such changes.
#[derive(Clone, Debug, Default)]
pub struct Notices {
    /// The kernel's loop driver reports changes of its disks: see `Pools::listen`.
    pub reporting: Arc<AtomicBool>,
    /// Watches names, if that is possible.
    pub names: Option<Arc<NameWatcher>>,
    /// Signs of last closes, if the kernel reports them.
    pub closes: Arc<OnceLock<Arc<CloseSigns>>>,
    /// Wakes the pool.
    pub waker: PoolWaker,
}

impl Notices {
    /// For the pools of one daemon.
    pub fn start() -> Notices {
        let names = NameWatcher::start().inspect_err(|error| tracing::warn!("{error}")).ok();
        Notices { names, ..Notices::default() }
    }
}

/// The watched files of all pools.
#[derive(Debug)]
pub struct NameWatcher {
    inotify: OwnedFd,
    /// Pools by watch descriptor: one for each binding of the file.
    pools: Mutex<BTreeMap<i32, Vec<PoolWaker>>>,
}

/// Watches one file as long as it lives.
#[derive(Debug)]
pub struct NameWatch {
    watcher: Arc<NameWatcher>,
    descriptor: i32,
    pool: PoolWaker,
}

impl NameWatcher {
    /// Starts a thread, which does not end.
    pub fn start() -> Result<Arc<NameWatcher>> {
        let inotify = inotify::init(CreateFlags::CLOEXEC)
            .map_err(|error| Error::os(error, "cannot watch the names of files"))?;
        let watcher = Arc::new(NameWatcher { inotify, pools: Mutex::default() });
        let running = Arc::clone(&watcher);
        let thread = std::thread::Builder::new().name("name-events".into());
        let started = thread.spawn(move || running.run());
        started.map_err(|error| Error::os(error, "cannot start a thread"))?;
        Ok(watcher)
    }

    /// Watches a file for a pool. None: it cannot be watched.
    pub fn watch(self: &Arc<Self>, file: BorrowedFd<'_>, pool: &PoolWaker) -> Option<NameWatch> {
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        // Without the lock: the file system may take its time. If the file loses its last other watch
        // meanwhile, this one sees nothing.
        let added = inotify::add_watch(&self.inotify, &*path, CHANGES);
        let descriptor = added.inspect_err(|error| tracing::debug!(%error, "cannot watch a name")).ok()?;
        self.pools().entry(descriptor).or_default().push(pool.clone());
        Some(NameWatch { watcher: Arc::clone(self), descriptor, pool: pool.clone() })
    }

    fn pools(&self) -> MutexGuard<'_, BTreeMap<i32, Vec<PoolWaker>>> {
        self.pools.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self) {
        let mut buffer = [MaybeUninit::uninit(); EVENTS_BYTES];
        let mut events = inotify::Reader::new(self.inotify.as_fd(), &mut buffer);
        loop {
            match events.next() {
                Ok(event) if event.events().contains(ReadFlags::QUEUE_OVERFLOW) => {
                    self.pools().values().flatten().for_each(PoolWaker::read_names);
                }
                Ok(event) => {
                    let pools = self.pools();
                    pools.get(&event.wd()).into_iter().flatten().for_each(PoolWaker::read_names);
                }
                Err(Errno::INTR) => {}
                Err(error) => {
                    return tracing::warn!(%error, "cannot read inotify: pools notice renamed files later from now on");
                }
            }
        }
    }
}

impl Drop for NameWatch {
    fn drop(&mut self) {
        let mut pools = self.watcher.pools();
        let Some(users) = pools.get_mut(&self.descriptor) else { return };
        if let Some(position) = users.iter().position(|pool| *pool == self.pool) {
            users.swap_remove(position);
        }
        if users.is_empty() {
            pools.remove(&self.descriptor);
            // EINVAL: the file is gone.
            let _ = inotify::remove_watch(&self.watcher.inotify, self.descriptor);
        }
    }
}
