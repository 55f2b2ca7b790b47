//! One loopN: what it is bound to, which disk it is, and the operations of loop(4) on it.
//!
//! Knows one device at a time. Numbers, limits and who is told of a change are the pool's business;
//! when the last one has closed it, the reaper finds out.

mod reset;

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use super::binding::{Binding, check_block_size, check_info, check_kind};
use super::maker::{Disk, Maker, Unrecycled, let_go};
use super::mounted::Hidden;
use super::parts::{self, Part};
use super::quota::Charge;
use super::{Answer, Caller, Configure, Entry, Errno, Info, Status, flag};
use crate::frontend::Stop;

/// How long a cleared device is shown as unbound although somebody may have it open still: the
/// caller of LOOP_CLR_FD itself has, and closes it next.
const HIDDEN: Duration = Duration::from_secs(1);

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
    /// When LOOP_CLR_FD came, if it did.
    cleared: Option<Instant>,
    /// Disks that it no longer is, but that somebody has open, and what they are bound to.
    leaving: Vec<(Disk, Option<Binding>)>,
    generation: u64,
    /// Of the user's account.
    _charge: Charge,
}

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
            leaving: Vec::new(),
            generation,
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
        self.bound().is_ok()
    }

    /// It can be bound at once.
    pub fn is_free(&self) -> bool {
        self.binding.is_none() && self.disk.is_some()
    }

    /// LOOP_CLR_FD came, and nobody has been seen to have it open since.
    pub fn is_cleared(&self) -> bool {
        self.cleared.is_some_and(|since| since.elapsed() < HIDDEN)
    }

    /// Its last close is to be waited for.
    pub fn is_awaited(&self) -> bool {
        let held = !self.leaving.is_empty() || !self.mounted.is_empty();
        held || self.binding.as_ref().is_some_and(|binding| autoclears(&binding.info))
    }

    /// Disks that it holds.
    pub fn disks(&self) -> usize {
        self.leaving.len() + self.parts.len() + self.mounted.len() + usize::from(self.disk.is_some())
    }

    /// Block device that it shows in turn, if it does.
    pub fn shows(&self) -> Option<u64> {
        self.binding.as_ref().map(Binding::rdevice).filter(|rdev| *rdev != 0)
    }

    pub(super) fn bound(&self) -> Answer<&Binding> {
        match &self.binding {
            Some(binding) if !self.is_cleared() => Ok(binding),
            _ => Err(Errno::NXIO),
        }
    }

    pub(super) fn disk(&self) -> Answer<&Disk> {
        self.disk.as_ref().ok_or(Errno::IO)
    }

    /// LOOP_CONFIGURE.
    pub fn configure(&mut self, with: Configure, caller: &dyn Caller, room: Room<'_>) -> Answer<()> {
        if self.is_bound() {
            return Err(Errno::BUSY);
        }
        let (binding, image) = Binding::take(with, caller.writes(), self.number, &room.shared().claims)?;
        if !caller.waits() {
            return Err(Errno::INTR);
        }
        // Without a descriptor it does not matter which disk it was: it can be cleared in truth.
        if !caller.has_descriptor() && self.binding.is_some() && !self.unbind(room) {
            return Err(Errno::BUSY);
        }
        let block_size = binding.block_size;
        let read_only = binding.read_only();
        self.drop_parts();
        let parts = match binding.info.flags & flag::PARTSCAN {
            0 => Vec::new(),
            _ => parts::scan(&binding, &image, self.generation, room),
        };
        // They go again with everything else if this fails.
        self.parts = parts;
        if self.binding.is_none() && self.disk()?.block_size == block_size {
            let disk = self.disk()?;
            if let Err(error) = disk.present(image, read_only) {
                disk.withdraw();
                self.drop_parts();
                return Err(error);
            }
        } else {
            // Cleared a moment ago, so that it cannot be told whether others have it open; or its
            // blocks have another size. The caller gets a new disk under the same name.
            let disk = room.make(block_size).map_err(|error| super::errno(&error))?;
            let ready = disk.present(image, read_only);
            self.exchange(disk, ready, caller, room).inspect_err(|_| self.drop_parts())?;
        }
        self.binding = Some(binding);
        self.cleared = None;
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
                self.leaving.push((disk, None));
            }
            return Err(error);
        }
        if let Some(old) = self.disk.replace(disk) {
            self.leaving.push((old, self.binding.take()));
        }
        self.generation += 1;
        Ok(())
    }

    /// LOOP_CLR_FD.
    pub fn clear(&mut self) -> Answer<()> {
        self.bound()?;
        let mounted = self.is_claimed()?;
        if let Some(binding) = &mut self.binding {
            binding.info.flags |= flag::AUTOCLEAR;
        }
        if !mounted {
            self.cleared = Some(Instant::now());
        }
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
        if !self.mounted.is_empty() && (!same || info.flags & flag::PARTSCAN != 0) {
            return Err(Errno::BUSY);
        }
        if same {
            if let Some(binding) = &mut self.binding {
                binding.info = new;
            }
        } else {
            self.reshow(new, caller)?;
        }
        if info.flags & flag::PARTSCAN != 0 {
            self.rescan(room)?;
        }
        Ok(())
    }

    fn rescan(&mut self, room: Room<'_>) -> Answer<()> {
        let binding = self.bound()?;
        let (image, _) = binding.reopen(&binding.info, binding.block_size)?;
        let parts = parts::scan(binding, &image, self.generation, room);
        self.drop_parts();
        self.parts = parts;
        Ok(())
    }

    /// Partitions that somebody has open stay with whom has them, without a name.
    fn drop_parts(&mut self) {
        self.leaving.extend(self.parts.drain(..).map(|part| (part.into_disk(), None)));
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
            let ready = disk.present(image, binding.read_only());
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
        Ok(())
    }

    /// Unbinds it and lets go of disks that it no longer is, as far as nobody has them open. True:
    /// something changed.
    pub fn reap(&mut self, room: Room<'_>) -> bool {
        for (disk, binding) in std::mem::take(&mut self.leaving) {
            match room.recycle(disk) {
                Ok(spare) => room.keep(spare),
                Err(Unrecycled::InUse(disk)) => {
                    self.leaving.push((disk, binding));
                    continue;
                }
                Err(Unrecycled::Lost(error)) => tracing::error!(%error, "a disk was lost"),
            }
            let_go(binding);
        }
        self.take_back(room);
        if !self.binding.as_ref().is_some_and(|binding| autoclears(&binding.info)) {
            return false;
        }
        if self.parts.iter().any(Part::is_claimed) {
            return false;
        }
        self.unbind(room)
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

    /// Unbinds it, if nobody has it open.
    pub fn unbind(&mut self, room: Room<'_>) -> bool {
        if self.disk.is_none() || !self.mounted.is_empty() || self.renew(room) == Err(Errno::BUSY) {
            return false;
        }
        self.drop_parts();
        self.generation += 1;
        self.cleared = None;
        let_go(self.binding.take());
        true
    }

    /// Gives all its disks away, if they can be had.
    pub fn end(&mut self, when: Stop, room: Room<'_>) -> bool {
        if when == Stop::Always || self.is_claimed() == Ok(false) {
            self.drop_parts();
        }
        self.end_mounts(when, room);
        for (disk, binding) in std::mem::take(&mut self.leaving) {
            match room.remove(disk, when) {
                Ok(()) => let_go(binding),
                Err(disk) => self.leaving.push((disk, binding)),
            }
        }
        if let Some(disk) = self.disk.take() {
            match room.remove(disk, when) {
                Ok(()) => let_go(self.binding.take()),
                Err(disk) => self.disk = Some(disk),
            }
        }
        self.disk.is_none() && self.leaving.is_empty() && self.mounted.is_empty()
    }

    /// Gives its unused disk back.
    pub fn retire(&mut self, room: Room<'_>) -> Answer<()> {
        if !self.leaving.is_empty() || self.binding.is_some() {
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
