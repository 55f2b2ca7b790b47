// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The workers of private pools. Pools of one user share them.
//!
//! Pools of two users do not, and an image on which I/O may hang gets other workers: a file system can
//! delay all devices of a worker, if it blocks a submission or as many requests as io_uring has threads
//! for that worker. Knows how many disks a worker has space for. Does not know pools or disks.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use super::served::Workers;
use crate::error::{Error, Kind, Result};
use crate::frontend::FrontendQueue;
use crate::ring::{RingSizes, SlotAllocator, SlotId};
use crate::sys;
use crate::worker::{WorkerHandle, WorkerOptions};

/// Workers of a disk: two queues, so that the kernel gives it no scheduler.
const WORKERS: usize = 2;
/// Space for disks on shared workers.
const SHARED_SPACE: u32 = 16_384;

/// Workers with space for so many disks.
#[derive(Debug)]
struct WorkerSet {
    workers: Workers,
    slots: Arc<SlotAllocator>,
    space: u32,
    /// Space that pools have reserved.
    reserved: AtomicU32,
}

/// The shared workers, by user.
#[derive(Debug, Default)]
pub(super) struct SharedWorkers(Mutex<BTreeMap<u32, Vec<Weak<WorkerSet>>>>);

/// The workers of one pool.
#[derive(Debug)]
pub struct PoolWorkers {
    set: Arc<WorkerSet>,
    disks: u32,
    is_shared: bool,
    name: String,
    options: WorkerOptions,
    /// Those of images on which I/O may hang, while there are any.
    apart: Mutex<Option<Weak<[WorkerHandle<FrontendQueue>]>>>,
}

impl SharedWorkers {
    /// Reserves space for the disks of a pool of this user.
    pub(super) fn join(
        &self,
        uid: u32,
        name: &str,
        disks: u32,
        options: WorkerOptions,
    ) -> Result<PoolWorkers> {
        let options = WorkerOptions { blocking_sync: false, ..options };
        let mut table = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        table.retain(|_, sets| {
            sets.retain(|set| set.strong_count() > 0);
            !sets.is_empty()
        });
        let sets = table.entry(uid).or_default();
        // A machine with more CPUs has more workers before pools share them.
        let all_started = sets.len() >= (sys::allowed_cpus().len() / WORKERS).max(1);
        let with_space = sets.iter().filter_map(Weak::upgrade).filter(|set| set.free() >= disks);
        let set = match with_space.max_by_key(|set| set.free()).filter(|_| all_started) {
            Some(set) => set,
            None => {
                let set = WorkerSet::start(&format!("pools {uid}"), SHARED_SPACE.max(disks), options)?;
                sets.push(Arc::downgrade(&set));
                set
            }
        };
        Ok(PoolWorkers::new(set, true, name, disks, options))
    }
}

impl WorkerSet {
    fn start(name: &str, space: u32, options: WorkerOptions) -> Result<Arc<WorkerSet>> {
        let workers = start(name, space, options)?;
        Ok(Arc::new(WorkerSet { workers, slots: Arc::default(), space, reserved: AtomicU32::new(0) }))
    }

    fn free(&self) -> u32 {
        self.space.saturating_sub(self.reserved.load(Relaxed))
    }
}

fn start(name: &str, space: u32, options: WorkerOptions) -> Result<Workers> {
    let sizes = RingSizes::for_devices(space);
    let workers = (0..WORKERS)
        .map(|queue| WorkerHandle::start(format!("{name}/{queue}"), sizes, options, Vec::new()))
        .collect::<Result<Vec<_>>>()?;
    Ok(workers.into())
}

impl PoolWorkers {
    /// Starts workers for one pool.
    pub(super) fn start(name: &str, disks: u32, options: WorkerOptions) -> Result<PoolWorkers> {
        let set = WorkerSet::start(name, disks, options)?;
        Ok(PoolWorkers::new(set, false, name, disks, options))
    }

    /// Those of a pool whose disks the kernel serves.
    pub(super) fn none(name: &str, options: WorkerOptions) -> PoolWorkers {
        let set = WorkerSet {
            workers: Vec::new().into(),
            slots: Arc::default(),
            space: 0,
            reserved: AtomicU32::new(0),
        };
        PoolWorkers::new(Arc::new(set), false, name, 0, options)
    }

