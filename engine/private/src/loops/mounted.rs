//! What the kernel mounts of a device, and how others are kept from writing to it meanwhile.
//!
//! A kernel's file system believes what it has read. So while one is mounted for a tenant, nobody is to
//! change its bytes through loopN: mounted is a second disk over the same part of the file, of which no
//! one has a node, and the device and its partitions show the file only to be read. (Making the node
//! read-only would not do: pages that a writer has mapped are written all the same.) What a device
//! shows of a mounted file system may be old. It can be written again when the last user of the hidden
//! disk is gone. Knows nothing of file systems.

use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use super::binding::Binding;
use super::device::{Device, Room};
use super::disk::Disk;
use super::maker::Unrecycled;
use super::parts;
use super::pool::Pool;
use super::{Answer, Entry, Errno, Info, errno};
use crate::frontend::StopMode;
use crate::image::partitions;
use crate::sys::block;

/// Nothing is read or written for so long: an unmount is not what goes on.
const IDLE_MAX: Duration = Duration::from_millis(250);

/// How long a look at a mounted device waits for an operation on it.
const GLANCE: Duration = Duration::from_millis(50);

/// What the kernel has mounted of a pool.
#[derive(Debug, Default)]
struct Mounts {
    any: bool,
    /// Requests are in flight.
    busy: bool,
    /// Requests that have ended.
    ended: u64,
}

/// A disk that nobody sees.
#[derive(Debug)]
pub struct Hidden {
    /// Of a partition; none: of the device.
    part: Option<u32>,
    disk: Disk,
}

/// A device that the kernel is to mount. While this is held, it stays.
#[derive(Debug)]
pub struct Lent {
    /// loopN or loopNpM.
    pub name: String,
    /// Bytes.
    pub size: u64,
    /// Its node, as a mount that is mounted nowhere yet.
    pub node: OwnedFd,
    /// The device, opened to be read.
    pub device: OwnedFd,
}

impl Hidden {
    /// Adapts to the present size of its file.
    pub fn adapt(&self) -> Answer<()> {
        self.disk.adapt()
    }

    /// Shows its partition, which has another size now.
    pub fn show(&self, binding: &Binding, part: &partitions::PartitionRange) -> Answer<()> {
        self.disk.show(binding.reopen(&parts::info(binding, part), self.disk.block_size)?.0)
    }

    /// It is of this partition.
    pub fn is_of(&self, number: u32) -> bool {
        self.part == Some(number)
    }

    fn lend(&self, number: u32) -> Answer<Lent> {
        let name = match self.part {
            Some(part) => format!("loop{number}p{part}"),
            None => format!("loop{number}"),
        };
        let device = self.disk.open(false)?;
        Ok(Lent { name, size: self.disk.size(), node: self.disk.node()?, device })
    }
}

impl Device {
    /// Lends it, or a partition of it, to be mounted by the kernel: again, if it is mounted already.
    pub fn lend(&mut self, part: Option<u32>, room: Room<'_>) -> Answer<Lent> {
        self.bound()?;
        if let Some(hidden) = self.mounted.iter().find(|hidden| hidden.part == part) {
            return hidden.lend(self.number);
        }
        if self.mounted.is_empty() {
            // As for the kernel: not what another has mounted, or opened with O_EXCL.
            if self.is_claimed()? {
                return Err(Errno::BUSY);
            }
            self.close_to_writers(true).inspect_err(|_| self.open_again())?;
        }
        let lent = self.hide(part, room).and_then(|hidden| {
            let lent = hidden.lend(self.number);
            self.mounted.push(hidden);
            lent
        });
        if lent.is_err() {
            self.take_back(room);
            if self.mounted.is_empty() {
                self.open_again();
            }
        }
        lent
    }

    fn hide(&self, part: Option<u32>, room: Room<'_>) -> Answer<Hidden> {
        let binding = self.bound()?;
        let of_part = |number| self.parts.iter().find(|part| part.shown().number == number);
        let info = match part {
            None => binding.info,
            Some(number) => of_part(number).ok_or(Errno::NXIO)?.info(binding),
        };
        let (image, _) = binding.reopen(&info, binding.block_size)?;
        let disk = room.make(binding.block_size).map_err(|error| errno(&error))?;
        if let Err(error) = disk.present(image, binding.read_only(), false) {
            if let Err(disk) = room.remove(disk, StopMode::Always) {
                tracing::error!(rdev = disk.rdev, "a disk for a mount cannot be taken away");
            }
            return Err(error);
        }
        Ok(Hidden { part, disk })
    }

    /// Has the device and its partitions be read-only, or what they were.
    fn close_to_writers(&self, close: bool) -> Answer<()> {
        let binding = self.binding.as_ref().ok_or(Errno::NXIO)?;
        if binding.read_only() {
            return Ok(());
        }
        let parts = self.parts.iter().map(|part| (part.disk(), part.info(binding)));
        let all: Vec<(_, Info)> = std::iter::once((self.disk()?, binding.info)).chain(parts).collect();
        for (disk, info) in &all {
            // What was written is in the file before anybody else reads it there; and what was read is
            // forgotten before the device is written again.
            if close {
                disk.flush()?;
                disk.set_read_only(true)?;
                disk.flush()?;
                disk.show(binding.reopen_to_read(info, disk.block_size)?)?;
            } else {
                disk.flush()?;
                disk.show(binding.reopen(info, disk.block_size)?.0)?;
                disk.set_read_only(false)?;
            }
        }
        Ok(())
    }

