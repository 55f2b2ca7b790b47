//! Partitions of one device that come, change and go while it is bound: BLKRRPART and BLKPG.
//!
//! Knows the order in which the kernel finds fault with them, and which partitions of a table that is read
//! again stay. Differs from the kernel in one thing: a partition that the table has unchanged stays what it
//! is, also while somebody has it open (but not mounted, nor with O_EXCL).

use super::{Device, Room};
use crate::image::partitions;
use crate::loops::parts::{self, Part};
use crate::loops::{Answer, Caller, Errno, PartitionChange, flag};

/// DISK_MAX_PARTS of the kernel.
const NUMBERS: std::ops::Range<u32> = 1..256;

impl Device {
    /// BLKRRPART.
    pub fn reread_partitions(&mut self, caller: &dyn Caller, room: Room<'_>) -> Answer<()> {
        if self.binding.as_ref().is_none_or(|binding| binding.info.flags & flag::PARTSCAN == 0) {
            return Err(Errno::INVAL);
        }
        // The caller may have it open with O_EXCL itself: only its mounts and stacks upon it are in the way.
        let rdev = self.disk()?.rdev;
        if !self.mounted.is_empty() || caller.has_mounted(rdev) || self.disk()?.has_holders() {
            return Err(Errno::BUSY);
        }
        if !caller.waits() {
            return Err(Errno::INTR);
        }
        self.rescan(room)
    }

    /// The same where the kernel answers nothing of it: LOOP_SET_STATUS64 and LOOP_CHANGE_FD.
    pub(super) fn look_for_partitions(&mut self, room: Room<'_>) {
        if let Err(error) = self.rescan(room) {
            tracing::debug!(%error, "cannot rescan the partitions of loop{}", self.number);
        }
    }

    /// BLKPG.
    pub fn change_partition(
        &mut self,
        change: &PartitionChange,
        caller: &dyn Caller,
        room: Room<'_>,
    ) -> Answer<()> {
        if !caller.waits() {
            return Err(Errno::INTR);
        }
        match *change {
            PartitionChange::Delete(number) => self.delete_partition(number, room),
            PartitionChange::Add(part) => self.add_partition(part, room),
            PartitionChange::Resize(part) => self.resize_partition(part),
        }
    }

    fn add_partition(&mut self, part: partitions::PartitionRange, room: Room<'_>) -> Answer<()> {
        self.check_range(&part)?;
        self.check_free(&part)?;
        if !NUMBERS.contains(&part.number) {
            return Err(Errno::INVAL);
        }
        if self.position_of(part.number).is_some() {
            return Err(Errno::BUSY);
        }
        if self.parts.len() >= parts::MAX {
            return Err(Errno::NOSPC);
        }
        let generation = self.next_part_generation();
        let made = Part::make(self.bound()?, &part, generation, !self.mounted.is_empty(), room)?;
        self.put(made);
        Ok(())
    }

    fn delete_partition(&mut self, number: u32, room: Room<'_>) -> Answer<()> {
        let at = self.position_of(number).ok_or(Errno::NXIO)?;
        if self.mounted.iter().any(|hidden| hidden.is_of(number)) || self.parts[at].is_claimed() {
            return Err(Errno::BUSY);
        }
        let part = self.parts.remove(at);
        part.retire(room).map_err(|part| {
            self.put(part);
            Errno::BUSY
        })
    }

    fn resize_partition(&mut self, part: partitions::PartitionRange) -> Answer<()> {
        self.check_range(&part)?;
        let at = self.position_of(part.number).ok_or(Errno::NXIO)?;
        if self.parts[at].position().start != part.start {
            return Err(Errno::INVAL);
        }
        self.check_free(&part)?;
        let closed = !self.mounted.is_empty();
        let binding = self.binding.as_ref().ok_or(Errno::NXIO)?;
        let mounted = self.mounted.iter().filter(|hidden| hidden.is_of(part.number));
        let resize_mounted = || mounted.clone().try_for_each(|hidden| hidden.show(binding, &part));
        // What is mounted is at least as large as what it is mounted from, whatever fails.
        if part.size > self.parts[at].position().size {
            resize_mounted()?;
            self.parts[at].show(binding, part.size, closed)
        } else {
            self.parts[at].show(binding, part.size, closed)?;
            resize_mounted()
        }
    }