    fn new(
        set: Arc<WorkerSet>,
        is_shared: bool,
        name: &str,
        disks: u32,
        options: WorkerOptions,
    ) -> PoolWorkers {
        set.reserved.fetch_add(disks, Relaxed);
        PoolWorkers { set, disks, is_shared, name: name.to_owned(), options, apart: Mutex::default() }
    }

    /// Whether other pools have them, too. Then they serve no image on which I/O may hang.
    pub fn are_shared(&self) -> bool {
        self.is_shared
    }

    /// Workers for a disk. `may_hang`: I/O on its image may.
    pub fn of_disk(&self, may_hang: bool) -> Result<Workers> {
        if !self.is_shared || !may_hang {
            return Ok(self.set.workers.clone());
        }
        let mut apart = self.apart.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(workers) = apart.as_ref().and_then(Weak::upgrade) {
            return Ok(workers);
        }
        // A slot has one number on all workers of the pool.
        let workers = start(&self.name, self.set.space, self.options)?;
        *apart = Some(Arc::downgrade(&workers));
        Ok(workers)
    }

    /// Allocates a slot on its workers.
    pub fn allocate_slot(&self) -> Result<SlotId> {
        let slot = self.set.slots.allocate();
        if u32::from(slot.index) < self.set.space {
            return Ok(slot);
        }
        self.set.slots.free(slot);
        Err(Error::new(Kind::Quota, "the workers of the pool have no space for another disk"))
    }

    /// The slots on its workers.
    pub fn slots(&self) -> &Arc<SlotAllocator> {
        &self.set.slots
    }
}

impl Drop for PoolWorkers {
    fn drop(&mut self) {
        self.set.reserved.fetch_sub(self.disks, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OPTIONS: WorkerOptions =
        WorkerOptions { linked_commit: false, partscan: false, blocking_sync: true };

    #[test]
    fn only_pools_of_one_user_share_workers() {
        let shared = SharedWorkers::default();
        let join = |uid, disks| shared.join(uid, "pool", disks, OPTIONS);
        let cpus = sys::allowed_cpus().len();
        let first = match join(1, 40) {
            Ok(first) => first,
            Err(error) => return eprintln!("skipped: {error}"),
        };
        let more: Vec<PoolWorkers> = (0..cpus).map(|_| join(1, 40).unwrap()).collect();
        let other = join(2, 40).unwrap();
        let is_first = |pool: &PoolWorkers| Arc::ptr_eq(&pool.set, &first.set);
        assert!(more.iter().any(is_first) && !is_first(&other));
        assert!(shared.0.lock().unwrap()[&1].len() <= (cpus / WORKERS).max(1));
        // A full set is not joined.
        let full = join(1, SHARED_SPACE).unwrap();
        assert!(!is_first(&full) && !more.iter().any(|pool| Arc::ptr_eq(&pool.set, &full.set)));
        drop((first, more, full));
        drop(join(2, 40).unwrap());
        assert!(!shared.0.lock().unwrap().contains_key(&1), "workers stay without a pool");
    }

    #[test]
    fn io_that_may_hang_gets_other_workers_than_shared_ones() {
        let shared = match SharedWorkers::default().join(1, "pool", 4, OPTIONS) {
            Ok(shared) => shared,
            Err(error) => return eprintln!("skipped: {error}"),
        };
        let usual = shared.of_disk(false).unwrap();
        let apart = shared.of_disk(true).unwrap();
        assert!(!Arc::ptr_eq(&usual, &apart) && Arc::ptr_eq(&apart, &shared.of_disk(true).unwrap()));
        drop(apart);
        let apart = shared.apart.lock().unwrap().clone();
        assert!(apart.is_some_and(|apart| apart.upgrade().is_none()), "they stay without an image");
        let own = PoolWorkers::start("own", 4, OPTIONS).unwrap();
        assert!(Arc::ptr_eq(&own.of_disk(false).unwrap(), &own.of_disk(true).unwrap()));
        assert!((0..4).all(|_| own.allocate_slot().is_ok()) && own.allocate_slot().is_err());
    }
}
