// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The kernel mounts of a pool: what is mounted, until when, and its write-back.
//!
//! Knows shadow disks. Does not mount or unmount.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use super::pool::Pool;
use super::shadow_disk::{MountSource, ShadowDisk};
use super::{Answer, DeviceEntry, Errno};
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

impl Pool {
    /// Passes the shadow disk of the device, or partition, with this number to `make`, which has
    /// the kernel mount it. Nobody else can write to the device while it is mounted.
    pub fn mount_source<T>(&self, rdev: u64, make: impl FnOnce(&MountSource) -> Answer<T>) -> Answer<T> {
        let (number, part) = self.find_device_or_partition(rdev).ok_or(Errno::NXIO)?;
        let mut source = None;
        // The device gets another disk.
        let moves = self.allocator.is_kernel_loop();
        self.change_replacing(number, moves, |device| {
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
