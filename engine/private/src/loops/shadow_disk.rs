// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Devices that the kernel mounts, and their protection from writers meanwhile.
//!
//! A kernel file system trusts what it has read. So while one is mounted for a tenant, nobody may
//! change its bytes through loopN. The kernel mounts a shadow disk instead: a second disk over the
//! same range of the file, without a node for the tenant. The device and its partitions serve the
//! file read-only. (A read-only node would not suffice: a writer's mapped pages are written all the
//! same.) A read from the device may return old data of the mounted file system. The device is
//! writable again when the last user of the shadow disk is gone. Knows nothing of file systems.

use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use super::device::PoolDevice;
use super::disk_allocator::{DiskAllocator, NotReplaced};
use super::file_binding::FileBinding;
use super::partition_disk;
use super::pool::Pool;
use super::pool_disk::PoolDisk;
use super::{Answer, DeviceEntry, Errno, LoopInfo, errno};
use crate::frontend::StopMode;
use crate::image::partitions;
use crate::sys::block;

/// Without I/O for so long, no unmount is in progress.
const IDLE_MAX: Duration = Duration::from_millis(250);

/// How long a poll of a mounted device waits for its lock.
const ACTIVITY_LOCK_TIMEOUT: Duration = Duration::from_millis(50);

/// The activity of the kernel mounts of a pool.
#[derive(Debug, Default)]
struct MountActivity {
    any: bool,
    /// Requests are in flight.
    busy: bool,
    /// Completed requests.
    ended: u64,
}

/// A disk that only the kernel mounts.
#[derive(Debug)]
pub struct ShadowDisk {
    /// The partition that it shadows; none: the device.
    part: Option<u32>,
    disk: PoolDisk,
}

/// A disk for the kernel to mount. It stays while this is held.
#[derive(Debug)]
pub struct MountSource {
    /// loopN or loopNpM.
    pub name: String,
    /// Bytes.
    pub size: u64,
    /// A detached mount of its node.
    pub node: OwnedFd,
    /// The disk, opened read-only.
    pub device: OwnedFd,
}

impl ShadowDisk {
    /// Takes over the current size of its file.
    pub fn resize_to_file(&self) -> Answer<()> {
        self.disk.resize_to_file()
    }

    /// Takes over the new size of its partition.
    pub fn show(&self, binding: &FileBinding, part: &partitions::PartitionRange) -> Answer<()> {
        self.disk
            .set_image(binding.reopen(&partition_disk::range_info(binding, part), self.disk.block_size)?.0)
    }

    /// Whether it shadows this partition.
    pub fn is_of(&self, number: u32) -> bool {
        self.part == Some(number)
    }

    fn mount_source(&self, number: u32) -> Answer<MountSource> {
        let name = match self.part {
            Some(part) => format!("loop{number}p{part}"),
            None => format!("loop{number}"),
        };
        let device = self.disk.open(false)?;
        Ok(MountSource { name, size: self.disk.size(), node: self.disk.node()?, device })
    }
}

impl PoolDevice {
    /// Gives the shadow disk of the device, or of a partition, for the kernel to mount. A mounted
    /// device has one already.
    pub fn mount_source(&mut self, part: Option<u32>, allocator: &DiskAllocator) -> Answer<MountSource> {
        self.bound()?;
        if let Some(shadow) = self.shadows.iter().find(|shadow| shadow.part == part) {
            return shadow.mount_source(self.number);
        }
        if self.shadows.is_empty() {
            // As in the kernel: not a device that is mounted elsewhere, or open with O_EXCL.
            if self.is_claimed()? {
                return Err(Errno::BUSY);
            }
            self.set_write_protection(true).inspect_err(|_| self.remove_write_protection())?;
        }
        let source = self.create_shadow(part, allocator).and_then(|shadow| {
            let source = shadow.mount_source(self.number);
            self.shadows.push(shadow);
            source
        });
        if source.is_err() {
            self.release_shadows(allocator);
            if self.shadows.is_empty() {
                self.remove_write_protection();
            }
        }
        source
    }

