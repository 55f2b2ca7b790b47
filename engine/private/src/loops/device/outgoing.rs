// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Replaced disks of a loopN, which somebody may still have open.
//!
//! LOOP_CLR_FD gives the device another disk at once, for the next open. The old disk serves those
//! who have it open until their last close. If others than the caller have it open, the device gets
//! it back. Knows one device. Does not know how the driver removes a disk (`disk_allocator`).

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{OPEN_GRACE, PoolDevice, RelatedNumbers};
use crate::frontend::StopMode;
use crate::loops::disk_allocator::DiskAllocator;
use crate::loops::file_binding::FileBinding;
use crate::loops::partition_disk::PartitionDisk;
use crate::loops::pool_disk::PoolDisk;
use crate::loops::{Answer, flag};

/// How long a device counts as unbound after LOOP_CLR_FD although it may be open: the caller has it
/// open, and closes it next.
const REBIND_AFTER: Duration = Duration::from_secs(1);
/// Maximum number of outgoing disks of a device.
const MAX: usize = 16;
/// How long LOOP_CLR_FD waits for a free disk, in a pool with a fixed set.
const DISK_TIMEOUT: Duration = Duration::from_millis(300);
const INTERVAL: Duration = Duration::from_millis(2);

/// A replaced disk.
#[derive(Debug)]
pub(super) struct OutgoingDisk {
    pub(super) disk: PoolDisk,
    pub(super) binding: Option<FileBinding>,
    partitions: Vec<PartitionDisk>,
    since: Instant,
    /// The generation of the device while this was its disk.
    generation: u64,
    /// The count token, if it was the disk of a partition.
    of_partition: Option<Arc<()>>,
}

impl OutgoingDisk {
    /// A disk without a binding to keep.
    pub(super) fn unbound(disk: PoolDisk) -> OutgoingDisk {
        let since = Instant::now();
        OutgoingDisk { disk, binding: None, partitions: Vec::new(), since, generation: 0, of_partition: None }
    }

    /// The disk of a partition.
    pub(super) fn of_partition(part: PartitionDisk) -> OutgoingDisk {
        let (disk, count_token) = part.into_disk();
        OutgoingDisk { of_partition: Some(count_token), ..OutgoingDisk::unbound(disk) }
    }

    /// Whether opens that follow lookups before the replacement are over.
    fn may_release(&self) -> bool {
        self.since.elapsed() >= OPEN_GRACE
    }
}

impl PoolDevice {
    /// LOOP_CLR_FD.
    pub fn clear(&mut self, allocator: &DiskAllocator) -> Answer<()> {
        self.bound()?;
        let claimed = self.is_claimed()?;
        if let Some(binding) = &mut self.binding {
            binding.info.flags |= flag::AUTOCLEAR;
        }
        // Otherwise it is unbound at the last close.
        if !claimed && let Some(next) = self.wait_for_disk(allocator) {
            self.outgoing.extend(self.cleared.take());
            self.cleared = self.swap_disk(next);
        }
        // The caller's close is the last one, if nobody else has it open.
        self.apply_autoclear();
        self.cleared.iter().for_each(|was| was.disk.set_autoclear(true));
        self.in_rundown = self.binding.is_some();
        Ok(())
    }

    /// Whether LOOP_CLR_FD has replaced its disk, which may still be open.
    pub fn is_cleared(&self) -> bool {
        self.cleared.is_some()
    }

    fn wait_for_disk(&mut self, allocator: &DiskAllocator) -> Option<PoolDisk> {
        let until = Instant::now() + DISK_TIMEOUT;
        loop {
            self.release_outgoing(allocator, DISK_TIMEOUT);
            let made = if self.outgoing.len() < MAX { allocator.allocate().ok() } else { None };
            if made.is_some() || self.outgoing.is_empty() || Instant::now() >= until {
                return made;
            }
            std::thread::sleep(INTERVAL);
        }
    }

    /// Replaces its disk by an unbound one. Returns the old disk.
    pub(super) fn swap_disk(&mut self, next: PoolDisk) -> Option<OutgoingDisk> {
        let generation = self.generation;
        self.bump_generation();
        let (binding, partitions) = (self.binding.take(), std::mem::take(&mut self.partitions));
        let since = Instant::now();
        let old = self.disk.replace(next);
        old.map(|disk| OutgoingDisk { disk, binding, partitions, since, generation, of_partition: None })
    }

