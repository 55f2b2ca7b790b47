//! Disks that a loopN no longer is, and that somebody may have open still.
//!
//! LOOP_CLR_FD gives the device another disk at once, for who opens it next; what it was serves those who
//! have it open until their last close. If the caller was not its only user, it becomes that again.
//! Knows one device; what the driver needs for a disk to go is the business of `maker`.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{Device, Room};
use crate::frontend::StopMode;
use crate::loops::binding::Binding;
use crate::loops::disk::Disk;
use crate::loops::parts::Part;
use crate::loops::place::{Numbers, QUIET};
use crate::loops::{Answer, flag};

/// How long a device is shown as unbound after LOOP_CLR_FD although somebody may have it open still: the
/// caller itself has, and closes it next.
const UNBOUND_MAX: Duration = Duration::from_secs(1);
/// Outgoing disks of one device at the most.
const MAX: usize = 16;
/// How long LOOP_CLR_FD waits for a disk, where a pool has so many and no more.
const DISK_SOON: Duration = Duration::from_millis(300);
const PAUSE: Duration = Duration::from_millis(2);

/// See the module.
#[derive(Debug)]
pub(super) struct Outgoing {
    pub(super) disk: Disk,
    pub(super) binding: Option<Binding>,
    parts: Vec<Part>,
    since: Instant,
    /// Of the device, while this was its disk.
    generation: u64,
    /// It was the disk of a partition.
    of_part: Option<Arc<()>>,
}

impl Outgoing {
    /// One that is bound to nothing that must be kept.
    pub(super) fn bare(disk: Disk) -> Outgoing {
        let since = Instant::now();
        Outgoing { disk, binding: None, parts: Vec::new(), since, generation: 0, of_part: None }
    }

    /// That of a partition.
    pub(super) fn part(part: Part) -> Outgoing {
        let (disk, counted) = part.into_disk();
        Outgoing { of_part: Some(counted), ..Outgoing::bare(disk) }
    }

    /// Who was told its number before it went out has opened it by now.
    fn is_quiet(&self) -> bool {
        self.since.elapsed() >= QUIET
    }
}

impl Device {
    /// LOOP_CLR_FD.
    pub fn clear(&mut self, room: Room<'_>) -> Answer<()> {
        self.bound()?;
        let claimed = self.is_claimed()?;
        if let Some(binding) = &mut self.binding {
            binding.info.flags |= flag::AUTOCLEAR;
        }
        // Otherwise the last close unbinds it, as it does where others have it open.
        if !claimed && let Some(next) = self.next_disk(room) {
            self.outgoing.extend(self.cleared.take());
            self.cleared = self.put_out(next);
        }
        self.leaving = self.binding.is_some();
        Ok(())
    }

    /// LOOP_CLR_FD came, and whether that was its last user is not known yet.
    pub fn is_cleared(&self) -> bool {
        self.cleared.is_some()
    }

    fn next_disk(&mut self, room: Room<'_>) -> Option<Disk> {
        let until = Instant::now() + DISK_SOON;
        loop {
            self.release_outgoing(room, DISK_SOON);
            let made = if self.outgoing.len() < MAX { room.make(512).ok() } else { None };
            if made.is_some() || self.outgoing.is_empty() || Instant::now() >= until {
                return made;
            }
            std::thread::sleep(PAUSE);
        }
    }

    /// Puts another disk in the place of its own, without a file.
    pub(super) fn put_out(&mut self, next: Disk) -> Option<Outgoing> {
        let generation = self.generation;
        self.renew_generation();
        let (binding, parts) = (self.binding.take(), std::mem::take(&mut self.parts));
        let since = Instant::now();
        let old = self.disk.replace(next);
        old.map(|disk| Outgoing { disk, binding, parts, since, generation, of_part: None })
    }

    /// Device numbers of its outgoing disks, and of all that are or were partitions of it.
    pub fn numbers(&self) -> Numbers {
        let outgoing = || self.outgoing.iter().chain(&self.cleared);
        let (parts, disks): (Vec<_>, Vec<_>) = outgoing().partition(|outgoing| outgoing.of_part.is_some());
        let present = self.parts.iter().chain(outgoing().flat_map(|outgoing| &outgoing.parts));
        let rdev = |outgoing: &Outgoing| outgoing.disk.rdev;
        Numbers {
            outgoing: disks.into_iter().map(rdev).collect(),
            parts: parts.into_iter().map(rdev).chain(present.map(|part| part.disk().rdev)).collect(),
        }
    }

