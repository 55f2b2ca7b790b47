//! A device whose user is gone, for the next.

use super::{Device, Room, flag};
use crate::loops::maker::{Disk, let_go};

impl Device {
    /// Unbinds it. Who has it open keeps that disk until its last close; with force another disk takes
    /// its place at once, and nothing is behind the old one any more. True: it is as new.
    pub fn reset(&mut self, room: Room<'_>, by_force: bool) -> bool {
        if let Some(binding) = &mut self.binding {
            // The reaper goes on where this ends.
            binding.info.flags |= flag::AUTOCLEAR;
        }
        self.reap(room);
        if by_force {
            let mounted = self.leave_mounts();
            self.leaving.extend(mounted.map(|disk| (disk, None)));
            if self.binding.is_some() {
                match room.make(512) {
                    Ok(disk) => self.give_way_to(disk),
                    Err(error) => tracing::warn!(%error, number = self.number, "a loop device stays bound"),
                }
            }
            for (disk, binding) in &mut self.leaving {
                disk.withdraw();
                let_go(binding.take());
            }
        }
        if self.disk.is_none() {
            self.disk = room.make(512).ok();
            self.generation += 1;
        }
        self.is_free()
    }

    fn give_way_to(&mut self, disk: Disk) {
        self.drop_parts();
        if let Some(old) = self.disk.replace(disk) {
            self.leaving.push((old, self.binding.take()));
        }
        self.generation += 1;
        self.cleared = None;
    }
}
