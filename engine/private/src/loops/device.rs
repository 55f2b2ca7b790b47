//! One loopN: what it is bound to, which disk it is, and the operations of loop(4) on it.
//!
//! Knows one device at a time. Numbers, limits and who is told of a change are the pool's business;
//! when the last one has closed it, the reaper finds out.

mod outgoing;
mod partitions;
mod reset;

use std::os::fd::OwnedFd;
use std::time::Duration;

use super::binding::{Binding, check_block_size, check_info, check_kind};
use super::disk::Disk;
use super::maker::{Maker, Unrecycled};
use super::mounted::Hidden;
use super::parts::{self, Part};
use super::quota::Charge;
use super::{Answer, Caller, Configure, Entry, Errno, Info, Status, flag};
use crate::frontend::StopMode;
use outgoing::Outgoing;

/// The state of one loopN.
#[derive(Debug)]
pub struct Device {
    pub(super) number: u32,
    /// None: the kernel failed us, and there is no disk.
    pub(super) disk: Option<Disk>,
    pub(super) binding: Option<Binding>,
    pub(super) parts: Vec<Part>,
    /// Mounted by the kernel for the tenant: others may not write then.
    pub(super) mounted: Vec<Hidden>,
    /// What it was until LOOP_CLR_FD, and is again if that was not its last user.
    cleared: Option<Outgoing>,
    /// LOOP_CLR_FD came, and it is bound still, or again, for those who have it open.
    leaving: bool,
    /// Disks that it no longer is, but that somebody has open.
    outgoing: Vec<Outgoing>,
    generation: u64,
    /// The highest that it has had: a device may become what it was before.
    last_generation: u64,
    /// Of the user's account.
    _charge: Charge,
}

/// How long a round of the reaper lets go of outgoing disks of one device.
const RELEASE_MAX: Duration = Duration::from_millis(200);

/// Operations need the room that makes disks.
pub type Room<'a> = &'a Maker;

impl Device {
    /// Unbound.
    pub fn new(number: u32, disk: Disk, generation: u64, charge: Charge) -> Device {
        Device {
            number,
            disk: Some(disk),
            binding: None,
            parts: Vec::new(),
            mounted: Vec::new(),
            cleared: None,
            leaving: false,
            outgoing: Vec::new(),
            generation,
            last_generation: generation,
            _charge: charge,
        }
    }

    /// As directories and sysfs show it.
    pub fn entry(&self) -> Option<Entry> {
        let disk = self.disk.as_ref()?;
        let bound = self.bound().ok().map(Binding::shown);
        Some(Entry {
            number: self.number,
            rdev: disk.rdev,
            generation: self.generation,
            size: disk.size(),
            block_size: disk.block_size,
            partitions: if bound.is_some() {
                self.parts.iter().map(Part::shown).collect()
            } else {
                Vec::new()
            },
            bound,
        })
    }

    /// It is bound, as far as its users are to know.
    pub fn is_bound(&self) -> bool {
        self.binding.is_some()
    }

    /// It can be bound at once.
    pub fn is_free(&self) -> bool {
        self.binding.is_none() && self.disk.is_some() && self.cleared.is_none()
    }

    /// Its last close is to be waited for.
    pub fn is_awaited(&self) -> bool {
        let held = self.is_cleared() || !self.outgoing.is_empty() || !self.mounted.is_empty();
        held || self.is_to_be_unbound()
    }

    /// LOOP_CLR_FD came: it is bound for those who have it open, and for nobody else.
    pub fn is_leaving(&self) -> bool {
        self.leaving && self.is_to_be_unbound()
    }

    /// Its last close unbinds it.
    pub fn is_to_be_unbound(&self) -> bool {
        self.binding.as_ref().is_some_and(|binding| autoclears(&binding.info))
    }

    /// Disks that it holds.
    pub fn disks(&self) -> usize {
        let outgoing = self.outgoing.len() + usize::from(self.is_cleared());
        outgoing + self.parts.len() + self.mounted.len() + usize::from(self.disk.is_some())
    }

    /// Block device that it shows in turn, if it does.
    pub fn shows(&self) -> Option<u64> {
        self.binding.as_ref().map(Binding::rdevice).filter(|rdev| *rdev != 0)
    }

    pub(super) fn bound(&self) -> Answer<&Binding> {
        self.binding.as_ref().ok_or(Errno::NXIO)
    }

    pub(super) fn disk(&self) -> Answer<&Disk> {
        self.disk.as_ref().ok_or(Errno::IO)
    }

