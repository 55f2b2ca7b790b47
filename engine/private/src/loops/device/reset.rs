//! A device whose user is gone, for the next.

use super::outgoing::Outgoing;
use super::{Device, Room, flag};

impl Device {
    /// Unbinds it. Who has it open keeps that disk until its last close; with force another disk takes
    /// its place at once, and nothing is behind the old one any more. True: it is as new.
    pub fn reset(&mut self, room: Room<'_>, by_force: bool) -> bool {
        if let Some(binding) = &mut self.binding {
            // The reaper goes on where this ends.
            binding.info.flags |= flag::AUTOCLEAR;
        }
        self.reap(room);
        if self.is_to_be_unbound() {
            self.unbind(room);
        }
        if by_force {
            let mounted = self.leave_mounts();
            self.outgoing.extend(mounted.map(Outgoing::bare));
            self.outgoing.extend(self.cleared.take());
            if self.binding.is_some() {
                match room.make(512) {
                    Ok(disk) => {
                        self.drop_parts();
                        let old = self.put_out(disk);
                        self.outgoing.extend(old);
                    }
                    Err(error) => tracing::warn!(%error, number = self.number, "a loop device stays bound"),
                }
            }
            self.part_outgoing();
            for outgoing in &mut self.outgoing {
                outgoing.disk.withdraw();
                room.close(outgoing.binding.take());
            }
        }
        if self.disk.is_none() {
            self.disk = room.make(512).ok();
            self.renew_generation();
        }
        self.is_free()
    }
}
