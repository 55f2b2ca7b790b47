// SPDX-License-Identifier: Apache-2.0 OR MIT
//! One intercepted ioctl: its operation of the pool, and its result.
//!
//! Knows the numbers and arguments of loop(4), and the order of the driver's checks. Does not know
//! what the operations do ([`crate::loops`]), nor when calls arrive and end (`supervisor`).

use std::os::fd::AsFd;
use std::sync::Arc;

use rustix::fs::{AtFlags, FileType, OFlags, StatxFlags};

use super::caller::{Administrators, CallerThread, DeviceFd, FdNode, Lookup};
use super::codec::{self, BLKPG_BYTES_MAX, BLKPG_PARTITION_BYTES, CONFIG_BYTES, INFO_BYTES_MAX, Layout};
use super::filter::Abi;
use crate::loops::{Answer, Errno, LoopCaller, LoopConfig, LoopInfo, LoopOp, LoopReply, Pool};
use crate::sys::{block, ioctl, usage};

/// The block sizes that the kernel accepts.
const BLOCK_SIZES: std::ops::RangeInclusive<u32> = 512..=65536;

/// The interface that this module needs of a pool; tests have a fake.
pub trait PoolOps: Send + Sync {
    /// The loopN of this node.
    fn find(&self, node: &FdNode) -> Option<u32>;
    /// Replaces a caller's descriptor of a former disk of loopN by one of its present disk.
    fn refresh_descriptor(&self, number: u32, node: &FdNode, caller: &dyn LoopCaller) -> Answer<()>;
    /// See [`Pool::execute`].
    fn execute(&self, op: LoopOp, caller: &dyn LoopCaller) -> Answer<LoopReply>;
    /// Whether callers may make a block node with this device number.
    fn may_make_node(&self, rdev: u64) -> bool;
    /// Whether this node is a present or former partition of a device.
    fn is_partition(&self, node: &FdNode) -> bool;
    /// Disk sequence number of the device of this partition.
    fn disk_sequence(&self, node: &FdNode) -> Answer<u64>;
}

impl PoolOps for Arc<Pool> {
    fn find(&self, node: &FdNode) -> Option<u32> {
        if node.block { Pool::find(self, node.rdev) } else { None }
    }
    fn refresh_descriptor(&self, number: u32, node: &FdNode, caller: &dyn LoopCaller) -> Answer<()> {
        Pool::refresh_descriptor(self, number, node.rdev, caller)
    }
    fn execute(&self, op: LoopOp, caller: &dyn LoopCaller) -> Answer<LoopReply> {
        Pool::execute(self, op, caller)
    }
    fn may_make_node(&self, rdev: u64) -> bool {
        Pool::may_make_node(self, rdev)
    }
    fn is_partition(&self, node: &FdNode) -> bool {
        node.block && Pool::is_partition(self, node.rdev)
    }
    fn disk_sequence(&self, node: &FdNode) -> Answer<u64> {
        Pool::disk_sequence(self, node.rdev)
    }
}

/// Whether a node is the pool's loop-control. Arguments: device number of its file system, inode
/// number, its own device number.
pub type IsControl = Box<dyn Fn(u64, u64, u64) -> bool + Send + Sync>;

/// Dispatches intercepted ioctls to a pool.
pub struct IoctlDispatcher {
    /// The pool.
    pub loops: Box<dyn PoolOps>,
    /// Identifies the pool's loop-control.
    pub is_control: IsControl,
    /// The administrators of the pool.
    pub administrators: Administrators,
    /// Callers may not bind devices from this number on.
    pub device_limit: u32,
}

/// The arguments of an ioctl, as in the notification.
#[derive(Clone, Copy, Debug)]
pub struct IoctlCall {
    /// The ABI of the call.
    pub abi: Abi,
    /// The caller's descriptor.
    pub fd: u32,
    /// The request number.
    pub command: u32,
    /// A value or an address, depending on `command`.
    pub argument: u64,
}

impl IoctlCall {
    /// The kernel uses 32 bits of the first two, and the caller's register width of the third.
    pub fn new(abi: Abi, args: &[u64; 6]) -> IoctlCall {
        let argument = if abi.is_compat() { args[2] & u64::from(u32::MAX) } else { args[2] };
        IoctlCall { abi, fd: args[0] as u32, command: args[1] as u32, argument }
    }

    fn is_cache_ioctl(&self) -> bool {
        self.command == ioctl::BLKFLSBUF || ioctl::BLKBSZSET.contains(&self.command)
    }

    fn is_partition_ioctl(&self) -> bool {
        matches!(self.command, ioctl::BLKRRPART | ioctl::BLKPG | ioctl::BLKGETDISKSEQ)
    }
}

