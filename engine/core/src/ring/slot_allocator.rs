// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Allocates the slots that the devices of an instance, or the disks of a pool, have on its
//! workers.
//!
//! A slot that is allocated again gets another generation: so a worker distinguishes a late
//! completion from one of the present device. Knows numbers, not devices.

use std::sync::{Mutex, MutexGuard, PoisonError};

use super::SlotId;

/// The slots of one set of workers.
#[derive(Debug, Default)]
pub struct SlotAllocator(Mutex<SlotTable>);

#[derive(Debug, Default)]
struct SlotTable {
    /// How often each slot was allocated; unallocated slots are in `free`.
    generations: Vec<u32>,
    free: Vec<u16>,
}

impl SlotAllocator {
    fn table(&self) -> MutexGuard<'_, SlotTable> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Allocates a free slot.
    pub fn allocate(&self) -> SlotId {
        let mut slots = self.table();
        let index = slots.free.pop().unwrap_or_else(|| {
            slots.generations.push(0);
            (slots.generations.len() - 1) as u16
        });
        let generation = &mut slots.generations[usize::from(index)];
        let slot = SlotId { index, generation: *generation & 0xff_ffff };
        *generation = generation.wrapping_add(1);
        slot
    }

    /// Frees a slot, on which nothing is in flight any more.
    pub fn free(&self, slot: SlotId) {
        self.table().free.push(slot.index);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reuses_slots_under_another_generation() {
        let slots = SlotAllocator::default();
        let (first, second) = (slots.allocate(), slots.allocate());
        assert_eq!((first.index, second.index), (0, 1));
        slots.free(first);
        let again = slots.allocate();
        assert_eq!((again.index, again.generation), (0, first.generation + 1));
    }
}
