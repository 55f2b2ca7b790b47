// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Deletes replaced disks in the background.
//!
//! A waiter for a last close waits for the replacement only: deletion at the driver takes as long
//! again. Knows neither pools nor backing files. No worker serves a disk that is queued here.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::pool_disk::DiskServer;
use crate::parallel::Helpers;
use crate::ring::SlotAllocator;

/// At most so many disks wait. Who adds one more deletes disks itself.
const WAITING_MAX: usize = 8;
/// Threads of this process that help pools to end. The driver takes some 40 ms for a disk, in which it
/// waits for others: many such waits take as long as one.
pub static END_HELPERS: Helpers = Helpers::new(64);

/// The disks of a pool that wait for their deletion.
#[derive(Clone, Debug)]
pub struct DeletionQueue(Arc<DeletionState>);

#[derive(Debug)]
struct DeletionState {
    slots: Arc<SlotAllocator>,
    waiting: Mutex<PendingDeletions>,
    /// Held while disks are deleted.
    working: Mutex<()>,
}

#[derive(Debug, Default)]
struct PendingDeletions {
    /// Stopped, removed from the workers, and without a file.
    disks: VecDeque<DiskServer>,
    /// A thread deletes them.
    has_thread: bool,
    /// The pool ends, and deletes them together.
    ending: bool,
}

impl DeletionQueue {
    /// Creates an empty queue, which frees the slots of deleted disks in `slots`.
    pub fn new(slots: Arc<SlotAllocator>) -> DeletionQueue {
        DeletionQueue(Arc::new(DeletionState { slots, waiting: Mutex::default(), working: Mutex::default() }))
    }

    /// Deletes a disk, now or soon.
    pub fn push(&self, disk: DiskServer) {
        let start = {
            let mut waiting = lock(&self.0.waiting);
            waiting.disks.push_back(disk);
            if waiting.ending {
                return;
            }
            let full = waiting.disks.len() > WAITING_MAX;
            (!std::mem::replace(&mut waiting.has_thread, true), full)
        };
        let delete_here = match start {
            (true, _) => {
                let other = self.clone();
                let thread = std::thread::Builder::new().name("disk-delete".into());
                thread.spawn(move || other.drain()).is_err()
            }
            (false, full) => full,
        };
        if delete_here {
            self.drain();
        }
    }

    /// From now on, disks wait for [`DeletionQueue::drain_in_parallel`].
    pub fn begin_end(&self) {
        lock(&self.0.waiting).ending = true;
    }

    /// Returns when the queue is empty.
    pub fn drain(&self) {
        loop {
            let _guard = lock(&self.0.working);
            let Some(disk) = self.next() else { return };
            self.delete(&disk);
        }
    }

    /// The same, with several threads: the daemon may end then.
    pub fn drain_in_parallel(&self) {
        let _guard = lock(&self.0.working);
        loop {
            let disks = Vec::from(std::mem::take(&mut lock(&self.0.waiting).disks));
            if disks.is_empty() {
                return;
            }
            END_HELPERS.for_each("disk-delete", &disks, |disk| self.delete(disk));
        }
    }

    fn next(&self) -> Option<DiskServer> {
        let mut waiting = lock(&self.0.waiting);
        let next = waiting.disks.pop_front();
        waiting.has_thread &= next.is_some();
        next
    }

    fn delete(&self, disk: &DiskServer) {
        match disk.delete() {
            Ok(()) => disk.slot().into_iter().for_each(|slot| self.0.slots.free(slot)),
            // Its slot on the workers stays taken, and so does its number.
            Err(error) => tracing::error!(%error, "cannot delete the used disk {}", disk.node().display()),
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn starts_no_thread_for_an_empty_queue() {
        let deletion_queue = DeletionQueue::new(Arc::default());
        deletion_queue.drain();
        assert!(!lock(&deletion_queue.0.waiting).has_thread);
    }
}
