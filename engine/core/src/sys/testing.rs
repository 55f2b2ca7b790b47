// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Calls that only tests make, also those of other crates (feature `testing`).

use std::io;
use std::os::fd::AsRawFd;

/// What a system call fails with whose arguments are all -1.
pub fn errno_of(number: libc::c_long) -> Option<i32> {
    // SAFETY: for tests of filters that refuse it; no call finds anything at this address.
    let result = unsafe { libc::syscall(number, -1, -1, -1, -1, -1, -1) };
    if result == -1 { io::Error::last_os_error().raw_os_error() } else { None }
}

/// An ioctl whose argument is a number.
pub fn ioctl(file: &std::fs::File, command: u32, argument: u64) -> io::Result<i32> {
    // SAFETY: for tests of drivers that take the argument for a number, not for an address.
    match unsafe { libc::ioctl(file.as_raw_fd(), command as libc::Ioctl, argument) } {
        -1 => Err(io::Error::last_os_error()),
        done => Ok(done),
    }
}
