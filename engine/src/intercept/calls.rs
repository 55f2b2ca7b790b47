//! One stopped ioctl: which operation of the pool it is, and what its caller gets.
//!
//! Knows the numbers and arguments of loop(4), and in which order the driver finds fault with them.
//! Does not know what the operations do ([`crate::loops`]), nor how calls come and go (`supervisor`).

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{AtFlags, FileType, OFlags, StatxFlags};

use super::caller::{Administrators, Found, Node, Opener, Thread};
use super::codec::{self, BLKPG_BYTES_MAX, BLKPG_PARTITION_BYTES, CONFIG_BYTES, INFO_BYTES_MAX, Layout};
use super::filter::Abi;
use crate::loops::{Answer, Caller, Configure, Errno, Info, PartitionChange, Pool, Status};
use crate::sys::{block, usage};

// linux/loop.h.
const LOOP_SET_FD: u32 = 0x4c00;
const LOOP_CLR_FD: u32 = 0x4c01;
const LOOP_SET_STATUS: u32 = 0x4c02;
const LOOP_GET_STATUS: u32 = 0x4c03;
const LOOP_SET_STATUS64: u32 = 0x4c04;
const LOOP_GET_STATUS64: u32 = 0x4c05;
const LOOP_CHANGE_FD: u32 = 0x4c06;
const LOOP_SET_CAPACITY: u32 = 0x4c07;
const LOOP_SET_DIRECT_IO: u32 = 0x4c08;
const LOOP_SET_BLOCK_SIZE: u32 = 0x4c09;
const LOOP_CONFIGURE: u32 = 0x4c0a;
const LOOP_CTL_ADD: u32 = 0x4c80;
const LOOP_CTL_REMOVE: u32 = 0x4c81;
const LOOP_CTL_GET_FREE: u32 = 0x4c82;
// linux/fs.h and linux/blkpg.h.
const BLKRRPART: u32 = 0x125f;
const BLKPG: u32 = 0x1269;
const BLKGETDISKSEQ: u32 = 0x8008_1280;
const BLKFLSBUF: u32 = 0x1261;
const BLKBSZSET: [u32; 2] = [0x4008_1271, 0x4004_1271];
/// The smallest and largest that the kernel takes.
const BLOCK_SIZES: std::ops::RangeInclusive<u32> = 512..=65536;

/// What this room asks of a pool; tests put something else in its place.
pub trait Loops: Send + Sync {
    /// Which loopN this node is.
    fn find(&self, node: &Node) -> Option<u32>;
    /// Gives a caller whose descriptor is of a disk that loopN no longer is one of its disk now.
    fn refresh_descriptor(&self, number: u32, node: &Node, caller: &dyn Caller) -> Answer<()>;
    fn get_free(&self) -> Answer<u32>;
    fn add(&self, number: i32) -> Answer<u32>;
    fn remove(&self, number: i32) -> Answer<u32>;
    fn configure(&self, number: u32, with: Configure, caller: &dyn Caller) -> Answer<()>;
    fn clear(&self, number: u32, caller: &dyn Caller) -> Answer<()>;
    fn status(&self, number: u32) -> Answer<Status>;
    fn set_status(&self, number: u32, info: &Info, caller: &dyn Caller) -> Answer<()>;
    fn set_capacity(&self, number: u32, caller: &dyn Caller) -> Answer<()>;
    fn set_direct_io(&self, number: u32, on: bool, caller: &dyn Caller) -> Answer<()>;
    fn set_block_size(&self, number: u32, bytes: u64, caller: &dyn Caller) -> Answer<()>;
    fn change_fd(&self, number: u32, file: OwnedFd, caller: &dyn Caller) -> Answer<()>;
    /// Whether the callers may make a block node with this device number.
    fn may_make(&self, rdev: u64) -> bool;
    /// This node is a partition of a device, or was one.
    fn has_part(&self, node: &Node) -> bool;
    /// Number of the disk whose partition this node is.
    fn sequence(&self, node: &Node) -> Answer<u64>;
    fn reread_partitions(&self, number: u32, caller: &dyn Caller) -> Answer<()>;
    fn change_partition(&self, number: u32, change: &PartitionChange, caller: &dyn Caller) -> Answer<()>;
}

