//! One stopped ioctl: which operation of the pool it is, and what its caller gets.
//!
//! Knows the numbers and arguments of loop(4), and in which order the driver finds fault with them.
//! Does not know what the operations do ([`crate::loops`]), nor how calls come and go (`supervisor`).

use std::os::fd::AsFd;
use std::sync::Arc;

use rustix::fs::{AtFlags, FileType, OFlags, StatxFlags};

use super::caller::{Administrators, Found, Node, Opener, Thread};
use super::codec::{self, BLKPG_BYTES_MAX, BLKPG_PARTITION_BYTES, CONFIG_BYTES, INFO_BYTES_MAX, Layout};
use super::filter::Abi;
use crate::loops::{Answer, Caller, Configure, Errno, Info, LoopOp, LoopReply, Pool};
use crate::sys::{block, ioctl, usage};

/// The smallest and largest that the kernel takes.
const BLOCK_SIZES: std::ops::RangeInclusive<u32> = 512..=65536;

/// What this room asks of a pool; tests put something else in its place.
pub trait Loops: Send + Sync {
    /// Which loopN this node is.
    fn find(&self, node: &Node) -> Option<u32>;
    /// Gives a caller whose descriptor is of a disk that loopN no longer is one of its disk now.
    fn refresh_descriptor(&self, number: u32, node: &Node, caller: &dyn Caller) -> Answer<()>;
    /// See [`Pool::execute`].
    fn execute(&self, op: LoopOp, caller: &dyn Caller) -> Answer<LoopReply>;
    /// Whether the callers may make a block node with this device number.
    fn may_make(&self, rdev: u64) -> bool;
    /// This node is a partition of a device, or was one.
    fn has_part(&self, node: &Node) -> bool;
    /// Number of the disk whose partition this node is.
    fn sequence(&self, node: &Node) -> Answer<u64>;
}

impl Loops for Arc<Pool> {
    fn find(&self, node: &Node) -> Option<u32> {
        if node.block { Pool::find(self, node.rdev) } else { None }
    }
    fn refresh_descriptor(&self, number: u32, node: &Node, caller: &dyn Caller) -> Answer<()> {
        Pool::refresh_descriptor(self, number, node.rdev, caller)
    }
    fn execute(&self, op: LoopOp, caller: &dyn Caller) -> Answer<LoopReply> {
        Pool::execute(self, op, caller)
    }
    fn may_make(&self, rdev: u64) -> bool {
        Pool::may_make(self, rdev)
    }
    fn has_part(&self, node: &Node) -> bool {
        node.block && Pool::has_part(self, node.rdev)
    }
    fn sequence(&self, node: &Node) -> Answer<u64> {
        Pool::sequence(self, node.rdev)
    }
}

/// Is the node with this device number of its file system, inode number and device number of its
/// own the pool's loop-control?
pub type IsControl = Box<dyn Fn(u64, u64, u64) -> bool + Send + Sync>;

/// What descriptors are compared with.
pub struct Desk {
    pub loops: Box<dyn Loops>,
    pub is_control: IsControl,
    pub administrators: Administrators,
    /// Devices from this number on are not for the callers to bind.
    pub first: u32,
}

/// The arguments of an ioctl, as they were when it was stopped.
#[derive(Clone, Copy, Debug)]
pub struct Ioctl {
    pub abi: Abi,
    pub fd: u32,
    pub command: u32,
    pub argument: u64,
}

impl Ioctl {
    /// The kernel takes 32 bits of the first two; of the third what the caller's registers have.
    pub fn new(abi: Abi, args: &[u64; 6]) -> Ioctl {
        let argument = if abi.is_compat() { args[2] & u64::from(u32::MAX) } else { args[2] };
        Ioctl { abi, fd: args[0] as u32, command: args[1] as u32, argument }
    }

    fn is_of_cache(&self) -> bool {
        self.command == ioctl::BLKFLSBUF || ioctl::BLKBSZSET.contains(&self.command)
    }

    fn is_of_partitions(&self) -> bool {
        matches!(self.command, ioctl::BLKRRPART | ioctl::BLKPG | ioctl::BLKGETDISKSEQ)
    }
}

/// What becomes of a stopped call.
#[derive(Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Its caller gets this.
    Answer(Answer<i64>),
    /// It is none of ours: the kernel may serve it.
    Pass,
}

enum What {
    Control,
    Device(u32, Node),
    Partition(Node),
}

