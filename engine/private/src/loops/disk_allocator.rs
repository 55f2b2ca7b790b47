// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Allocates the disks of one pool, and replaces used ones.
//!
//! Knows which disks there are, and which are free; `ublk` and `kernel_loop` know how their drivers
//! start and stop one. Does not know numbers, files or limits. A
//! disk that somebody may have open is never bound again: another disk replaces it and takes over
//! its device number. So no cached page, and no name that somebody kept, leads from one file to the
//! next, or from one tenant to another.

mod kernel_loop;
mod ublk;

use std::collections::BTreeMap;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use super::deletion_queue::DeletionQueue;
use super::file_closer::FileCloser;
use super::name_watcher::{NameWatch, Notices};
use super::pool_disk::{DiskServer, PoolDisk};
use super::{Answer, errno};
use crate::error::{Error, Kind, Result};
use crate::frontend::kernel_loop::PrivateLoop;
use crate::frontend::{Backend, StopMode};
use crate::image::Image;
use crate::instance::instance::EngineContext;
use crate::instance::pool_workers::PoolWorkers;
use crate::instance::served::Served;

/// Logical block size of a disk, unless another is asked for.
const DEFAULT_BLOCK_SIZE: u32 = 512;
/// Its slot on the workers stays taken: requests of it may still be in flight.
const CANNOT_RELEASE: &str = "cannot release the queues of a disk";

/// Disks on the free list of a pool whose disks may have any number.
const FREE_LIST_MAX: usize = 2;

/// Allocates disks for one pool.
#[derive(Debug)]
pub struct DiskAllocator {
    shared: EngineContext,
    backend: Backend,
    /// The user of the pool.
    uid: u32,
    workers: PoolWorkers,
    /// Replaced disks that the driver has not deleted yet.
    pub(super) deletion_queue: DeletionQueue,
    /// A disk that is not started yet. To replace a disk is the only way to learn whether it is in
    /// use, and is attempted often.
    prepared: Mutex<Option<Served>>,
    /// All started disks by device number, with the device of the kernel's loop driver.
    started: Mutex<BTreeMap<u64, Option<Arc<PrivateLoop>>>>,
    /// The last device of each disk of the kernel's loop driver: a process may open a number after
    /// the device got another disk.
    last_devices: Mutex<BTreeMap<u64, u32>>,
    /// Each disk of a partition holds a reference, which bounds their number.
    pub(super) partitions: Arc<()>,
    /// Unused disks that keep their device numbers.
    free_list: Mutex<Vec<PoolDisk>>,
    /// The device numbers of all disks, if they must not change.
    fixed: OnceLock<Vec<u64>>,
    closer: FileCloser,
    pub(super) notices: Notices,
}

/// Why a disk was not replaced.
#[derive(Debug)]
pub enum NotReplaced {
    /// Somebody has it open.
    InUse(PoolDisk),
    /// It stopped, and no replacement started.
    Lost(Error),
}

impl DiskAllocator {
    /// Creates the allocator of a pool with these workers.
    pub fn new(shared: EngineContext, backend: Backend, uid: u32, workers: PoolWorkers) -> DiskAllocator {
        DiskAllocator {
            shared,
            backend,
            uid,
            deletion_queue: DeletionQueue::new(Arc::clone(workers.slots())),
            workers,
            prepared: Mutex::default(),
            started: Mutex::default(),
            last_devices: Mutex::default(),
            partitions: Arc::default(),
            free_list: Mutex::default(),
            fixed: OnceLock::new(),
            closer: FileCloser::default(),
            notices: Notices::default(),
        }
    }

    /// Watches the name of a bound file.
    pub fn watch_name(&self, file: BorrowedFd<'_>) -> Option<NameWatch> {
        self.notices.names.as_ref()?.watch(file, &self.notices.waker)
    }

    /// Shares the limit of closing files with the user's other pools.
    pub fn set_closer(&mut self, closer: FileCloser) {
        self.closer = closer;
    }

    /// Drops the holder of a backing file on another thread.
    pub fn close(&self, holder: impl Send + 'static) {
        self.closer.close(holder);
    }

    /// Whether the user has too many files that do not close.
    pub fn has_too_many_closing(&self) -> bool {
        self.closer.is_full()
    }

    /// Allocates `disks` disks. From now on no disk gets another device number.
    pub fn preallocate(&self, disks: usize) -> Result<()> {
        let made = (0..disks).map(|_| self.new_disk()).collect::<Result<Vec<_>>>();
        // The free list is a stack: the lowest number comes last.
        let mut made = made?;
        made.sort_by_key(|disk| std::cmp::Reverse(disk.rdev));
        let mut numbers: Vec<u64> = made.iter().map(|disk| disk.rdev).collect();
        numbers.reverse();
        self.free_list().extend(made);
        self.fixed
            .set(numbers)
            .map_err(|_| Error::new(Kind::Internal, "the disks of a pool are allocated twice"))
    }

    /// The device numbers of all disks, if they must not change.
    pub fn fixed(&self) -> Option<&[u64]> {
        self.fixed.get().map(Vec::as_slice)
    }

    /// The state that all pools and instances share.
    pub fn shared(&self) -> &EngineContext {
        &self.shared
    }