    fn create_shadow(&self, part: Option<u32>, allocator: &DiskAllocator) -> Answer<ShadowDisk> {
        let binding = self.bound()?;
        let of_part = |number| self.partitions.iter().find(|part| part.entry().number == number);
        let info = match part {
            None => binding.info,
            Some(number) => of_part(number).ok_or(Errno::NXIO)?.info(binding),
        };
        let (image, _) = binding.reopen(&info, binding.block_size)?;
        let disk = allocator.allocate(binding.block_size).map_err(|error| errno(&error))?;
        if let Err(error) = disk.bind(image, binding.read_only(), false) {
            if let Err(disk) = allocator.remove(disk, StopMode::Always) {
                tracing::error!(rdev = disk.rdev, "cannot remove the disk of a kernel mount");
            }
            return Err(error);
        }
        Ok(ShadowDisk { part, disk })
    }

    /// Makes the device and its partitions read-only, or what they were before.
    fn set_write_protection(&self, close: bool) -> Answer<()> {
        let binding = self.binding.as_ref().ok_or(Errno::NXIO)?;
        if binding.read_only() {
            return Ok(());
        }
        let parts = self.partitions.iter().map(|part| (part.disk(), part.info(binding)));
        let all: Vec<(_, LoopInfo)> = std::iter::once((self.disk()?, binding.info)).chain(parts).collect();
        for (disk, info) in &all {
            // Write back before the shadow disk reads the file; drop the cache before the device is
            // written again.
            if close {
                disk.flush()?;
                disk.set_read_only(true)?;
                disk.flush()?;
                disk.set_image(binding.reopen_read_only(info, disk.block_size)?)?;
            } else {
                disk.flush()?;
                disk.set_image(binding.reopen(info, disk.block_size)?.0)?;
                disk.set_read_only(false)?;
            }
        }
        Ok(())
    }

    fn remove_write_protection(&mut self) {
        if let Err(error) = self.set_write_protection(false) {
            tracing::error!(%error, number = self.number, "a loop device stays read-only after a mount");
        }
    }

    /// Frees the shadow disks that are not mounted any more. With the last one the device is
    /// writable.
    pub fn release_shadows(&mut self, allocator: &DiskAllocator) {
        if self.shadows.is_empty() {
            return;
        }
        for ShadowDisk { part, disk } in std::mem::take(&mut self.shadows) {
            match allocator.replace(disk) {
                Ok(free) => allocator.keep(free),
                Err(NotReplaced::InUse(disk)) => self.shadows.push(ShadowDisk { part, disk }),
                Err(NotReplaced::Lost(error)) => tracing::error!(%error, "cannot replace a disk: it is lost"),
            }
        }
        if self.shadows.is_empty() {
            self.remove_write_protection();
        }
    }

    /// Returns the disks of its shadow disks, which stay mounted.
    pub fn take_shadow_disks(&mut self) -> impl Iterator<Item = PoolDisk> + use<> {
        std::mem::take(&mut self.shadows).into_iter().map(|shadow| shadow.disk)
    }

    /// Removes the shadow disks.
    pub fn remove_shadows(&mut self, when: StopMode, allocator: &DiskAllocator) {
        for ShadowDisk { part, disk } in std::mem::take(&mut self.shadows) {
            if let Err(disk) = allocator.remove(disk, when) {
                self.shadows.push(ShadowDisk { part, disk });
            }
        }
    }
}

impl Pool {
    /// Passes the shadow disk of the device, or partition, with this number to `make`, which has
    /// the kernel mount it. Nobody else can write to the device while it is mounted.
    pub fn mount_source<T>(&self, rdev: u64, make: impl FnOnce(&MountSource) -> Answer<T>) -> Answer<T> {
        let (number, part) = self.find_device_or_partition(rdev).ok_or(Errno::NXIO)?;
        let mut source = None;
        self.change(number, |device| {
            source = Some(device.mount_source(part, &self.allocator)?);
            Ok(())
        })?;
        let source = source.ok_or(Errno::NXIO)?;
        // No lock is held: this may take long, and end only when the disk is removed.
        let made = make(&source);
        drop(source);
        if made.is_err() {
            let _ = self.change(number, |device| {
                device.release_shadows(&self.allocator);
                Ok(())
            });
        }
        self.close_watcher.wake();
        made
    }

