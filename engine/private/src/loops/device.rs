// SPDX-License-Identifier: Apache-2.0 OR MIT
//! One loopN: its backing file, its disk, and the operations of loop(4) on it.
//!
//! Knows one device. Does not know numbers, limits and watchers (the pool does), nor when its last
//! user closes it (the close watcher does).

mod exchange;
mod outgoing;
mod partitions;
mod reset;
mod shadows;

use std::time::{Duration, Instant};

use super::disk_allocator::{DiskAllocator, NotReplaced};
use super::file_binding::{FileBinding, check_info};
use super::partition_disk::{self, PartitionDisk};
use super::pool_disk::PoolDisk;
use super::quota::Charge;
use super::shadow_disk::ShadowDisk;
use super::{Answer, DeviceEntry, Errno, LoopCaller, LoopConfig, LoopInfo, LoopStatus, flag};
use crate::frontend::StopMode;
use outgoing::OutgoingDisk;

/// The state of one loopN.
#[derive(Debug)]
pub struct PoolDevice {
    pub(super) number: u32,
    /// None: the kernel has no disk for it, after a failure.
    pub(super) disk: Option<PoolDisk>,
    pub(super) binding: Option<FileBinding>,
    pub(super) partitions: Vec<PartitionDisk>,
    /// Mounted by the kernel for the tenant; the device is read-only meanwhile.
    pub(super) shadows: Vec<ShadowDisk>,
    /// Its disk until LOOP_CLR_FD. It is its disk again, if it has other users than the caller.
    cleared: Option<OutgoingDisk>,
    /// It is bound after LOOP_CLR_FD, for those who have it open.
    in_rundown: bool,
    /// Replaced disks that somebody has open.
    outgoing: Vec<OutgoingDisk>,
    generation: u64,
    /// The highest generation so far: a device may get an earlier disk again.
    last_generation: u64,
    /// Charged to the user.
    _charge: Charge,
}

/// A process opens a device number within this time after its lookup.
pub(super) const OPEN_GRACE: Duration = Duration::from_millis(15);

/// Device numbers that belong to a device beside that of its disk.
#[derive(Debug, Default)]
pub(super) struct RelatedNumbers {
    /// Of outgoing disks.
    pub(super) outgoing: Vec<u64>,
    /// Of present and former partitions.
    pub(super) partitions: Vec<u64>,
}

/// How long an operation waits for others to close a disk that it replaces: udev or lsblk of the host have
/// it open for a moment.
const CLOSE_TIMEOUT: Duration = Duration::from_millis(300);
const CLOSE_INTERVAL: Duration = Duration::from_millis(5);
/// How long one poll of the close watcher releases outgoing disks of one device.
const RELEASE_TIMEOUT: Duration = Duration::from_millis(200);

impl PoolDevice {
    /// Creates an unbound device.
    pub fn new(number: u32, disk: PoolDisk, generation: u64, charge: Charge) -> PoolDevice {
        PoolDevice {
            number,
            disk: Some(disk),
            binding: None,
            partitions: Vec::new(),
            shadows: Vec::new(),
            cleared: None,
            in_rundown: false,
            outgoing: Vec::new(),
            generation,
            last_generation: generation,
            _charge: charge,
        }
    }

    /// For listings and sysfs.
    pub fn entry(&self) -> Option<DeviceEntry> {
        let disk = self.disk.as_ref()?;
        let bound = self.bound().ok().map(FileBinding::to_bound);
        Some(DeviceEntry {
            number: self.number,
            rdev: disk.rdev,
            generation: self.generation,
            size: disk.size(),
            block_size: disk.block_size(),
            partitions: bound.iter().flat_map(|_| &self.partitions).map(PartitionDisk::entry).collect(),
            bound,
        })
    }

    /// Whether it is bound, as users see it.
    pub fn is_bound(&self) -> bool {
        self.binding.is_some()
    }

    /// Whether it can be bound at once.
    pub fn is_free(&self) -> bool {
        self.binding.is_none() && self.disk.is_some() && self.cleared.is_none()
    }

    /// Whether the close watcher must poll it.
    pub fn awaits_close(&self) -> bool {
        self.has_others() || self.is_autoclear()
    }

    /// Whether only a poll detects its last close. `reports`: the driver reports that of its own disk,
    /// but not what other disks of this device have.
    pub fn needs_poll(&self, reports: bool) -> bool {
        let reported = reports && self.is_autoclear() && self.partitions.is_empty() && !self.has_others();
        self.awaits_close() && !reported
    }

    /// Whether it has disks beside the one that is bound, which end with their last close.
    fn has_others(&self) -> bool {
        self.is_cleared() || !self.outgoing.is_empty() || !self.shadows.is_empty()
    }

    /// Whether it is between LOOP_CLR_FD and the last close: bound only for those who have it open.
    pub fn is_in_rundown(&self) -> bool {
        self.in_rundown && self.is_autoclear()
    }

    /// Whether the last close unbinds it.
    pub fn is_autoclear(&self) -> bool {
        self.binding.as_ref().is_some_and(|binding| autoclears(&binding.info))
    }