    /// Refuses what is not on the device, or not in whole blocks.
    fn check_range(&self, part: &partitions::PartitionRange) -> Answer<()> {
        let disk = self.disk()?;
        let block = u64::from(disk.block_size);
        let is_whole = part.size > 0 && part.start.is_multiple_of(block) && part.size.is_multiple_of(block);
        let end = part.start.checked_add(part.size);
        if is_whole && end.is_some_and(|end| end <= disk.size()) { Ok(()) } else { Err(Errno::INVAL) }
    }

    /// Refuses what overlaps another partition.
    fn check_free(&self, part: &partitions::PartitionRange) -> Answer<()> {
        let others = self.parts.iter().map(Part::position).filter(|other| other.number != part.number);
        let overlaps = |other: partitions::PartitionRange| {
            part.start < other.start.saturating_add(other.size)
                && other.start < part.start.saturating_add(part.size)
        };
        if others.into_iter().any(overlaps) { Err(Errno::BUSY) } else { Ok(()) }
    }

    fn position_of(&self, number: u32) -> Option<usize> {
        self.parts.iter().position(|part| part.position().number == number)
    }

    fn put(&mut self, part: Part) {
        let number = part.position().number;
        let at = self.parts.partition_point(|other| other.position().number < number);
        self.parts.insert(at, part);
    }

    /// A partition's name is to open no disk that it was before.
    fn next_part_generation(&mut self) -> u64 {
        self.last_generation += 1;
        self.last_generation
    }

    /// Makes its partitions what the table says. All stay what they are if one that goes is in use.
    fn rescan(&mut self, room: Room<'_>) -> Answer<()> {
        if self.parts.iter().any(Part::is_claimed) {
            return Err(Errno::BUSY);
        }
        // What was written through the device is read from the file.
        self.disk()?.flush()?;
        let binding = self.bound()?;
        let (image, _) = binding.reopen(&binding.info, binding.block_size)?;
        let wanted = parts::read(&image);
        let (kept, going): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.parts).into_iter().partition(|part| wanted.contains(&part.position()));
        self.parts = kept;
        let generation = self.next_part_generation();
        let mut gone = Vec::new();
        let mut in_use = Vec::new();
        for part in going {
            if !in_use.is_empty() {
                in_use.push(part);
                continue;
            }
            let position = part.position();
            match part.retire(room) {
                Ok(()) => gone.push(position),
                Err(part) => in_use.push(part),
            }
        }
        let busy = !in_use.is_empty();
        let missing: Vec<_> =
            wanted.into_iter().filter(|part| self.position_of(part.number).is_none()).collect();
        let binding = self.binding.as_ref().ok_or(Errno::NXIO)?;
        let made = parts::make_all(binding, if busy { &gone } else { &missing }, generation, room);
        in_use.into_iter().chain(made).for_each(|part| self.put(part));
        if busy { Err(Errno::BUSY) } else { Ok(()) }
    }

    /// After the device has become another part of the file, or of another file.
    pub(super) fn show_partitions(&mut self) {
        let Some(binding) = &self.binding else { return };
        for mut part in std::mem::take(&mut self.parts) {
            let position = part.position();
            match part.show(binding, position.size, false) {
                Ok(()) => self.parts.push(part),
                Err(error) => {
                    let device = self.number;
                    tracing::warn!(%error, "loop{device}p{} is removed: its image cannot be opened", position.number);
                    part.disk().withdraw();
                    self.outgoing.push(super::Outgoing::part(part));
                }
            }
        }
    }

    /// Partitions that somebody has open stay with whom has them, without a name.
    pub(super) fn drop_parts(&mut self) {
        self.outgoing.extend(self.parts.drain(..).map(super::Outgoing::part));
    }
}
