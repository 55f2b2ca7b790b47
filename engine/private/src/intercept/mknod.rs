//! One stopped mknod(2) of a block node.
//!
//! Knows which are harmless. A node of the kernel's loop driver is nobody's here: scripts of containers make
//! /dev/loopN where it is missing, and get the device of that name. Disks of device mapper and md upon the pool's devices
//! are the caller's, and the kernel makes the node: device number and type came in registers, so that what
//! was looked at is what is made. All others are somebody else's, or will be: a number outlives its disk.

use std::time::Duration;

use super::caller::Thread;
use super::calls::{Desk, Verdict};
use super::filter::Abi;
use super::mounts;
use crate::loops::{Errno, LoopOp, Owner};

/// Major number of the kernel's loop devices.
const LOOP: u32 = 7;
/// How long a device may take to be made.
const MADE_WITHIN: Duration = Duration::from_secs(60);
/// Bytes of a path that is looked at.
const PATH_MAX: usize = 64;

/// The arguments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mknod {
    path: u64,
    rdev: u64,
}

impl Mknod {
    /// Of mknod(2).
    pub fn new(abi: Abi, args: &[u64; 6]) -> Mknod {
        Mknod { path: mounts::address(abi, args, 0), rdev: number(args[2] as u32) }
    }

    /// Of mknodat(2).
    pub fn at(abi: Abi, args: &[u64; 6]) -> Mknod {
        Mknod { path: mounts::address(abi, args, 1), rdev: number(args[3] as u32) }
    }
}

/// What the kernel makes of the 32 bits that it takes.
fn number(dev: u32) -> u64 {
    rustix::fs::makedev(dev >> 8 & 0xfff, dev & 0xff | dev >> 12 & 0xf_ff00)
}

impl Desk {
    /// Serves one.
    pub fn mknod(&self, thread: &Thread<'_>, call: &Mknod) -> Verdict {
        let minor = rustix::fs::minor(call.rdev);
        if rustix::fs::major(call.rdev) == LOOP {
            let name = format!("/dev/loop{minor}");
            let named = mounts::text(thread, call.path, PATH_MAX).is_some_and(|path| path == name.as_bytes());
            return Verdict::Answer(if named { self.make_loop(minor) } else { Err(Errno::PERM) });
        }
        match self.loops.may_make(call.rdev) {
            true => Verdict::Pass,
            false => Verdict::Answer(Err(Errno::PERM)),
        }
    }

    fn make_loop(&self, number: u32) -> Result<i64, Errno> {
        let number = i32::try_from(self.within(number)?).map_err(|_| Errno::INVAL)?;
        match self.loops.execute(LoopOp::Add(number), &Owner::waiting(MADE_WITHIN)) {
            Ok(_) | Err(Errno::EXIST) => Ok(0),
            Err(errno) => Err(errno),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_devices() {
        for (major, minor) in [(7, 3), (253, 300), (9, 0xf_ffff)] {
            let dev = major << 8 | minor & 0xff | (minor & !0xff) << 12;
            assert_eq!(number(dev), rustix::fs::makedev(major, minor));
        }
        let args = [1, 2, 0x703, 0x704, 0, 0];
        assert_eq!(Mknod::new(Abi::X86_64, &args), Mknod { path: 1, rdev: rustix::fs::makedev(7, 3) });
        assert_eq!(Mknod::at(Abi::X86_64, &args), Mknod { path: 2, rdev: rustix::fs::makedev(7, 4) });
    }
}