impl Desk {
    /// Serves one ioctl.
    pub fn ioctl(&self, thread: &Thread<'_>, call: &Ioctl) -> Verdict {
        let what = |node: &Node| {
            if (self.is_control)(node.device, node.inode, node.rdev) {
                return Some(What::Control);
            }
            if self.loops.has_part(node) {
                // The block layer answers what a disk is asked as a loop device: ENOTTY.
                let answered = call.is_of_partitions() || call.is_of_cache();
                return answered.then_some(What::Partition(*node));
            }
            // The disk of a device says what its number is.
            if call.command == ioctl::BLKGETDISKSEQ {
                return None;
            }
            self.loops.find(node).map(|number| What::Device(number, *node))
        };
        let Found::This(what, flags) = thread.find(call.fd, what) else {
            return Verdict::Pass;
        };
        Verdict::Answer(if flags.contains(OFlags::PATH) {
            Err(Errno::BADF)
        } else if !thread.waits() {
            Err(Errno::SRCH)
        } else {
            let administrators = self.administrators;
            let caller = Opener { thread, fd: call.fd, flags, administrators };
            match what {
                What::Control if call.is_of_cache() => Err(Errno::NOTTY),
                What::Device(_, node) | What::Partition(node) if call.is_of_cache() => {
                    cache(&node, call, &caller).map(|()| 0)
                }
                What::Partition(node) if call.command == ioctl::BLKGETDISKSEQ => {
                    let sequence = self.loops.sequence(&node);
                    sequence.and_then(|seq| thread.write(call.argument, &seq.to_le_bytes())).map(|()| 0)
                }
                What::Partition(_) => self.partitions(None, call, &caller).map(|()| 0),
                What::Control if call.is_of_partitions() => Err(Errno::NOTTY),
                What::Device(number, node) if call.is_of_partitions() => {
                    let current = self.loops.refresh_descriptor(number, &node, &caller);
                    current.and_then(|()| self.partitions(Some(number), call, &caller)).map(|()| 0)
                }
                What::Control => self.control(call, &caller).map(i64::from),
                What::Device(number, node) => {
                    let current = self.loops.refresh_descriptor(number, &node, &caller);
                    current.and_then(|()| self.device(number, call, &caller)).map(|()| 0)
                }
            }
        })
    }

    /// Nothing that these do needs to be undone for a caller that is gone: devices are the pool's.
    fn control(&self, call: &Ioctl, caller: &Opener<'_>) -> Answer<u32> {
        // The driver takes an int.
        let number = (call.argument as u32).cast_signed();
        match call.command {
            ioctl::LOOP_CTL_ADD => {
                self.within(u32::try_from(number).unwrap_or(0))?;
                self.loops.execute(LoopOp::Add(number), caller)?.number()
            }
            ioctl::LOOP_CTL_REMOVE => self.loops.execute(LoopOp::Remove(number), caller)?.number(),
            ioctl::LOOP_CTL_GET_FREE => self.within(self.loops.execute(LoopOp::GetFree, caller)?.number()?),
            _ => Err(Errno::NOSYS),
        }
    }

    pub(super) fn within(&self, number: u32) -> Answer<u32> {
        if number < self.first { Ok(number) } else { Err(Errno::NOSPC) }
    }

    /// BLKRRPART and BLKPG of a device; none: of a partition. The block layer's, and by its rules.
    fn partitions(&self, number: Option<u32>, call: &Ioctl, caller: &Opener<'_>) -> Answer<()> {
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

    fn device(&self, number: u32, call: &Ioctl, caller: &Opener<'_>) -> Answer<()> {
        let Ioctl { argument, .. } = *call;
        let thread = caller.thread;
        let layout = Layout::of(call.abi);
        let status = || self.loops.execute(LoopOp::Status(number), caller)?.status();
        let op = match call.command {
            ioctl::LOOP_SET_FD => {
                self.within(number)?;
                let file = thread.take(argument as u32)?;
                LoopOp::Configure(number, Configure { file, block_size: 0, info: Info::default() })
            }
            ioctl::LOOP_CONFIGURE => {
                self.within(number)?;
                let (fd, block_size, info) = codec::config(&thread.read::<CONFIG_BYTES>(argument)?);
                LoopOp::Configure(number, Configure { file: thread.take(fd)?, block_size, info })
            }
            ioctl::LOOP_CHANGE_FD => LoopOp::ChangeFd(number, thread.take(argument as u32)?),
            ioctl::LOOP_CLR_FD => LoopOp::Clear(number),
            ioctl::LOOP_SET_STATUS => {
                let mut bytes = [0; INFO_BYTES_MAX];
                allowed(caller)?;
                thread.read_into(argument, &mut bytes[..layout.bytes])?;
                LoopOp::SetStatus(number, codec::info(&bytes, layout))
            }
            ioctl::LOOP_SET_STATUS64 => {
                allowed(caller)?;
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
            // The driver takes an unsigned int.
            ioctl::LOOP_SET_BLOCK_SIZE => LoopOp::SetBlockSize(number, (argument as u32).into()),
            // What the driver does not know is found out elsewhere for programs of 32 bits.
            _ if call.abi.is_compat() => return Err(Errno::NOTTY),
            _ => return Err(Errno::INVAL),
        };
        self.loops.execute(op, caller).map(drop)
    }
}

/// What the kernel allows root of the machine only. BLKFLSBUF writes the page cache back and drops it. BLKBSZSET says
/// in which pieces the page cache works, which changes no byte: it is left as it is.
fn cache(node: &Node, call: &Ioctl, caller: &Opener<'_>) -> Answer<()> {
    if !caller.is_admin() {
        return Err(Errno::ACCESS);
    }
    if call.command == ioctl::BLKFLSBUF {
        let file = caller.thread.take(call.fd)?;
        // By now it may be another file, perhaps of a file system that never answers.
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

/// The driver asks this before it copies the argument; the pool asks again.
fn allowed(caller: &Opener<'_>) -> Answer<()> {
    if caller.writes() || caller.is_admin() { Ok(()) } else { Err(Errno::PERM) }
}
