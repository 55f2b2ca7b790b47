// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Children that are copies of this process; and where another process is.

use std::io;
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};

use rustix::process::Pid;

/// Where a process is: its root directory, its working directory, its mount namespace.
pub type ProcFds = [OwnedFd; 3];

/// That this process has one thread. Whoever has it starts no other.
#[derive(Debug)]
pub struct Alone(());

impl Alone {
    /// Looks. Needs /proc.
    pub fn check() -> io::Result<Alone> {
        match std::fs::read_dir("/proc/self/task")?.count() {
            1 => Ok(Alone(())),
            _ => Err(io::Error::other("there is more than one thread")),
        }
    }

    /// Starts a child that does this and nothing else: no destructor of the parent's runs in it.
    pub fn fork(&self, work: impl FnOnce()) -> io::Result<Pid> {
        // SAFETY: the only thread is the one that goes on in the child, so nothing that another held
        // stays locked; whoever made `self` has looked, and starts none.
        let pid = unsafe { libc::fork() };
        if pid == 0 {
            let done = catch_unwind(AssertUnwindSafe(work));
            // SAFETY: ends the process, at once; takes an integer.
            unsafe { libc::_exit(i32::from(done.is_err())) }
        }
        Pid::from_raw(pid).filter(|_| pid > 0).ok_or_else(io::Error::last_os_error)
    }
}