    fn open_again(&mut self) {
        if let Err(error) = self.close_to_writers(false) {
            tracing::error!(%error, number = self.number, "a loop device stays read-only after a mount");
        }
    }

    /// Takes back what was lent and is mounted no more. With the last of it the device can be written.
    pub fn take_back(&mut self, room: Room<'_>) {
        if self.mounted.is_empty() {
            return;
        }
        for Hidden { part, disk } in std::mem::take(&mut self.mounted) {
            match room.recycle(disk) {
                Ok(spare) => room.keep(spare),
                Err(Unrecycled::InUse(disk)) => self.mounted.push(Hidden { part, disk }),
                Err(Unrecycled::Lost(error)) => tracing::error!(%error, "a disk was lost"),
            }
        }
        if self.mounted.is_empty() {
            self.open_again();
        }
    }

    /// Gives away the disks that are mounted still.
    pub fn leave_mounts(&mut self) -> impl Iterator<Item = Disk> + use<> {
        std::mem::take(&mut self.mounted).into_iter().map(|hidden| hidden.disk)
    }

    /// Takes away what was lent, for good.
    pub fn end_mounts(&mut self, when: StopMode, room: Room<'_>) {
        for Hidden { part, disk } in std::mem::take(&mut self.mounted) {
            if let Err(disk) = room.remove(disk, when) {
                self.mounted.push(Hidden { part, disk });
            }
        }
    }
}

impl Pool {
    /// Lends the device, or partition, with this device number to `make`, which has the kernel mount it.
    /// While it is mounted nobody else may write to the device.
    pub fn lend<T>(&self, rdev: u64, make: impl FnOnce(&Lent) -> Answer<T>) -> Answer<T> {
        let (number, part) = self.find_with_parts(rdev).ok_or(Errno::NXIO)?;
        let mut lent = None;
        self.change(number, |device| {
            lent = Some(device.lend(part, &self.maker)?);
            Ok(())
        })?;
        let lent = lent.ok_or(Errno::NXIO)?;
        // Nothing is held meanwhile: it may take long, and end only when the disk is taken away.
        let made = make(&lent);
        drop(lent);
        if made.is_err() {
            let _ = self.change(number, |device| {
                device.take_back(&self.maker);
                Ok(())
            });
        }
        self.reaper.wake();
        made
    }

    /// Whether this is the number of a device of the pool, or of a partition of one.
    pub fn has(&self, rdev: u64) -> bool {
        self.find_with_parts(rdev).is_some()
    }

    /// Whether nothing is mounted by the kernel any more, after a wait for that: for as long as something
    /// is written, and `within` at the most. What stays mounted, since somebody else has the mount, is
    /// written to its file, as far as that can be had in the same time; and is given as long again, since
    /// processes are seen to go before their mounts do.
    pub fn wait_for_unmounts(&self, within: Duration) -> bool {
        let until = Instant::now() + within;
        let (mut known, mut idle_since, mut written) = (0, Instant::now(), false);
        loop {
            let Mounts { any, busy, ended } = self.mounts(until);
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
                self.write_mounts(until);
                (written, idle_since) = (true, Instant::now());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn mounts(&self, until: Instant) -> Mounts {
        let mut mounts = Mounts::default();
        for (_, place) in self.all() {
            // A worker that does not answer takes seconds to be given up.
            if Instant::now() >= until {
                return Mounts { any: true, ..mounts };
            }
            // Only looked at: to take it back may need the file, which may hang.
            // The reaper has it for some milliseconds, again and again: that is no sign of I/O.
            let Ok(device) = place.lock_within(GLANCE) else {
                mounts.any = true;
                mounts.busy = true;
                continue;
            };
            for Hidden { disk, .. } in device.mounted.iter().filter(|hidden| hidden.disk.is_claimed()) {
                mounts.any = true;
                let traffic = disk.traffic();
                mounts.busy |= traffic.is_none_or(|traffic| traffic.in_flight > 0);
                mounts.ended += traffic.unwrap_or_default().ended;
            }
        }
        mounts
    }

    /// Has the kernel's file systems write what they hold. On a thread of its own: their files may hang.
    fn write_mounts(&self, until: Instant) {
        let mut disks = Vec::new();
        for (_, place) in self.all() {
            let Ok(device) = place.device.try_lock() else { continue };
            disks.extend(device.mounted.iter().filter_map(|hidden| hidden.disk.open(false).ok()));
        }
        let (sender, written) = std::sync::mpsc::channel::<()>();
        let write = move || {
            for disk in disks {
                if let Err(error) = block::flush(disk.as_fd()) {
                    tracing::warn!(%error, "what is mounted of a pool that ends is not written");
                }
            }
            drop(sender);
        };
        match std::thread::Builder::new().name("write-back".into()).spawn(write) {
            // Nothing is ever sent: it is over when the sender is gone.
            Ok(_) => drop(written.recv_timeout(until.saturating_duration_since(Instant::now()))),
            Err(error) => tracing::warn!(%error, "what is mounted of a pool that ends is not written"),
        }
    }

    fn find_with_parts(&self, rdev: u64) -> Option<(u32, Option<u32>)> {
        let part_of =
            |entry: &Entry| entry.partitions.iter().find(|part| part.rdev == rdev).map(|part| part.number);
        let entry = self.find_entry(|entry| entry.rdev == rdev || part_of(entry).is_some())?;
        let part = if entry.rdev == rdev { None } else { part_of(&entry) };
        Some((entry.number, part))
    }
}