    /// Tells the kernel's driver whether the last close unbinds it. A mount of it by the kernel, or of
    /// a partition, has another disk open.
    pub fn apply_autoclear(&self) {
        let mounted = || !self.shadows.is_empty() || self.partitions.iter().any(PartitionDisk::is_claimed);
        let autoclear = self.is_autoclear() && !mounted();
        self.disk.iter().for_each(|disk| disk.set_autoclear(autoclear));
    }

    /// Whether its last close may have unbound it.
    pub fn may_be_unused(&self) -> bool {
        self.disk.as_ref().is_some_and(PoolDisk::may_be_unused)
    }

    /// Whether its disk has lost its file: see [`PoolDisk::is_intact`].
    pub fn has_lost_file(&self) -> bool {
        self.disk.as_ref().is_some_and(|disk| !disk.is_intact())
    }

    /// The number of its disks.
    pub fn disks(&self) -> usize {
        let outgoing = self.outgoing.len() + usize::from(self.is_cleared());
        outgoing + self.partitions.len() + self.shadows.len() + usize::from(self.disk.is_some())
    }

    /// The block device that backs it, if one does.
    pub fn backing_device(&self) -> Option<u64> {
        self.binding.as_ref().map(FileBinding::rdevice).filter(|rdev| *rdev != 0)
    }

    pub(super) fn bound(&self) -> Answer<&FileBinding> {
        self.binding.as_ref().ok_or(Errno::NXIO)
    }

    pub(super) fn disk(&self) -> Answer<&PoolDisk> {
        self.disk.as_ref().ok_or(Errno::IO)
    }

    /// LOOP_CONFIGURE.
    pub fn configure(
        &mut self,
        with: LoopConfig,
        caller: &dyn LoopCaller,
        allocator: &DiskAllocator,
    ) -> Answer<()> {
        if self.is_bound() {
            tracing::debug!(number = self.number, in_rundown = self.in_rundown, "cannot bind a bound device");
            return Err(Errno::BUSY);
        }
        let (binding, image) = FileBinding::open(with, caller.can_write(), self.number, allocator)?;
        if !caller.is_waiting() {
            return Err(Errno::INTR);
        }
        let read_only = binding.read_only();
        self.drop_partitions();
        let partitions = match binding.info.flags & flag::PARTSCAN {
            0 => Vec::new(),
            _ => partition_disk::create_all(
                &binding,
                &partition_disk::read(&image),
                self.generation,
                allocator,
            ),
        };
        let disk = self.disk()?;
        let bound = if disk.can_bind(allocator.shape_for(&image)) {
            disk.bind(image, read_only, false).inspect_err(|_| disk.unbind())
        } else {
            // The caller gets another disk under the same name.
            let disk = allocator.allocate_bound(image, read_only, false);
            disk.and_then(|disk| self.exchange_disk(disk, caller, allocator))
        };
        if let Err(error) = bound {
            self.outgoing.extend(partitions.into_iter().map(OutgoingDisk::of_partition));
            return Err(error);
        }
        self.partitions = partitions;
        self.binding = Some(binding);
        self.apply_autoclear();
        self.in_rundown = false;
        self.outgoing.extend(self.cleared.take());
        Ok(())
    }

    /// Replaces the disk by another, and the caller's descriptor with it. Without a descriptor,
    /// this fails if anybody has the old disk open.
    fn exchange_disk(
        &mut self,
        disk: PoolDisk,
        caller: &dyn LoopCaller,
        allocator: &DiskAllocator,
    ) -> Answer<()> {
        let given = match caller.has_descriptor() {
            true => disk.open(caller.can_write()).and_then(|file| caller.replace_descriptor(file)),
            false => self.replace_disk_when_closed(allocator),
        };
        if let Err(error) = given {
            if let Err(disk) = allocator.free(disk) {
                self.outgoing.push(OutgoingDisk::unbound(disk));
            }
            return Err(error);
        }
        let old = self.swap_disk(disk);
        self.outgoing.extend(old);
        Ok(())
    }

    /// LOOP_GET_STATUS64.
    pub fn status(&self) -> Answer<LoopStatus> {
        let binding = self.bound()?;
        let (device, inode, rdevice) = binding.stat_numbers();
        Ok(LoopStatus { number: self.number, device, inode, rdevice, info: binding.info })
    }

    /// LOOP_SET_STATUS64.
    pub fn set_status(
        &mut self,
        info: &LoopInfo,
        caller: &dyn LoopCaller,
        allocator: &DiskAllocator,
    ) -> Answer<()> {
        check_may_change(caller)?;
        let old = self.bound()?.info;
        let mut new = LoopInfo { flags: old.flags, ..check_info(info)? };
        // AUTOCLEAR can be set and cleared, PARTSCAN only set.
        new.flags = new.flags & !flag::AUTOCLEAR | info.flags & (flag::AUTOCLEAR | flag::PARTSCAN);
        let same = (new.offset, new.size_limit) == (old.offset, old.size_limit);
        if !self.shadows.is_empty() && !same {
            return Err(Errno::BUSY);
        }
        if same {
            if let Some(binding) = &mut self.binding {
                binding.info = new;
            }
        } else {
            self.set_range(new, caller)?;
        }
        self.apply_autoclear();
        if info.flags & flag::PARTSCAN != 0 && self.shadows.is_empty() {
            self.try_rescan(allocator);
        }
        Ok(())
    }

