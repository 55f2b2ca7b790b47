//! The operations of loop(4), and those of the block layer that concern partitions, as values.
//!
//! Ioctls, FUSE requests and messages all become a [`LoopOp`], which [`Pool::execute`] carries out. Knows what each
//! operation needs and answers. Does not know how one arrives.

use std::os::fd::OwnedFd;

use super::Pool;
use crate::loops::{Answer, Caller, Configure, Errno, Info, PartitionChange, Status, flag};

/// An operation. The first number is the N of loopN.
#[derive(Debug)]
pub enum LoopOp {
    /// LOOP_CTL_GET_FREE. Replies with a number.
    GetFree,
    /// LOOP_CTL_ADD; a negative number: any. Replies with a number.
    Add(i32),
    /// LOOP_CTL_REMOVE. Replies with a number.
    Remove(i32),
    /// LOOP_CONFIGURE and LOOP_SET_FD.
    Configure(u32, Configure),
    /// LOOP_CLR_FD.
    Clear(u32),
    /// LOOP_GET_STATUS64. Replies with a status.
    Status(u32),
    /// LOOP_SET_STATUS64.
    SetStatus(u32, Info),
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

/// What an operation replies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LoopReply {
    /// It is done.
    Done,
    /// N of the loopN that was found, made or removed.
    Number(u32),
    /// What a device is.
    Status(Status),
}

impl LoopReply {
    /// The number; EPROTO if it is none.
    pub fn number(self) -> Answer<u32> {
        if let LoopReply::Number(number) = self { Ok(number) } else { Err(Errno::PROTO) }
    }

    /// The status; EPROTO if it is none.
    pub fn status(self) -> Answer<Status> {
        if let LoopReply::Status(status) = self { Ok(status) } else { Err(Errno::PROTO) }
    }
}

impl Pool {
    /// Carries out `op` for `caller`.
    pub fn execute(&self, op: LoopOp, caller: &dyn Caller) -> Answer<LoopReply> {
        let maker = &self.maker;
        // The disk may be replaced on the way if no descriptor of it is to be: see `change_and_move`.
        let no_descriptor = !caller.has_descriptor();
        let done = match op {
            LoopOp::GetFree => return self.get_free().map(LoopReply::Number),
            LoopOp::Add(number) => return self.add(number).map(LoopReply::Number),
            LoopOp::Remove(number) => return self.remove(number).map(LoopReply::Number),
            LoopOp::Status(number) => return self.status(number).map(LoopReply::Status),
            LoopOp::Configure(number, with) => {
                self.check_file(number, &with)?;
                self.change_and_move(number, no_descriptor, |device| device.configure(with, caller, maker))
            }
            LoopOp::Clear(number) => self.change(number, |device| device.clear(maker)),
            LoopOp::SetStatus(number, info) => {
                let moves = info.flags & flag::PARTSCAN != 0;
                self.change_and_move(number, moves, |device| device.set_status(&info, caller, maker))
            }
            LoopOp::SetCapacity(number) => self.change(number, |device| device.set_capacity(caller)),
            LoopOp::SetDirectIo(number, on) => self.change(number, |device| device.set_direct_io(on, caller)),
            LoopOp::SetBlockSize(number, bytes) => self
                .change_and_move(number, no_descriptor, |device| device.set_block_size(bytes, caller, maker)),
            LoopOp::ChangeFd(number, file) => {
                self.check_closing()?;
                self.check_stack(number, &file)?;
                self.change_and_move(number, true, |device| device.change_fd(file, caller, maker))
            }
            LoopOp::RereadPartitions(number) => {
                self.change_and_move(number, true, |device| device.reread_partitions(caller, maker))
            }
            LoopOp::ChangePartition(number, change) => {
                let moves = matches!(change, PartitionChange::Delete(_));
                self.change_and_move(number, moves, |device| device.change_partition(&change, caller, maker))
            }
        };
        done.map(|()| LoopReply::Done)
    }
}