    /// Lets go of those that nobody has open, as many as can be had in that time; of the others first the next time.
    pub(super) fn release_outgoing(&mut self, room: Room<'_>, within: Duration) {
        let start = Instant::now();
        let mut waiting = std::mem::take(&mut self.outgoing).into_iter();
        let mut kept = Vec::new();
        for outgoing in waiting.by_ref() {
            kept.extend(self.release(outgoing, room));
            if start.elapsed() >= within {
                break;
            }
        }
        // Partitions of what was released.
        let parts = std::mem::take(&mut self.outgoing);
        self.outgoing = waiting.chain(parts).chain(kept).collect();
    }

    fn release(&mut self, outgoing: Outgoing, room: Room<'_>) -> Option<Outgoing> {
        if !outgoing.is_quiet() {
            return Some(outgoing);
        }
        let Outgoing { disk, binding, parts, since, generation, of_part } = outgoing;
        match room.retire(disk) {
            Ok(()) => {
                self.outgoing.extend(parts.into_iter().map(Outgoing::part));
                room.close(binding);
                None
            }
            Err(disk) => Some(Outgoing { disk, binding, parts, since, generation, of_part }),
        }
    }

    /// After LOOP_CLR_FD: lets go of what it was, if nobody has that open any more.
    pub(super) fn look_at_cleared(&mut self, room: Room<'_>) {
        let Some(was) = self.cleared.take() else { return };
        self.cleared = self.release(was, room);
    }

    /// LOOP_CLR_FD came long ago, and what it was is open still.
    pub fn is_to_be_bound_again(&self) -> bool {
        let long_ago = |was: &Outgoing| was.since.elapsed() >= UNBOUND_MAX;
        self.binding.is_none() && self.cleared.as_ref().is_some_and(long_ago)
    }

    /// It becomes what it was, if that is still open. Nobody may be about to open what it is: who closed the one
    /// before opens a free device, and not one that is bound again.
    pub fn bind_again(&mut self, room: Room<'_>) {
        self.look_at_cleared(room);
        let Some(was) = self.cleared.take() else { return };
        let unused = self.disk.replace(was.disk);
        (self.binding, self.parts) = (was.binding, was.parts);
        self.leaving = true;
        self.outgoing.extend(unused.map(Outgoing::bare));
        // The same disk with the same file: names and descriptors that were its are so again.
        self.generation = was.generation;
    }

    /// Waits until its caller of LOOP_CLR_FD may have closed it, not longer than needed or `within`.
    /// True: nobody has what it was open, and it is free.
    pub fn finish_clearing(&mut self, room: Room<'_>, within: Duration) -> bool {
        let early = self.cleared.as_ref().and_then(|was| QUIET.checked_sub(was.since.elapsed()));
        early.into_iter().for_each(|early| std::thread::sleep(early.min(within)));
        self.look_at_cleared(room);
        self.is_free()
    }

    /// Has partitions of outgoing disks go out by themselves.
    pub(super) fn part_outgoing(&mut self) {
        let parts: Vec<_> =
            self.outgoing.iter_mut().flat_map(|outgoing| std::mem::take(&mut outgoing.parts)).collect();
        self.outgoing.extend(parts.into_iter().map(Outgoing::part));
    }

    /// Takes them away for good, as far as they can be had.
    pub(super) fn end_outgoing(&mut self, when: StopMode, room: Room<'_>) {
        self.outgoing.extend(self.cleared.take());
        self.part_outgoing();
        for Outgoing { disk, binding, parts, since, generation, of_part } in
            std::mem::take(&mut self.outgoing)
        {
            match room.remove(disk, when) {
                Ok(()) => room.close(binding),
                Err(disk) => {
                    self.outgoing.push(Outgoing { disk, binding, parts, since, generation, of_part });
                }
            }
        }
    }
}