    /// Whether it, or a partition of it, is mounted or open with O_EXCL.
    pub(super) fn is_claimed(&self) -> Answer<bool> {
        let mounted = !self.shadows.is_empty();
        Ok(mounted || self.disk()?.is_claimed() || self.partitions.iter().any(PartitionDisk::is_claimed))
    }

    /// LOOP_SET_CAPACITY.
    pub fn set_capacity(&mut self, caller: &dyn LoopCaller) -> Answer<()> {
        check_may_change(caller)?;
        self.bound()?;
        self.disk()?.resize_to_file()?;
        self.shadows.iter().try_for_each(ShadowDisk::resize_to_file)
    }

    /// LOOP_SET_DIRECT_IO.
    pub fn set_direct_io(&mut self, on: bool, caller: &dyn LoopCaller) -> Answer<()> {
        check_may_change(caller)?;
        let possible = self.bound()?.is_direct();
        self.disk()?.set_direct_io(on, possible)?;
        if let Some(binding) = &mut self.binding {
            let flags = &mut binding.info.flags;
            *flags = if on { *flags | flag::DIRECT_IO } else { *flags & !flag::DIRECT_IO };
        }
        Ok(())
    }

    /// Releases replaced and shadow disks that nobody has open any more.
    pub fn release_unused(&mut self, allocator: &DiskAllocator) {
        // Operations wait for the lock meanwhile, and a hundred partitions take seconds.
        self.release_outgoing(allocator, RELEASE_TIMEOUT);
        self.release_cleared(allocator);
        self.release_shadows(allocator);
    }

    /// The same as `replace_disk`, but waits for a moment.
    fn replace_disk_when_closed(&mut self, allocator: &DiskAllocator) -> Answer<()> {
        let until = Instant::now() + CLOSE_TIMEOUT;
        loop {
            match self.replace_disk(allocator) {
                Err(Errno::BUSY) if Instant::now() < until => std::thread::sleep(CLOSE_INTERVAL),
                replaced => return replaced,
            }
        }
    }

    /// Replaces its disk by a new one without a size, if nobody has it open.
    fn replace_disk(&mut self, allocator: &DiskAllocator) -> Answer<()> {
        let disk = self.disk.take().ok_or(Errno::IO)?;
        match allocator.replace(disk) {
            Ok(next) => {
                self.disk = Some(next);
                Ok(())
            }
            Err(NotReplaced::InUse(disk)) => {
                self.disk = Some(disk);
                Err(Errno::BUSY)
            }
            Err(NotReplaced::Lost(error)) => {
                tracing::error!(%error, number = self.number, "cannot replace the disk of a loop device: it is lost");
                self.disk = allocator.allocate().ok();
                self.disk.as_ref().map(drop).ok_or(Errno::IO)
            }
        }
    }

    /// Names of the old disk must not open the new one.
    fn bump_generation(&mut self) {
        self.last_generation += 1;
        self.generation = self.last_generation;
    }

    /// Unbinds it, if nobody has it open.
    pub fn unbind(&mut self, allocator: &DiskAllocator) -> bool {
        let claimed = !self.shadows.is_empty() || self.partitions.iter().any(PartitionDisk::is_claimed);
        if self.disk.is_none() || claimed || self.replace_disk(allocator) == Err(Errno::BUSY) {
            return false;
        }
        self.drop_partitions();
        self.bump_generation();
        allocator.close(self.binding.take());
        true
    }

    /// Removes its disks. True: all are removed.
    pub fn end(&mut self, when: StopMode, allocator: &DiskAllocator) -> bool {
        if when == StopMode::Always || self.is_claimed() == Ok(false) {
            self.drop_partitions();
        }
        self.remove_shadows(when, allocator);
        self.end_outgoing(when, allocator);
        if let Some(disk) = self.disk.take() {
            match allocator.remove(disk, when) {
                Ok(()) => allocator.close(self.binding.take()),
                Err(disk) => self.disk = Some(disk),
            }
        }
        self.disk.is_none() && self.outgoing.is_empty() && self.shadows.is_empty()
    }

    /// Puts its disk on the free list, if it is unused.
    pub fn retire(&mut self, allocator: &DiskAllocator) -> Answer<()> {
        self.release_outgoing(allocator, Duration::MAX);
        if !self.outgoing.is_empty() || self.is_cleared() || self.binding.is_some() {
            return Err(Errno::BUSY);
        }
        if self.disk.is_some() && !self.unbind(allocator) {
            return Err(Errno::BUSY);
        }
        if let Some(disk) = self.disk.take() {
            allocator.keep(disk);
        }
        Ok(())
    }
}

fn autoclears(info: &LoopInfo) -> bool {
    info.flags & flag::AUTOCLEAR != 0
}

fn check_may_change(caller: &dyn LoopCaller) -> Answer<()> {
    if caller.can_write() || caller.is_admin() { Ok(()) } else { Err(Errno::PERM) }
}
