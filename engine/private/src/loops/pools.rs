// SPDX-License-Identifier: Apache-2.0 OR MIT
//! All private pools of one daemon.
//!
//! Knows their names and limits, and the workers and disks that they take from the engine. Does not know who may
//! have one (`private`).

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::disk_allocator::DiskAllocator;
use super::name_watcher::Notices;
use super::{Pool, PoolSpec, PoolWatcher, Quotas};
use crate::error::{Error, Kind, Result};
use crate::event_threads::EventThreads;
use crate::frontend::BackendKind;
use crate::instance::claims::ExcludedFileSystem;
use crate::instance::{Companion, Engine, MAX_DEVICES, PoolResources, check_instance_name};
use crate::limits::POOLS_MAX;
use crate::sys::uevent;
use crate::sys::usage::Disks;

/// Pools that the end of the daemon ends at a time, and how long it waits for them.
const ENDED_IN_PARALLEL: usize = 64;
const END_MAX: Duration = Duration::from_secs(20);

/// See the module.
#[derive(Debug)]
pub struct Pools {
    resources: PoolResources,
    table: Table,
    quotas: Quotas,
    notices: Notices,
}

#[derive(Clone, Debug, Default)]
struct Table(Arc<Mutex<BTreeMap<String, Arc<Pool>>>>);

impl Table {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Pool>>> {
        lock(&self.0)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Removes a pool that has ended from the table.
struct RemoveOnEnd(Table);

impl PoolWatcher for RemoveOnEnd {
    fn changed(&self, _pool: &Pool, _number: u32) {}

    fn ended(&self, pool: &Pool) {
        self.0.lock().remove(&pool.spec().name);
    }
}

impl Pools {
    /// Those of the daemon with this engine. They end with it.
    pub fn new(engine: &Engine) -> Arc<Pools> {
        // A pool tries again, and then reports the error to its user.
        if let Err(error) = EventThreads::shared() {
            tracing::warn!(%error, "cannot serve pools");
        }
        let pools = Arc::new(Pools {
            resources: engine.pool_resources(),
            table: Table::default(),
            quotas: Quotas::default(),
            notices: Notices::start(),
        });
        engine.add_companion(Arc::clone(&pools) as _);
        pools
    }

    /// Makes a pool. It ends at [`Pool::end`], or with the daemon.
    pub fn open(&self, spec: &PoolSpec) -> Result<Arc<Pool>> {
        check_instance_name(&spec.name)?;
        if !(1..=MAX_DEVICES).contains(&spec.max) {
            return Err(Error::new(Kind::Invalid, format!("a pool can have 1 to {MAX_DEVICES} devices")));
        }
        let mut table = self.table.lock();
        if table.contains_key(&spec.name) {
            return Err(Error::new(Kind::Exists, format!("private pool {} exists", spec.name)));
        }
        if table.len() >= POOLS_MAX {
            return Err(Error::new(Kind::Quota, format!("there are {POOLS_MAX} private pools already")));
        }
        // A pool for containers is root's, and its tenant is not: it shares no workers.
        let share = !spec.fixed;
        // More queues than devices: disks that were replaced and are still open count too.
        let disks = if share { 3 * spec.max + 32 } else { 3 * spec.max + 128 };
        let (context, backend, workers) =
            self.resources.start(&spec.name, spec.uid, disks, share, spec.backend)?;
        let mut allocator = DiskAllocator::new(context, backend, spec.uid, workers);
        allocator.notices = self.notices.clone();
        let pool = Pool::start(spec.clone(), allocator, self.quotas.clone())?;
        if spec.fixed {
            pool.create_all().inspect_err(|_| pool.end(true))?;
        }
        pool.watch(Arc::new(RemoveOnEnd(self.table.clone())));
        table.insert(spec.name.clone(), pool.clone());
        Ok(pool)
    }

    /// Listens on a socket for changes of disks of the kernel's loop driver: without it, pools poll.
    /// The thread does not end.
    pub fn listen(self: &Arc<Pools>, events: OwnedFd) -> Result<()> {
        let pools = Arc::downgrade(self);
        let thread = std::thread::Builder::new().name("loop-events".into());
        let started = thread.spawn(move || {
            loop {
                let changed = uevent::next_changed_disk(events.as_fd());
                let Some(pools) = pools.upgrade() else { return };
                match changed {
                    Ok(disk) => pools.report(disk.as_deref()),
                    Err(error) => {
                        pools.notices.reporting.store(false, Relaxed);
                        return tracing::warn!(%error, "the kernel's events of loop devices end");
                    }
                }
            }
        });
        started.map_err(|error| Error::os(error, "cannot start a thread"))?;
        self.notices.reporting.store(true, Relaxed);
        Ok(())
    }

    /// A disk has changed. None: perhaps all have.
    fn report(&self, disk: Option<&str>) {
        let number = match disk.map(BackendKind::of_disk) {
            Some(Some((BackendKind::Loop, number))) => Some(number),
            Some(_) => return,
            None => None,
        };
        for pool in self.all() {
            pool.report_change(number);
        }
    }

    /// All pools, by name.
    pub fn all(&self) -> Vec<Arc<Pool>> {
        self.table.lock().values().cloned().collect()
    }

    /// How many private devices users may have.
    pub fn quotas(&self) -> &Quotas {
        &self.quotas
    }

    /// Forbids images on the file system with this device number while the result lives.
    pub fn exclude_images_on(&self, dev: u64) -> ExcludedFileSystem {
        self.resources.exclude_images_on(dev)
    }
}

impl Companion for Pools {
    fn bound_nodes(&self) -> Vec<PathBuf> {
        let entries = self.all().into_iter().flat_map(|pool| pool.entries());
        entries
            .filter(|entry| entry.bound.is_some())
            .flat_map(|entry| Disks::numbered(entry.rdev).nodes())
            .collect()
    }

    /// Many pools at a time: one may hang.
    fn end(&self) {
        let pools = Arc::new(Mutex::new(self.all()));
        let (done, is_done) = mpsc::channel::<()>();
        for _ in 0..ENDED_IN_PARALLEL.min(lock(&pools).len()) {
            let (pools, done) = (Arc::clone(&pools), done.clone());
            let end = move || {
                let next = || lock(&pools).pop();
                while let Some(pool) = next() {
                    pool.end(true);
                }
                drop(done);
            };
            if let Err(error) = std::thread::Builder::new().name("pool-end".into()).spawn(end) {
                tracing::warn!(%error, "cannot start a thread to end private pools");
            }
        }
        drop(done);
        // Nothing is sent: the channel disconnects when all threads have ended.
        if let Err(RecvTimeoutError::Timeout) = is_done.recv_timeout(END_MAX) {
            tracing::warn!("some private pools did not end in time; the next daemon removes their disks");
        }
    }

    fn update_nodes(&self) {
        self.all().iter().for_each(|pool| pool.withdraw_gone_stacks());
    }
}
