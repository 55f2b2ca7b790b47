// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Disks of device mapper and md stacked on a pool's devices: their ownership, and their end.
//!
//! The kernel has one namespace of these disks, and removes none by itself. A disk that is stacked
//! only on disks of the pool belongs to the tenant: the tenant may make nodes of it, and it ends
//! with the pool.

use super::{Pool, lock};
use crate::sys::stack::Stack;

/// Maximum number of published stacked disks of a pool.
const PUBLISHED_STACKS_MAX: usize = 1024;

impl Pool {
    /// Whether the tenant may make a node with this device number. Publishes its disk from then on.
    pub fn may_make_node(&self, rdev: u64) -> bool {
        // Only root can stack disks. Others would fill the table with arrays that never exist.
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
                None => stacks.len() < PUBLISHED_STACKS_MAX && stacks.insert(stack.clone(), there).is_none(),
            }
        };
        if new {
            self.notify_stacked(&stack, true);
        }
        true
    }

    /// Withdraws stacked disks that do not exist any more.
    pub fn withdraw_gone_stacks(&self) {
        let gone: Vec<_> = {
            let mut stacks = lock(&self.stacks);
            let went = |stack: &Stack, seen: &mut bool| !stack.exists() && *seen;
            stacks.iter_mut().for_each(|(stack, seen)| *seen |= stack.exists());
            stacks.extract_if(.., |stack, seen| went(stack, seen)).collect()
        };
        gone.iter().for_each(|(stack, _)| self.notify_stacked(stack, false));
    }

    /// Removes the disks that are stacked only on its devices, and returns them. Their users end
    /// with the tenant. An open disk is removed at its last close.
    pub(super) fn end_stacks(&self) -> Vec<Stack> {
        let entries = self.entries();
        let partitions = entries.iter().flat_map(|entry| &entry.partitions).map(|part| part.rdev);
        let numbers: Vec<u64> = partitions.chain(entries.iter().map(|entry| entry.rdev)).collect();
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
        // From the top of the stack.
        let end = |stack: &Stack| {
            let ended = stack.end();
            ended
                .inspect_err(|error| {
                    tracing::debug!("cannot remove {} on pool {}: {error}", stack.name, self.spec.name)
                })
                .is_ok()
        };
        found.into_iter().rev().filter(end).collect()
    }

    fn notify_stacked(&self, stack: &Stack, is_there: bool) {
        let watchers = lock(&self.watchers).0.clone();
        watchers.iter().for_each(|watcher| watcher.stack_changed(stack, is_there));
    }
}
