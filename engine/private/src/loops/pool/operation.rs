// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The operations of loop(4), and those of the block layer on partitions, as values.
//!
//! Ioctls, FUSE requests and messages all become a [`LoopOp`], which [`Pool::execute`] runs. Knows
//! the arguments and the result of each operation. Does not know how one arrives.

use std::os::fd::OwnedFd;

use super::Pool;
use crate::loops::{Answer, Errno, LoopCaller, LoopConfig, LoopInfo, LoopStatus, PartitionChange, flag};

/// An operation. The first number is the N of loopN.
#[derive(Debug)]
pub enum LoopOp {
    /// LOOP_CTL_GET_FREE. Returns a number.
    GetFree,
    /// LOOP_CTL_ADD; a negative number: any. Returns a number.
    Add(i32),
    /// LOOP_CTL_REMOVE. Returns a number.
    Remove(i32),
    /// LOOP_CONFIGURE and LOOP_SET_FD.
    Configure(u32, LoopConfig),
    /// LOOP_CLR_FD.
    Clear(u32),
    /// LOOP_GET_STATUS64. Returns a status.
    Status(u32),
    /// LOOP_SET_STATUS64.
    SetStatus(u32, LoopInfo),
    /// LOOP_SET_CAPACITY.
    SetCapacity(u32),
    /// LOOP_SET_DIRECT_IO.
    SetDirectIo(u32, bool),
    /// LOOP_SET_BLOCK_SIZE, in bytes.
    SetBlockSize(u32, u64),
    /// LOOP_CHANGE_FD.
    ChangeFd(u32, OwnedFd),
    /// BLKRRPART.
    RereadPartitions(u32),
    /// BLKPG.
    ChangePartition(u32, PartitionChange),
}

/// The result of an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LoopReply {
    /// Success, without a value.
    Done,
    /// N of the loopN that was found, added or removed.
    Number(u32),
    /// The status of a device.
    Status(LoopStatus),
}

impl LoopReply {
    /// The number; EPROTO if there is none.
    pub fn number(self) -> Answer<u32> {
        if let LoopReply::Number(number) = self { Ok(number) } else { Err(Errno::PROTO) }
    }

    /// The status; EPROTO if there is none.
    pub fn status(self) -> Answer<LoopStatus> {
        if let LoopReply::Status(status) = self { Ok(status) } else { Err(Errno::PROTO) }
    }
}

impl Pool {
    /// Runs `op` for `caller`.
    pub fn execute(&self, op: LoopOp, caller: &dyn LoopCaller) -> Answer<LoopReply> {
        let allocator = &self.allocator;
        // Without a descriptor the operation may replace the disk: see `change_replacing`.
        let no_descriptor = !caller.has_descriptor();
        let done = match op {
            LoopOp::GetFree => return self.get_free().map(LoopReply::Number),
            LoopOp::Add(number) => return self.add(number).map(LoopReply::Number),
            LoopOp::Remove(number) => return self.remove(number).map(LoopReply::Number),
            LoopOp::Status(number) => return self.status(number).map(LoopReply::Status),
            LoopOp::Configure(number, with) => {
                self.check_file(number, &with)?;
                self.change_replacing(number, no_descriptor, |device| {
                    device.configure(with, caller, allocator)
                })
            }
            LoopOp::Clear(number) => self.change(number, |device| device.clear(allocator)),
            LoopOp::SetStatus(number, info) => {
                let moves = info.flags & flag::PARTSCAN != 0;
                self.change_replacing(number, moves, |device| device.set_status(&info, caller, allocator))
            }
            LoopOp::SetCapacity(number) => self.change(number, |device| device.set_capacity(caller)),
            LoopOp::SetDirectIo(number, on) => self.change(number, |device| device.set_direct_io(on, caller)),
            LoopOp::SetBlockSize(number, bytes) => self.change_replacing(number, no_descriptor, |device| {
                device.set_block_size(bytes, caller, allocator)
            }),
            LoopOp::ChangeFd(number, file) => {
                self.check_closing()?;
                self.check_stack(number, &file)?;
                self.change_replacing(number, true, |device| device.change_fd(file, caller, allocator))
            }
            LoopOp::RereadPartitions(number) => {
                self.change_replacing(number, true, |device| device.reread_partitions(caller, allocator))
            }
            LoopOp::ChangePartition(number, change) => {
                let moves = matches!(change, PartitionChange::Delete(_));
                self.change_replacing(number, moves, |device| {
                    device.change_partition(&change, caller, allocator)
                })
            }
        };
        done?;
        self.watch_unmounts(caller);
        Ok(LoopReply::Done)
    }
}
