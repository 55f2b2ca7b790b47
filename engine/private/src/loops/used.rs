//! Disks that have made way for their successors, and are put away in their own time.
//!
//! Whoever waits for a last close waits for the successor, not for the driver to free what was there
//! before it: that takes as long again. Knows neither pools nor what a disk showed; no worker has any of
//! these any more.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::instance::served::Served;
use crate::ring::SlotId;

/// Disks that wait at the most; whoever brings one more helps.
const WAITING_MAX: usize = 8;

/// Slots on the workers: how often each was let, and which are free.
#[derive(Debug, Default)]
pub struct Slots(Mutex<Let>);

#[derive(Debug, Default)]
struct Let {
    generations: Vec<u32>,
    free: Vec<u16>,
}

impl Slots {
    /// One that nobody has.
    pub fn take(&self) -> SlotId {
        let mut slots = lock(&self.0);
        let index = slots.free.pop().unwrap_or_else(|| {
            slots.generations.push(0);
            (slots.generations.len() - 1) as u16
        });
        let generation = &mut slots.generations[usize::from(index)];
        *generation += 1;
        SlotId { index, generation: *generation & 0xff_ffff }
    }

    /// Nothing on it is in flight any more.
    pub fn give_back(&self, slot: SlotId) {
        lock(&self.0).free.push(slot.index);
    }
}

/// All of a pool.
#[derive(Clone, Debug)]
pub struct Drawer(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    slots: Arc<Slots>,
    waiting: Mutex<Waiting>,
    /// Held from taking one until it is gone.
    working: Mutex<()>,
}

#[derive(Debug, Default)]
struct Waiting {
    /// Stopped, taken from the workers, and without a file.
    used: VecDeque<Box<Served>>,
    /// There is a thread for them.
    attended: bool,
}

impl Drawer {
    /// An empty one; slots of what is put away are given back to `slots`.
    pub fn new(slots: Arc<Slots>) -> Drawer {
        Drawer(Arc::new(Shared { slots, waiting: Mutex::default(), working: Mutex::default() }))
    }

    /// Puts one away, now or soon.
    pub fn put(&self, used: Box<Served>) {
        let start = {
            let mut waiting = lock(&self.0.waiting);
            waiting.used.push_back(used);
            let full = waiting.used.len() > WAITING_MAX;
            (!std::mem::replace(&mut waiting.attended, true), full)
        };
        let helps = match start {
            (true, _) => {
                let other = self.clone();
                let thread = std::thread::Builder::new().name("put-away".into());
                thread.spawn(move || other.empty()).is_err()
            }
            (false, full) => full,
        };
        if helps {
            self.empty();
        }
    }

    /// Comes back when nothing is left in it: the daemon may end then.
    pub fn empty(&self) {
        while self.one() {}
    }

    /// Puts the oldest away; false: there is none.
    fn one(&self) -> bool {
        let Shared { slots, waiting, working } = &*self.0;
        let _one_at_a_time = lock(working);
        let next = {
            let mut waiting = lock(waiting);
            let next = waiting.used.pop_front();
            waiting.attended &= next.is_some();
            next
        };
        let Some(disk) = next else { return false };
        match disk.delete() {
            Ok(()) => slots.give_back(disk.slot()),
            // Its place on the workers stays taken, as does its number.
            Err(error) => tracing::error!(%error, "a used disk cannot be deleted"),
        }
        true
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_let_again_under_another_generation() {
        let slots = Slots::default();
        let (first, second) = (slots.take(), slots.take());
        assert_eq!((first.index, second.index), (0, 1));
        slots.give_back(first);
        let again = slots.take();
        assert_eq!((again.index, again.generation), (0, first.generation + 1));
    }

    #[test]
    fn an_empty_drawer_is_empty() {
        let drawer = Drawer::new(Arc::default());
        drawer.empty();
        assert!(!lock(&drawer.0.waiting).attended);
    }
}