    /// LOOP_CONFIGURE.
    pub fn configure(&mut self, with: Configure, caller: &dyn Caller, room: Room<'_>) -> Answer<()> {
        if self.is_bound() {
            tracing::debug!(number = self.number, leaving = self.leaving, "a device to be bound is bound");
            return Err(Errno::BUSY);
        }
        let (binding, image) = Binding::take(with, caller.writes(), self.number, &room.shared().claims)?;
        if !caller.waits() {
            return Err(Errno::INTR);
        }
        let block_size = binding.block_size;
        let read_only = binding.read_only();
        self.drop_parts();
        let parts = match binding.info.flags & flag::PARTSCAN {
            0 => Vec::new(),
            _ => parts::make_all(&binding, &parts::read(&image), self.generation, room),
        };
        // They go again with everything else if this fails.
        self.parts = parts;
        if self.disk()?.block_size == block_size {
            let disk = self.disk()?;
            if let Err(error) = disk.present(image, read_only, false) {
                disk.withdraw();
                self.drop_parts();
                return Err(error);
            }
        } else {
            // Its blocks have another size. The caller gets a new disk under the same name.
            let disk = room.make(block_size).map_err(|error| super::errno(&error))?;
            let ready = disk.present(image, read_only, false);
            self.exchange(disk, ready, caller, room).inspect_err(|_| self.drop_parts())?;
        }
        self.binding = Some(binding);
        self.leaving = false;
        self.outgoing.extend(self.cleared.take());
        Ok(())
    }

    /// Puts another disk in the place of this one, and into the caller's hands. Where those are empty,
    /// nobody else may have this one open, and be left with it.
    fn exchange(&mut self, disk: Disk, ready: Answer<()>, caller: &dyn Caller, room: Room<'_>) -> Answer<()> {
        let given = ready.and_then(|()| match caller.has_descriptor() {
            true => disk.open(caller.writes()).and_then(|file| caller.replace(file)),
            false => self.renew(room),
        });
        if let Err(error) = given {
            if let Err(disk) = room.give_back(disk) {
                self.outgoing.push(Outgoing::bare(disk));
            }
            return Err(error);
        }
        let old = self.put_out(disk);
        self.outgoing.extend(old);
        Ok(())
    }

    /// LOOP_GET_STATUS64.
    pub fn status(&self) -> Answer<Status> {
        let binding = self.bound()?;
        let (device, inode, rdevice) = binding.numbers();
        Ok(Status { number: self.number, device, inode, rdevice, info: binding.info })
    }

    /// LOOP_SET_STATUS64.
    pub fn set_status(&mut self, info: &Info, caller: &dyn Caller, room: Room<'_>) -> Answer<()> {
        may_change(caller)?;
        let old = self.bound()?.info;
        let mut new = Info { flags: old.flags, ..check_info(info)? };
        // Set and cleared; the other only set.
        new.flags = new.flags & !flag::AUTOCLEAR | info.flags & (flag::AUTOCLEAR | flag::PARTSCAN);
        let same = (new.offset, new.size_limit) == (old.offset, old.size_limit);
        if !self.mounted.is_empty() && !same {
            return Err(Errno::BUSY);
        }
        if same {
            if let Some(binding) = &mut self.binding {
                binding.info = new;
            }
        } else {
            self.reshow(new, caller)?;
        }
        if info.flags & flag::PARTSCAN != 0 && self.mounted.is_empty() {
            self.look_for_partitions(room);
        }
        Ok(())
    }

    /// It, or a partition of it, is mounted or opened with O_EXCL.
    pub(super) fn is_claimed(&self) -> Answer<bool> {
        let mounted = !self.mounted.is_empty();
        Ok(mounted || self.disk()?.is_claimed() || self.parts.iter().any(Part::is_claimed))
    }

    /// Shows another part of the same file.
    fn reshow(&mut self, info: Info, caller: &dyn Caller) -> Answer<()> {
        let disk = self.disk.as_ref().ok_or(Errno::IO)?;
        let binding = self.binding.as_mut().ok_or(Errno::NXIO)?;
        disk.flush()?;
        let (image, direct) = binding.reopen(&info, disk.block_size)?;
        if !caller.waits() {
            return Err(Errno::INTR);
        }
        disk.show(image)?;
        disk.flush()?;
        binding.reopened(info, disk.block_size, direct);
        self.show_partitions();
        Ok(())
    }

    /// LOOP_SET_CAPACITY.
    pub fn set_capacity(&mut self, caller: &dyn Caller) -> Answer<()> {
        may_change(caller)?;
        self.bound()?;
        self.disk()?.adapt()?;
        self.mounted.iter().try_for_each(Hidden::adapt)
    }

    /// LOOP_SET_DIRECT_IO.
    pub fn set_direct_io(&mut self, on: bool, caller: &dyn Caller) -> Answer<()> {
        may_change(caller)?;
        let direct = self.bound()?.is_direct();
        if on && !direct {
            return Err(Errno::INVAL);
        }
        if let Some(binding) = &mut self.binding {
            let flags = &mut binding.info.flags;
            *flags = if on { *flags | flag::DIRECT_IO } else { *flags & !flag::DIRECT_IO };
        }
        Ok(())
    }