    /// Whether a device or partition of the pool has this number.
    pub fn has_device(&self, rdev: u64) -> bool {
        self.find_device_or_partition(rdev).is_some()
    }

    /// Waits until the kernel has unmounted everything: for as long as there is I/O, and at most
    /// `within`. If a mount stays, because somebody else has it too, flushes it once and waits
    /// again: processes end before their mounts do. True: nothing is mounted.
    pub fn wait_for_unmounts(&self, within: Duration) -> bool {
        let until = Instant::now() + within;
        let (mut known, mut idle_since, mut written) = (0, Instant::now(), false);
        loop {
            let MountActivity { any, busy, ended } = self.mount_activity(until);
            let now = Instant::now();
            if !any || now >= until {
                return !any;
            }
            if busy || ended != known {
                (known, idle_since) = (ended, now);
            }
            if now.duration_since(idle_since) >= IDLE_MAX {
                if written {
                    return false;
                }
                self.flush_mounts(until);
                (written, idle_since) = (true, Instant::now());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn mount_activity(&self, until: Instant) -> MountActivity {
        let mut mounts = MountActivity::default();
        for (_, slot) in self.all_slots() {
            // A request to a worker that does not answer takes seconds to time out.
            if Instant::now() >= until {
                return MountActivity { any: true, ..mounts };
            }
            // This only reads the state: freeing a shadow disk may need the file, which may hang.
            // The close watcher holds the lock for some milliseconds, again and again: that is no
            // sign of I/O.
            let Ok(device) = slot.lock_within(ACTIVITY_LOCK_TIMEOUT) else {
                mounts.any = true;
                mounts.busy = true;
                continue;
            };
            for ShadowDisk { disk, .. } in device.shadows.iter().filter(|shadow| shadow.disk.is_claimed()) {
                mounts.any = true;
                let traffic = disk.traffic();
                mounts.busy |= traffic.is_none_or(|traffic| traffic.in_flight > 0);
                mounts.ended += traffic.unwrap_or_default().ended;
            }
        }
        mounts
    }

    /// Flushes the mounted file systems. On a thread of its own: their files may hang.
    fn flush_mounts(&self, until: Instant) {
        let mut disks = Vec::new();
        for (_, slot) in self.all_slots() {
            let Ok(device) = slot.device.try_lock() else { continue };
            disks.extend(device.shadows.iter().filter_map(|shadow| shadow.disk.open(false).ok()));
        }
        let (sender, written) = std::sync::mpsc::channel::<()>();
        let name = self.spec().name.clone();
        let write = move || {
            for disk in disks {
                if let Err(error) = block::flush(disk.as_fd()) {
                    tracing::warn!(%error, "could not flush the file systems mounted from pool {name}");
                }
            }
            drop(sender);
        };
        match std::thread::Builder::new().name("write-back".into()).spawn(write) {
            // Nothing is sent: the receiver returns when the sender is dropped.
            Ok(_) => drop(written.recv_timeout(until.saturating_duration_since(Instant::now()))),
            Err(error) => {
                let name = &self.spec().name;
                tracing::warn!(%error, "could not flush the file systems mounted from pool {name}");
            }
        }
    }

    fn find_device_or_partition(&self, rdev: u64) -> Option<(u32, Option<u32>)> {
        let part_of = |entry: &DeviceEntry| {
            entry.partitions.iter().find(|part| part.rdev == rdev).map(|part| part.number)
        };
        let entry = self.find_entry(|entry| entry.rdev == rdev || part_of(entry).is_some())?;
        let part = if entry.rdev == rdev { None } else { part_of(&entry) };
        Some((entry.number, part))
    }
}