    /// Whether the kernel's loop driver serves the disks. Direct I/O is then used only on request:
    /// all disks on a file share its page cache.
    pub fn is_kernel_loop(&self) -> bool {
        matches!(self.backend, Backend::Loop)
    }

    /// Allocates a disk without a size.
    pub fn allocate(&self) -> Result<PoolDisk> {
        if !self.is_kernel_loop() {
            return self.allocate_ublk(self.default_shape());
        }
        let free = self.free_list().pop();
        free.map_or_else(|| self.new_disk(), Ok)
    }

    /// Allocates a disk that serves an image. `read_only` and `closed` both refuse writes from the
    /// start; `closed` is temporary.
    pub fn allocate_bound(&self, image: Image, read_only: bool, closed: bool) -> Answer<PoolDisk> {
        if self.is_kernel_loop() {
            return self.allocate_loop(image).map_err(|error| errno(&error));
        }
        let disk = self.allocate_ublk(self.shape_for(&image)).map_err(|error| errno(&error))?;
        if let Err(error) = disk.bind(image, read_only, closed) {
            if let Err(disk) = self.free(disk) {
                tracing::error!(rdev = disk.rdev, "cannot remove a disk that was not bound");
            }
            return Err(error);
        }
        Ok(disk)
    }

    fn new_disk(&self) -> Result<PoolDisk> {
        match self.is_kernel_loop() {
            true => self.allocate_loop(Image::empty(DEFAULT_BLOCK_SIZE)?),
            false => self.new_ublk(self.default_shape()),
        }
    }

    /// Replaces a disk that nobody has open by a new one without a size.
    pub fn replace(&self, disk: PoolDisk) -> std::result::Result<PoolDisk, NotReplaced> {
        match self.is_kernel_loop() {
            true => self.replace_loop(disk),
            false => self.replace_with(disk, self.default_shape()),
        }
    }

    /// Removes a used disk, if nobody has it open. A few are replaced instead, and kept on the free
    /// list.
    pub fn retire(&self, disk: PoolDisk) -> std::result::Result<(), PoolDisk> {
        if self.fixed().is_none() && self.free_list().len() >= FREE_LIST_MAX {
            return self.remove(disk, StopMode::IfUnusedNow);
        }
        match self.replace(disk) {
            Ok(free) => self.keep(free),
            Err(NotReplaced::InUse(disk)) => return Err(disk),
            Err(NotReplaced::Lost(error)) => tracing::error!(%error, "cannot replace a disk: it is lost"),
        }
        Ok(())
    }

    /// Whether a started disk has this device number.
    pub fn has_started(&self, rdev: u64) -> bool {
        lock(&self.started).contains_key(&rdev)
    }

    /// Whether the disk with this device number still has its file: see [`PoolDisk::is_intact`].
    pub fn is_intact(&self, rdev: u64) -> bool {
        let device = lock(&self.started).get(&rdev).cloned().flatten();
        device.is_none_or(|device| device.is_bound())
    }

    /// Frees a disk that was allocated and never bound.
    pub fn free(&self, disk: PoolDisk) -> std::result::Result<(), PoolDisk> {
        if self.fixed().is_none() {
            return self.remove(disk, StopMode::Always);
        }
        self.retire(disk)
    }

    /// Stops and deletes a disk.
    pub fn remove(&self, disk: PoolDisk, when: StopMode) -> std::result::Result<(), PoolDisk> {
        let DiskServer::Ublk(served) = &disk.server else { return self.remove_loop(disk, when) };
        match served.stop(when) {
            Ok(()) => {
                lock(&self.started).remove(&disk.rdev);
                self.release(served);
                self.close(disk);
                Ok(())
            }
            Err(error) => {
                tracing::debug!(%error, "a disk is not removed");
                Err(disk)
            }
        }
    }

    /// Puts a disk on the free list: unbound and closed.
    pub fn keep(&self, disk: PoolDisk) {
        self.free_list().push(disk);
    }

    fn free_list(&self) -> MutexGuard<'_, Vec<PoolDisk>> {
        lock(&self.free_list)
    }

    /// Removes all unused disks. To be called last. Of two concurrent callers neither returns
    /// before all disks are removed: the daemon may end then.
    pub fn end(&self) {
        let mut free_list = self.free_list();
        for free in free_list.drain(..) {
            if let Err(free) = self.remove(free, StopMode::Always) {
                tracing::error!(rdev = free.rdev, "cannot remove a free disk");
            }
        }
        drop(free_list);
        self.deletion_queue.drain_in_parallel();
        let mut prepared = self.prepared();
        prepared.take().iter().for_each(|served| self.discard(served));
    }

    fn prepared(&self) -> MutexGuard<'_, Option<Served>> {
        lock(&self.prepared)
    }

    fn discard(&self, served: &Served) {
        match served.stop(StopMode::Always) {
            Ok(()) => self.release(served),
            Err(error) => tracing::error!(%error, "cannot remove a disk"),
        }
    }

    fn release(&self, served: &Served) {
        match served.release() {
            Ok(()) => self.workers.slots().free(served.slot()),
            Err(error) => tracing::error!(%error, "{CANNOT_RELEASE}"),
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