impl Loops for Arc<Pool> {
    fn find(&self, node: &Node) -> Option<u32> {
        if node.block { Pool::find(self, node.rdev) } else { None }
    }
    fn refresh_descriptor(&self, number: u32, node: &Node, caller: &dyn Caller) -> Answer<()> {
        Pool::refresh_descriptor(self, number, node.rdev, caller)
    }
    fn get_free(&self) -> Answer<u32> {
        Pool::get_free(self)
    }
    fn add(&self, number: i32) -> Answer<u32> {
        Pool::add(self, number)
    }
    fn remove(&self, number: i32) -> Answer<u32> {
        Pool::remove(self, number)
    }
    fn configure(&self, number: u32, with: Configure, caller: &dyn Caller) -> Answer<()> {
        Pool::configure(self, number, with, caller)
    }
    fn clear(&self, number: u32, caller: &dyn Caller) -> Answer<()> {
        Pool::clear(self, number, caller)
    }
    fn status(&self, number: u32) -> Answer<Status> {
        Pool::status(self, number)
    }
    fn set_status(&self, number: u32, info: &Info, caller: &dyn Caller) -> Answer<()> {
        Pool::set_status(self, number, info, caller)
    }
    fn set_capacity(&self, number: u32, caller: &dyn Caller) -> Answer<()> {
        Pool::set_capacity(self, number, caller)
    }
    fn set_direct_io(&self, number: u32, on: bool, caller: &dyn Caller) -> Answer<()> {
        Pool::set_direct_io(self, number, on, caller)
    }
    fn set_block_size(&self, number: u32, bytes: u64, caller: &dyn Caller) -> Answer<()> {
        Pool::set_block_size(self, number, bytes, caller)
    }
    fn change_fd(&self, number: u32, file: OwnedFd, caller: &dyn Caller) -> Answer<()> {
        Pool::change_fd(self, number, file, caller)
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
    fn reread_partitions(&self, number: u32, caller: &dyn Caller) -> Answer<()> {
        Pool::reread_partitions(self, number, caller)
    }
    fn change_partition(&self, number: u32, change: &PartitionChange, caller: &dyn Caller) -> Answer<()> {
        Pool::change_partition(self, number, change, caller)
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
        self.command == BLKFLSBUF || BLKBSZSET.contains(&self.command)
    }

    fn is_of_partitions(&self) -> bool {
        matches!(self.command, BLKRRPART | BLKPG | BLKGETDISKSEQ)
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
            if call.command == BLKGETDISKSEQ {
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
                What::Partition(node) if call.command == BLKGETDISKSEQ => {
                    let sequence = self.loops.sequence(&node);
                    sequence.and_then(|seq| thread.write(call.argument, &seq.to_le_bytes())).map(|()| 0)
                }
                What::Partition(_) => self.partitions(None, call, &caller).map(|()| 0),
                What::Control if call.is_of_partitions() => Err(Errno::NOTTY),
                What::Device(number, node) if call.is_of_partitions() => {
                    let current = self.loops.refresh_descriptor(number, &node, &caller);
                    current.and_then(|()| self.partitions(Some(number), call, &caller)).map(|()| 0)
                }
                What::Control => self.control(call).map(i64::from),
                What::Device(number, node) => {
                    let current = self.loops.refresh_descriptor(number, &node, &caller);
                    current.and_then(|()| self.device(number, call, &caller)).map(|()| 0)
                }
            }
        })
    }

    /// Nothing that these do needs to be undone for a caller that is gone: devices are the pool's.
    fn control(&self, call: &Ioctl) -> Answer<u32> {
        // The driver takes an int.
        let number = (call.argument as u32).cast_signed();
        match call.command {
            LOOP_CTL_ADD => {
                self.within(u32::try_from(number).unwrap_or(0))?;
                self.loops.add(number)
            }
            LOOP_CTL_REMOVE => self.loops.remove(number),
            LOOP_CTL_GET_FREE => self.within(self.loops.get_free()?),
            _ => Err(Errno::NOSYS),
        }
    }

    pub(super) fn within(&self, number: u32) -> Answer<u32> {
        if number < self.first { Ok(number) } else { Err(Errno::NOSPC) }
    }

    /// BLKRRPART and BLKPG of a device; none: of a partition. The block layer's, and by its rules.
    fn partitions(&self, number: Option<u32>, call: &Ioctl, caller: &Opener<'_>) -> Answer<()> {
        if call.command == BLKRRPART {
            return match number {
                _ if !caller.is_admin() => Err(Errno::ACCESS),
                Some(number) => self.loops.reread_partitions(number, caller),
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
        self.loops.change_partition(number, &codec::blkpg_partition(operation, &partition)?, caller)
    }

    fn device(&self, number: u32, call: &Ioctl, caller: &Opener<'_>) -> Answer<()> {
        let Ioctl { argument, .. } = *call;
        let thread = caller.thread;
        let layout = Layout::of(call.abi);
        match call.command {
            LOOP_SET_FD => {
                self.within(number)?;
                let file = thread.take(argument as u32)?;
                self.loops.configure(number, Configure { file, block_size: 0, info: Info::default() }, caller)
            }
            LOOP_CONFIGURE => {
                self.within(number)?;
                let (fd, block_size, info) = codec::config(&thread.read::<CONFIG_BYTES>(argument)?);
                let file = thread.take(fd)?;
                self.loops.configure(number, Configure { file, block_size, info }, caller)
            }
            LOOP_CHANGE_FD => self.loops.change_fd(number, thread.take(argument as u32)?, caller),
            LOOP_CLR_FD => self.loops.clear(number, caller),
            LOOP_SET_STATUS => {
                let mut bytes = [0; INFO_BYTES_MAX];
                allowed(caller)?;
                thread.read_into(argument, &mut bytes[..layout.bytes])?;
                self.loops.set_status(number, &codec::info(&bytes, layout), caller)
            }
            LOOP_SET_STATUS64 => {
                allowed(caller)?;
                let info = codec::info64(&thread.read(argument)?);
                self.loops.set_status(number, &info, caller)
            }
            LOOP_GET_STATUS | LOOP_GET_STATUS64 if argument == 0 => Err(Errno::INVAL),
            LOOP_GET_STATUS => {
                let bytes = codec::status(&self.loops.status(number)?, layout)?;
                thread.write(argument, &bytes[..layout.bytes])
            }
            LOOP_GET_STATUS64 => thread.write(argument, &codec::status64(&self.loops.status(number)?)),
            LOOP_SET_CAPACITY => self.loops.set_capacity(number, caller),
            LOOP_SET_DIRECT_IO => self.loops.set_direct_io(number, argument != 0, caller),
            // The driver takes an unsigned int.
            LOOP_SET_BLOCK_SIZE => self.loops.set_block_size(number, (argument as u32).into(), caller),
            // What the driver does not know is found out elsewhere for programs of 32 bits.
            _ if call.abi.is_compat() => Err(Errno::NOTTY),
            _ => Err(Errno::INVAL),
        }
    }
}

/// What the kernel allows root of the machine only. BLKFLSBUF writes the page cache back and drops it. BLKBSZSET says
/// in which pieces the page cache works, which changes no byte: it is left as it is.
fn cache(node: &Node, call: &Ioctl, caller: &Opener<'_>) -> Answer<()> {
    if !caller.is_admin() {
        return Err(Errno::ACCESS);
    }
    if call.command == BLKFLSBUF {
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