/// What happens to an intercepted call.
#[derive(Debug, PartialEq, Eq)]
pub enum CallAction {
    /// The caller gets this result.
    Answer(Answer<i64>),
    /// The kernel serves it.
    Pass,
}

enum IoctlTarget {
    Control,
    Device(u32, FdNode),
    Partition(FdNode),
}

impl IoctlDispatcher {
    /// Serves an ioctl.
    pub fn ioctl(&self, thread: &CallerThread<'_>, call: &IoctlCall) -> CallAction {
        let what = |node: &FdNode| {
            if (self.is_control)(node.device, node.inode, node.rdev) {
                return Some(IoctlTarget::Control);
            }
            if self.loops.is_partition(node) {
                // The block layer refuses ioctls of loop(4) on other disks: ENOTTY.
                let answered = call.is_partition_ioctl() || call.is_cache_ioctl();
                return answered.then_some(IoctlTarget::Partition(*node));
            }
            // The disk of a device has its sequence number itself.
            if call.command == ioctl::BLKGETDISKSEQ {
                return None;
            }
            self.loops.find(node).map(|number| IoctlTarget::Device(number, *node))
        };
        let Lookup::Match(what, flags) = thread.find(call.fd, what) else {
            return CallAction::Pass;
        };
        CallAction::Answer(if flags.contains(OFlags::PATH) {
            Err(Errno::BADF)
        } else if !thread.is_waiting() {
            Err(Errno::SRCH)
        } else {
            let administrators = self.administrators;
            let caller = DeviceFd { thread, fd: call.fd, flags, administrators };
            match what {
                IoctlTarget::Control if call.is_cache_ioctl() => Err(Errno::NOTTY),
                IoctlTarget::Device(_, node) | IoctlTarget::Partition(node) if call.is_cache_ioctl() => {
                    cache_ioctl(&node, call, &caller).map(|()| 0)
                }
                IoctlTarget::Partition(node) if call.command == ioctl::BLKGETDISKSEQ => {
                    let sequence = self.loops.disk_sequence(&node);
                    sequence.and_then(|seq| thread.write(call.argument, &seq.to_le_bytes())).map(|()| 0)
                }
                IoctlTarget::Partition(_) => self.partitions(None, call, &caller).map(|()| 0),
                IoctlTarget::Control if call.is_partition_ioctl() => Err(Errno::NOTTY),
                IoctlTarget::Device(number, node) if call.is_partition_ioctl() => {
                    let current = self.loops.refresh_descriptor(number, &node, &caller);
                    current.and_then(|()| self.partitions(Some(number), call, &caller)).map(|()| 0)
                }
                IoctlTarget::Control => self.control(call, &caller).map(i64::from),
                IoctlTarget::Device(number, node) => {
                    let current = self.loops.refresh_descriptor(number, &node, &caller);
                    current.and_then(|()| self.device(number, call, &caller)).map(|()| 0)
                }
            }
        })
    }

    /// The devices belong to the pool, so nothing is undone if the caller is gone.
    fn control(&self, call: &IoctlCall, caller: &DeviceFd<'_>) -> Answer<u32> {
        // The driver uses an int.
        let number = (call.argument as u32).cast_signed();
        match call.command {
            ioctl::LOOP_CTL_ADD => {
                self.check_limit(u32::try_from(number).unwrap_or(0))?;
                self.loops.execute(LoopOp::Add(number), caller)?.number()
            }
            ioctl::LOOP_CTL_REMOVE => self.loops.execute(LoopOp::Remove(number), caller)?.number(),
            ioctl::LOOP_CTL_GET_FREE => {
                self.check_limit(self.loops.execute(LoopOp::GetFree, caller)?.number()?)
            }
            _ => Err(Errno::NOSYS),
        }
    }

    pub(super) fn check_limit(&self, number: u32) -> Answer<u32> {
        if number < self.device_limit { Ok(number) } else { Err(Errno::NOSPC) }
    }

    /// BLKRRPART and BLKPG of a device; none: of a partition. With the checks of the block layer.
    fn partitions(&self, number: Option<u32>, call: &IoctlCall, caller: &DeviceFd<'_>) -> Answer<()> {
        if call.command == ioctl::BLKRRPART {
            return match number {
                _ if !caller.is_admin() => Err(Errno::ACCESS),
                Some(number) => self.loops.execute(LoopOp::RereadPartitions(number), caller).map(drop),
                None => Err(Errno::INVAL),
            };
        }
        let mut bytes = [0; BLKPG_BYTES_MAX];
        caller.thread.read_into(call.argument, &mut bytes[..codec::blkpg_bytes(call.abi)])?;
        let (operation, address) = codec::blkpg(&bytes, call.abi);
        if !caller.is_admin() {
            return Err(Errno::ACCESS);
        }
        let partition = caller.thread.read::<BLKPG_PARTITION_BYTES>(address)?;
        let number = number.ok_or(Errno::INVAL)?;
        let change = codec::blkpg_partition(operation, &partition)?;
        self.loops.execute(LoopOp::ChangePartition(number, change), caller).map(drop)
    }

