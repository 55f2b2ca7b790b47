// SPDX-License-Identifier: Apache-2.0 OR MIT
//! io_uring_enter with a registered ring descriptor, which saves a file lookup per call.
//!
//! The io-uring crate supports this only on a borrowed `Submitter`, which a struct that owns its
//! ring cannot keep. So this file makes the two system calls.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::time::Duration;

use io_uring::IoUring;

const ENTER_GETEVENTS: u32 = 1 << 0;
const ENTER_EXT_ARG: u32 = 1 << 3;
const ENTER_REGISTERED_RING: u32 = 1 << 4;
const REGISTER_RING_FDS: u32 = 20;

/// `struct io_uring_rsrc_update` of <linux/io_uring.h>.
#[repr(C)]
struct Update {
    offset: u32,
    reserved: u32,
    data: u64,
}

/// `struct io_uring_getevents_arg` of <linux/io_uring.h>; its timespec has 64-bit fields, as here.
#[repr(C)]
struct WaitArguments {
    sigmask: u64,
    sigmask_bytes: u32,
    reserved: u32,
    time: u64,
}

/// The descriptor by which the calling thread passes its ring to the kernel.
#[derive(Clone, Copy, Debug)]
pub struct RingHandle {
    fd: RawFd,
    flags: u32,
}

impl RingHandle {
    /// Registers the ring for the calling thread; falls back to its file descriptor.
    pub fn of(ring: &IoUring) -> RingHandle {
        let fd = ring.as_raw_fd();
        let mut update = Update { offset: u32::MAX, reserved: 0, data: fd as u64 };
        // SAFETY: one update, valid for the duration of the call, as the kernel's structure.
        let done = unsafe {
            libc::syscall(libc::SYS_io_uring_register, fd, REGISTER_RING_FDS, &raw mut update, 1u32)
        };
        match (done, RawFd::try_from(update.offset)) {
            (1, Ok(index)) => RingHandle { fd: index, flags: ENTER_REGISTERED_RING },
            _ => RingHandle { fd, flags: 0 },
        }
    }

    /// Submits `submit` entries, runs task work, and waits for `want` completions. Returns how many
    /// entries were submitted.
    pub fn enter(self, submit: u32, want: u32) -> io::Result<u32> {
        let flags = self.flags | ENTER_GETEVENTS;
        // SAFETY: integers, and no signal set.
        let done = unsafe {
            let none = std::ptr::null::<libc::c_void>();
            libc::syscall(libc::SYS_io_uring_enter, self.fd, submit, want, flags, none, 0usize)
        };
        u32::try_from(done).map_err(|_| io::Error::last_os_error())
    }

    /// The same with a timeout. If it passes and nothing was submitted, fails with ETIME.
    pub fn enter_within(self, submit: u32, want: u32, timeout: Duration) -> io::Result<u32> {
        let flags = self.flags | ENTER_GETEVENTS | ENTER_EXT_ARG;
        let time = libc::timespec {
            tv_sec: timeout.as_secs().try_into().unwrap_or(libc::time_t::MAX),
            tv_nsec: timeout.subsec_nanos().into(),
        };
        let wait = WaitArguments { sigmask: 0, sigmask_bytes: 0, reserved: 0, time: &raw const time as u64 };
        // SAFETY: integers, and structures of the kernel's layout that outlive the call.
        let done = unsafe {
            let size = size_of::<WaitArguments>();
            libc::syscall(libc::SYS_io_uring_enter, self.fd, submit, want, flags, &raw const wait, size)
        };
        u32::try_from(done).map_err(|_| io::Error::last_os_error())
    }
}
