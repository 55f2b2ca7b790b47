// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The files that a device of a pool may be bound to.
//!
//! Knows the pool's devices and their backing files. Does not know how a file is opened.

use std::collections::BTreeSet;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{FileType, fstat};

use super::Pool;
use crate::loops::file_binding::check_kind;
use crate::loops::{Answer, Errno, LoopConfig};

/// Maximum depth of loop devices that back each other.
const STACK_DEPTH_MAX: usize = 8;

impl Pool {
    /// Refuses a file that this device may not be bound to.
    pub(super) fn check_file(&self, number: u32, with: &LoopConfig) -> Answer<()> {
        check_kind(&with.file, &self.allocator.shared().claims)?;
        if self.slot(number)?.is_published_bound() {
            return Err(Errno::BUSY);
        }
        self.check_closing()?;
        self.check_stack(number, &with.file)
    }

    pub(super) fn check_closing(&self) -> Answer<()> {
        if self.allocator.has_too_many_closing() { Err(Errno::BUSY) } else { Ok(()) }
    }

    /// Refuses a device as its own backing file, directly or through others of this pool, and
    /// stacks that are too deep.
    pub(super) fn check_stack(&self, number: u32, file: &OwnedFd) -> Answer<()> {
        let stat = fstat(file.as_fd())?;
        let is_block = FileType::from_raw_mode(stat.st_mode) == FileType::BlockDevice;
        let mut below = is_block.then_some(stat.st_rdev);
        let mut seen = BTreeSet::from([number]);
        while let Some(next) = below.and_then(|rdev| self.find(rdev)) {
            if !seen.insert(next) || seen.len() > STACK_DEPTH_MAX {
                return Err(Errno::BADF);
            }
            let slot = self.slot(next)?;
            let device = slot.lock()?;
            // As in the kernel: an unbound device backs nothing.
            if !device.is_bound() {
                return Err(Errno::INVAL);
            }
            below = device.backing_device();
        }
        Ok(())
    }
}