    fn device(&self, number: u32, call: &IoctlCall, caller: &DeviceFd<'_>) -> Answer<()> {
        let IoctlCall { argument, .. } = *call;
        let thread = caller.thread;
        let layout = Layout::of(call.abi);
        let status = || self.loops.execute(LoopOp::Status(number), caller)?.status();
        let op = match call.command {
            ioctl::LOOP_SET_FD => {
                self.check_limit(number)?;
                let file = thread.take(argument as u32)?;
                LoopOp::Configure(number, LoopConfig { file, block_size: 0, info: LoopInfo::default() })
            }
            ioctl::LOOP_CONFIGURE => {
                self.check_limit(number)?;
                let (fd, block_size, info) = codec::config(&thread.read::<CONFIG_BYTES>(argument)?);
                LoopOp::Configure(number, LoopConfig { file: thread.take(fd)?, block_size, info })
            }
            ioctl::LOOP_CHANGE_FD => LoopOp::ChangeFd(number, thread.take(argument as u32)?),
            ioctl::LOOP_CLR_FD => LoopOp::Clear(number),
            ioctl::LOOP_SET_STATUS => {
                let mut bytes = [0; INFO_BYTES_MAX];
                check_may_change(caller)?;
                thread.read_into(argument, &mut bytes[..layout.bytes])?;
                LoopOp::SetStatus(number, codec::info(&bytes, layout))
            }
            ioctl::LOOP_SET_STATUS64 => {
                check_may_change(caller)?;
                LoopOp::SetStatus(number, codec::info64(&thread.read(argument)?))
            }
            ioctl::LOOP_GET_STATUS | ioctl::LOOP_GET_STATUS64 if argument == 0 => return Err(Errno::INVAL),
            ioctl::LOOP_GET_STATUS => {
                let bytes = codec::status(&status()?, layout)?;
                return thread.write(argument, &bytes[..layout.bytes]);
            }
            ioctl::LOOP_GET_STATUS64 => return thread.write(argument, &codec::status64(&status()?)),
            ioctl::LOOP_SET_CAPACITY => LoopOp::SetCapacity(number),
            ioctl::LOOP_SET_DIRECT_IO => LoopOp::SetDirectIo(number, argument != 0),
            // The driver uses an unsigned int.
            ioctl::LOOP_SET_BLOCK_SIZE => LoopOp::SetBlockSize(number, (argument as u32).into()),
            // For 32-bit programs the compat handler refuses unknown commands.
            _ if call.abi.is_compat() => return Err(Errno::NOTTY),
            _ => return Err(Errno::INVAL),
        };
        self.loops.execute(op, caller).map(drop)
    }
}

/// Ioctls that the kernel allows only root of the machine. BLKFLSBUF writes back and drops the page
/// cache. BLKBSZSET sets the block size of the page cache, which changes no data: it has no effect.
fn cache_ioctl(node: &FdNode, call: &IoctlCall, caller: &DeviceFd<'_>) -> Answer<()> {
    if !caller.is_admin() {
        return Err(Errno::ACCESS);
    }
    if call.command == ioctl::BLKFLSBUF {
        let file = caller.thread.take(call.fd)?;
        // The descriptor may have another file by now, of a file system that never answers.
        let stat =
            rustix::fs::statx(&file, "", AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC, StatxFlags::TYPE)?;
        let rdev = rustix::fs::makedev(stat.stx_rdev_major, stat.stx_rdev_minor);
        let is_block = FileType::from_raw_mode(stat.stx_mode.into()) == FileType::BlockDevice;
        return match is_block && rdev == node.rdev {
            true => block::flush(file.as_fd()),
            false => Err(Errno::BADF),
        };
    }
    if call.argument == 0 {
        return Err(Errno::INVAL);
    }
    let bytes = u32::from_ne_bytes(caller.thread.read(call.argument)?);
    let fits = bytes.is_power_of_two() && BLOCK_SIZES.contains(&bytes);
    match fits && u64::from(bytes) >= usage::logical_block_size(node.rdev).unwrap_or(0) {
        true => Ok(()),
        false => Err(Errno::INVAL),
    }
}

/// The driver checks this before it copies the argument. The pool checks it again.
fn check_may_change(caller: &DeviceFd<'_>) -> Answer<()> {
    if caller.can_write() || caller.is_admin() { Ok(()) } else { Err(Errno::PERM) }
}
