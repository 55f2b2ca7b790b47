// SPDX-License-Identifier: Apache-2.0 OR MIT
//! One intercepted mknod(2) of a block node.
//!
//! Knows which nodes are harmless. Nodes of the kernel's loop driver are never made: scripts of
//! containers make /dev/loopN where it is missing, and get the pool's device of that name. Disks of
//! device mapper and md that are stacked on the pool's devices belong to the caller, and the kernel
//! makes their nodes: device number and type are in registers, so the checked values are the used
//! ones. All others are refused: the number belongs to somebody else, or will.

use std::time::Duration;

use super::caller::CallerThread;
use super::calls::{CallAction, IoctlDispatcher};
use super::filter::Abi;
use super::mounts;
use crate::loops::{Errno, LoopOp, OwnerCaller};

/// Major number of the kernel's loop devices.
const LOOP: u32 = 7;
/// Timeout of the creation of a device.
const CREATE_TIMEOUT: Duration = Duration::from_secs(60);
/// Maximum bytes of a path that is examined.
const PATH_MAX: usize = 64;

/// The arguments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MknodCall {
    path: u64,
    rdev: u64,
}

impl MknodCall {
    /// Of mknod(2).
    pub fn new(abi: Abi, args: &[u64; 6]) -> MknodCall {
        MknodCall { path: mounts::address(abi, args, 0), rdev: number(args[2] as u32) }
    }

    /// Of mknodat(2).
    pub fn at(abi: Abi, args: &[u64; 6]) -> MknodCall {
        MknodCall { path: mounts::address(abi, args, 1), rdev: number(args[3] as u32) }
    }
}

/// The kernel's decoding of a 32-bit device number.
fn number(dev: u32) -> u64 {
    rustix::fs::makedev(dev >> 8 & 0xfff, dev & 0xff | dev >> 12 & 0xf_ff00)
}

impl IoctlDispatcher {
    /// Serves an mknod.
    pub fn mknod(&self, thread: &CallerThread<'_>, call: &MknodCall) -> CallAction {
        let minor = rustix::fs::minor(call.rdev);
        if rustix::fs::major(call.rdev) == LOOP {
            let name = format!("/dev/loop{minor}");
            let named = mounts::read_c_string(thread, call.path, PATH_MAX)
                .is_some_and(|path| path == name.as_bytes());
            return CallAction::Answer(if named { self.make_loop(minor) } else { Err(Errno::PERM) });
        }
        match self.loops.may_make_node(call.rdev) {
            true => CallAction::Pass,
            false => CallAction::Answer(Err(Errno::PERM)),
        }
    }

    fn make_loop(&self, number: u32) -> Result<i64, Errno> {
        let number = i32::try_from(self.check_limit(number)?).map_err(|_| Errno::INVAL)?;
        match self.loops.execute(LoopOp::Add(number), &OwnerCaller::with_timeout(CREATE_TIMEOUT)) {
            Ok(_) | Err(Errno::EXIST) => Ok(0),
            Err(errno) => Err(errno),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decodes_device_numbers() {
        for (major, minor) in [(7, 3), (253, 300), (9, 0xf_ffff)] {
            let dev = major << 8 | minor & 0xff | (minor & !0xff) << 12;
            assert_eq!(number(dev), rustix::fs::makedev(major, minor));
        }
        let args = [1, 2, 0x703, 0x704, 0, 0];
        assert_eq!(
            MknodCall::new(Abi::X86_64, &args),
            MknodCall { path: 1, rdev: rustix::fs::makedev(7, 3) }
        );
        assert_eq!(MknodCall::at(Abi::X86_64, &args), MknodCall { path: 2, rdev: rustix::fs::makedev(7, 4) });
    }
}