    /// Device numbers of its outgoing disks, and of its present and former partitions.
    pub fn related_numbers(&self) -> RelatedNumbers {
        let outgoing = || self.outgoing.iter().chain(&self.cleared);
        let (partitions, disks): (Vec<_>, Vec<_>) =
            outgoing().partition(|outgoing| outgoing.of_partition.is_some());
        let present = self.partitions.iter().chain(outgoing().flat_map(|outgoing| &outgoing.partitions));
        let rdev = |outgoing: &OutgoingDisk| outgoing.disk.rdev;
        RelatedNumbers {
            outgoing: disks.into_iter().map(rdev).collect(),
            partitions: partitions
                .into_iter()
                .map(rdev)
                .chain(present.map(|part| part.disk().rdev))
                .collect(),
        }
    }

    /// Releases outgoing disks that nobody has open, within a time limit. The next call begins with
    /// those that this one does not reach.
    pub(super) fn release_outgoing(&mut self, allocator: &DiskAllocator, within: Duration) {
        let start = Instant::now();
        let mut waiting = std::mem::take(&mut self.outgoing).into_iter();
        let mut kept = Vec::new();
        for outgoing in waiting.by_ref() {
            kept.extend(self.release(outgoing, allocator));
            if start.elapsed() >= within {
                break;
            }
        }
        // Partitions of the released disks.
        let partitions = std::mem::take(&mut self.outgoing);
        self.outgoing = waiting.chain(partitions).chain(kept).collect();
    }

    fn release(&mut self, outgoing: OutgoingDisk, allocator: &DiskAllocator) -> Option<OutgoingDisk> {
        if !outgoing.may_release() {
            return Some(outgoing);
        }
        let OutgoingDisk { disk, binding, partitions, since, generation, of_partition } = outgoing;
        match allocator.retire(disk) {
            Ok(()) => {
                self.outgoing.extend(partitions.into_iter().map(OutgoingDisk::of_partition));
                allocator.close(binding);
                None
            }
            Err(disk) => {
                disk.set_autoclear(true);
                Some(OutgoingDisk { disk, binding, partitions, since, generation, of_partition })
            }
        }
    }

    /// Releases the disk that LOOP_CLR_FD replaced, if nobody has it open.
    pub(super) fn release_cleared(&mut self, allocator: &DiskAllocator) {
        let Some(was) = self.cleared.take() else { return };
        self.cleared = self.release(was, allocator);
    }

    /// Whether the disk that LOOP_CLR_FD replaced is still open after [`REBIND_AFTER`].
    pub fn should_rebind(&self) -> bool {
        let long_ago = |was: &OutgoingDisk| was.since.elapsed() >= REBIND_AFTER;
        self.binding.is_none() && self.cleared.as_ref().is_some_and(long_ago)
    }

    /// Takes back the disk that LOOP_CLR_FD replaced, if it is still open. Nobody may be about to
    /// open the present one: a process that expects a free device must not open a bound one.
    pub fn rebind_cleared(&mut self, allocator: &DiskAllocator) {
        self.release_cleared(allocator);
        let Some(was) = self.cleared.take() else { return };
        let unused = self.disk.replace(was.disk);
        (self.binding, self.partitions) = (was.binding, was.partitions);
        self.in_rundown = true;
        self.outgoing.extend(unused.map(OutgoingDisk::unbound));
        // The same disk with the same file: its names and descriptors are valid again.
        self.generation = was.generation;
    }

    /// Gives the caller of LOOP_CLR_FD time to close the device, at most `within`. True: nobody has
    /// the replaced disk open, and the device is free.
    pub fn finish_clear(&mut self, allocator: &DiskAllocator, within: Duration) -> bool {
        let early = self.cleared.as_ref().and_then(|was| OPEN_GRACE.checked_sub(was.since.elapsed()));
        early.into_iter().for_each(|early| std::thread::sleep(early.min(within)));
        self.release_cleared(allocator);
        self.is_free()
    }

    /// Makes partitions of outgoing disks outgoing disks of their own.
    pub(super) fn split_outgoing(&mut self) {
        let partitions: Vec<_> =
            self.outgoing.iter_mut().flat_map(|outgoing| std::mem::take(&mut outgoing.partitions)).collect();
        self.outgoing.extend(partitions.into_iter().map(OutgoingDisk::of_partition));
    }

    /// Removes the outgoing disks that can be removed.
    pub(super) fn end_outgoing(&mut self, when: StopMode, allocator: &DiskAllocator) {
        self.outgoing.extend(self.cleared.take());
        self.split_outgoing();
        for OutgoingDisk { disk, binding, partitions, since, generation, of_partition } in
            std::mem::take(&mut self.outgoing)
        {
            match allocator.remove(disk, when) {
                Ok(()) => allocator.close(binding),
                Err(disk) => {
                    self.outgoing.push(OutgoingDisk {
                        disk,
                        binding,
                        partitions,
                        since,
                        generation,
                        of_partition,
                    });
                }
            }
        }
    }
}