    /// LOOP_SET_BLOCK_SIZE.
    pub fn set_block_size(&mut self, bytes: u64, caller: &dyn Caller, room: Room<'_>) -> Answer<()> {
        may_change(caller)?;
        let info = self.bound()?.info;
        let wanted = check_block_size(bytes)?;
        let old = self.disk()?;
        if wanted == old.block_size {
            return Ok(());
        }
        if old.is_claimed() || !self.mounted.is_empty() {
            return Err(Errno::BUSY);
        }
        old.flush()?;
        let mut binding = self.binding.take().ok_or(Errno::NXIO)?;
        let exchanged = binding.reopen(&info, wanted).and_then(|(image, direct)| {
            let disk = room.make(wanted).map_err(|error| super::errno(&error))?;
            let ready = disk.present(image, binding.read_only(), false);
            self.exchange(disk, ready, caller, room)?;
            Ok(direct)
        });
        if let Ok(direct) = &exchanged {
            binding.reopened(info, wanted, *direct);
        }
        self.binding = Some(binding);
        exchanged.map(drop)
    }

    /// LOOP_CHANGE_FD.
    pub fn change_fd(&mut self, file: OwnedFd, caller: &dyn Caller, room: Room<'_>) -> Answer<()> {
        check_kind(&file, &room.shared().claims)?;
        let old = self.bound()?;
        if !old.read_only() {
            return Err(Errno::INVAL);
        }
        if !self.mounted.is_empty() {
            return Err(Errno::BUSY);
        }
        let info = Info { flags: old.info.flags & flag::DIRECT_IO | flag::READ_ONLY, ..old.info };
        let kept = old.info.flags;
        let with = Configure { file, block_size: old.block_size, info };
        let (mut binding, image) = Binding::take(with, false, self.number, &room.shared().claims)?;
        let disk = self.disk()?;
        if image.geometry().size != disk.size() {
            return Err(Errno::INVAL);
        }
        if !caller.waits() {
            return Err(Errno::INTR);
        }
        disk.flush()?;
        disk.show(image)?;
        disk.flush()?;
        binding.info.flags |= kept & (flag::AUTOCLEAR | flag::PARTSCAN);
        self.binding = Some(binding);
        self.show_partitions();
        if kept & flag::PARTSCAN != 0 {
            self.look_for_partitions(room);
        }
        Ok(())
    }

    /// Lets go of what nobody has any more, but not of its disk.
    pub fn reap(&mut self, room: Room<'_>) {
        // Others wait for the device meanwhile, and a hundred partitions take seconds.
        self.release_outgoing(room, RELEASE_MAX);
        self.look_at_cleared(room);
        self.take_back(room);
    }

    /// Has its disk make way for a new one without a size, if nobody has it open.
    fn renew(&mut self, room: Room<'_>) -> Answer<()> {
        let disk = self.disk.take().ok_or(Errno::IO)?;
        match room.recycle(disk) {
            Ok(next) => {
                self.disk = Some(next);
                Ok(())
            }
            Err(Unrecycled::InUse(disk)) => {
                self.disk = Some(disk);
                Err(Errno::BUSY)
            }
            Err(Unrecycled::Lost(error)) => {
                tracing::error!(%error, number = self.number, "a loop device lost its disk");
                Err(Errno::IO)
            }
        }
    }

    /// Names of what it was must not open what it is now.
    fn renew_generation(&mut self) {
        self.last_generation += 1;
        self.generation = self.last_generation;
    }

    /// Unbinds it, if nobody has it open.
    pub fn unbind(&mut self, room: Room<'_>) -> bool {
        let claimed = !self.mounted.is_empty() || self.parts.iter().any(Part::is_claimed);
        if self.disk.is_none() || claimed || self.renew(room) == Err(Errno::BUSY) {
            return false;
        }
        self.drop_parts();
        self.renew_generation();
        room.close(self.binding.take());
        true
    }

    /// Gives all its disks away, if they can be had.
    pub fn end(&mut self, when: StopMode, room: Room<'_>) -> bool {
        if when == StopMode::Always || self.is_claimed() == Ok(false) {
            self.drop_parts();
        }
        self.end_mounts(when, room);
        self.end_outgoing(when, room);
        if let Some(disk) = self.disk.take() {
            match room.remove(disk, when) {
                Ok(()) => room.close(self.binding.take()),
                Err(disk) => self.disk = Some(disk),
            }
        }
        self.disk.is_none() && self.outgoing.is_empty() && self.mounted.is_empty()
    }

    /// Gives its unused disk back.
    pub fn retire(&mut self, room: Room<'_>) -> Answer<()> {
        self.release_outgoing(room, Duration::MAX);
        if !self.outgoing.is_empty() || self.is_cleared() || self.binding.is_some() {
            return Err(Errno::BUSY);
        }
        if self.disk.is_some() && !self.unbind(room) {
            return Err(Errno::BUSY);
        }
        if let Some(disk) = self.disk.take() {
            room.keep(disk);
        }
        Ok(())
    }
}

fn autoclears(info: &Info) -> bool {
    info.flags & flag::AUTOCLEAR != 0
}

fn may_change(caller: &dyn Caller) -> Answer<()> {
    if caller.writes() || caller.is_admin() { Ok(()) } else { Err(Errno::PERM) }
}
