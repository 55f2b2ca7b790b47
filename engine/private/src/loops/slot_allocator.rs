// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Slots of disks on the workers of one pool.
//!
//! A slot that is allocated again gets another generation: a worker tells a late completion from
//! one of the present disk.

use std::sync::{Mutex, PoisonError};

use crate::ring::SlotId;

/// Allocates slots on the workers.
#[derive(Debug, Default)]
pub struct SlotAllocator(Mutex<SlotTable>);

#[derive(Debug, Default)]
struct SlotTable {
    generations: Vec<u32>,
    free: Vec<u16>,
}

impl SlotAllocator {
    fn table(&self) -> std::sync::MutexGuard<'_, SlotTable> {
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
        *generation += 1;
        SlotId { index, generation: *generation & 0xff_ffff }
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
