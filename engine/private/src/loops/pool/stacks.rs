//! Disks of device mapper and md upon a pool's devices: whose they are, and their end.
//!
//! The kernel has one list of them for all of the machine, and nobody but their maker ends them. Those whose every
//! disk below is the pool's are its tenant's: it may have nodes of them, and they go with the pool.

use super::{Pool, lock};
use crate::sys::stack::Stack;

/// Those that are shown of a pool, at the most.
const SHOWN_MAX: usize = 1024;

impl Pool {
    /// Whether its tenant may make a node with this device number. From then on its disk is shown, while there is one.
    pub fn may_make(&self, rdev: u64) -> bool {
        // Only root maps. Others would fill lists with arrays that never come.
        if self.spec.uid != 0 {
            return false;
        }
        let ours = |rdev| self.has_disk(rdev);
        let whole = || Stack::numbered(rdev).filter(|stack| stack.lies_on(&ours));
        let Some(stack) = Stack::to_be(rdev).or_else(whole) else { return false };
        let there = stack.exists();
        let new = {
            let mut stacks = lock(&self.stacks);
            match stacks.get_mut(&stack) {
                Some(seen) => {
                    *seen = there;
                    false
                }
                None => stacks.len() < SHOWN_MAX && stacks.insert(stack.clone(), there).is_none(),
            }
        };
        if new {
            self.tell_of(&stack, true);
        }
        true
    }

    /// Shows those no longer that are gone.
    pub fn look_after_stacks(&self) {
        let gone: Vec<_> = {
            let mut stacks = lock(&self.stacks);
            let went = |stack: &Stack, seen: &mut bool| !stack.exists() && *seen;
            stacks.iter_mut().for_each(|(stack, seen)| *seen |= stack.exists());
            stacks.extract_if(.., |stack, seen| went(stack, seen)).collect()
        };
        gone.iter().for_each(|(stack, _)| self.tell_of(stack, false));
    }

    /// Ends all that lie on its devices only, and answers which: their users have gone with the tenant, or are about
    /// to. One that is open ends at its last close.
    pub(super) fn end_stacks(&self) -> Vec<Stack> {
        let entries = self.entries();
        let parts = entries.iter().flat_map(|entry| &entry.partitions).map(|part| part.rdev);
        let numbers: Vec<u64> = parts.chain(entries.iter().map(|entry| entry.rdev)).collect();
        let ours = |rdev| self.has_disk(rdev);
        let mut found: Vec<Stack> = Vec::new();
        let mut below = numbers;
        while let Some(rdev) = below.pop() {
            for stack in Stack::upon(rdev) {
                if !found.contains(&stack) && stack.lies_on(&ours) {
                    below.push(stack.rdev);
                    found.push(stack);
                }
            }
        }
        // The uppermost first.
        let end = |stack: &Stack| {
            let ended = stack.end();
            ended
                .inspect_err(|error| tracing::debug!("{} upon pool {}: {error}", stack.name, self.spec.name))
                .is_ok()
        };
        found.into_iter().rev().filter(end).collect()
    }

    fn tell_of(&self, stack: &Stack, is_there: bool) {
        let watchers = lock(&self.watchers).0.clone();
        watchers.iter().for_each(|watcher| watcher.stacked(stack, is_there));
    }
}
