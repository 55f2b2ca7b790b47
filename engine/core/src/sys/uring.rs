// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What rings may do beyond what their makers restrict themselves: all rings of this process, and those
//! that a library makes and keeps to itself.
//!
//! Knows io_uring_register(2) and /proc/self/fd; does not know which operations anybody needs.

use std::io;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

const REGISTER_RESTRICTIONS: u32 = 11;
const REGISTER_ENABLE_RINGS: u32 = 12;
/// Kinds of `struct io_uring_restriction`: what it names is allowed.
const REGISTRATION: u16 = 0;
const OPERATION: u16 = 1;
const FLAGS: u16 = 2;

/// Whether [`restrict_all`] has succeeded.
static ALL: AtomicBool = AtomicBool::new(false);

/// `struct io_uring_restriction` of <linux/io_uring.h>.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Restriction {
    kind: u16,
    allowed: u8,
    reserved: [u8; 13],
}

/// `struct io_uring_task_restriction`, with room for all that there are.
#[repr(C)]
struct Task {
    flags: u16,
    number: u16,
    reserved: [u32; 3],
    rules: [Restriction; 32],
}

/// Restricts all rings that this thread, and whatever it starts, makes from now on (Linux 7.0). It must not be
/// able to gain privileges. Such rings cannot be restricted any further.
pub fn restrict_all(operations: &[u8], registrations: &[u8], flags: u8) -> io::Result<()> {
    let rules = operations.iter().map(|&allowed| (OPERATION, allowed));
    let rules = rules.chain(registrations.iter().map(|&allowed| (REGISTRATION, allowed)));
    let mut task = Task { flags: 0, number: 0, reserved: [0; 3], rules: [Restriction::default(); 32] };
    for (kind, allowed) in rules.chain([(FLAGS, flags)]) {
        let rule = task.rules.get_mut(usize::from(task.number)).ok_or(io::ErrorKind::InvalidInput)?;
        *rule = Restriction { kind, allowed, ..Restriction::default() };
        task.number += 1;
    }
    register(-1, REGISTER_RESTRICTIONS, (&raw const task).cast(), 1)?;
    ALL.store(true, Relaxed);
    Ok(())
}

/// Whether a ring that cannot be restricted is restricted as all are.
pub fn is_covered(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EBUSY) && ALL.load(Relaxed)
}

/// Enables all rings of this process that are disabled still (IORING_SETUP_R_DISABLED), and has them refuse
/// every operation from then on, unless they are restricted already. Returns how many there were.
pub fn seal_disabled() -> io::Result<usize> {
    let mut sealed = 0;
    for entry in std::fs::read_dir("/proc/self/fd")?.flatten() {
        let fd = entry.file_name().to_str().and_then(|name| name.parse().ok());
        let is_ring =
            std::fs::read_link(entry.path()).is_ok_and(|link| link.ends_with("anon_inode:[io_uring]"));
        let Some(fd) = fd.filter(|_| is_ring) else { continue };
        // What is listed is allowed: no operation is.
        let rule = Restriction { kind: FLAGS, ..Restriction::default() };
        match register(fd, REGISTER_RESTRICTIONS, (&raw const rule).cast(), 1) {
            // It is enabled already, another thread's alone, or restricted already (what 6.12 says first).
            Err(error)
                if matches!(error.raw_os_error(), Some(libc::EBADFD | libc::EEXIST | libc::EACCES)) =>
            {
                continue;
            }
            Err(error) if is_covered(&error) => {}
            restricted => restricted?,
        }
        register(fd, REGISTER_ENABLE_RINGS, std::ptr::null(), 0)?;
        sealed += 1;
    }
    Ok(sealed)
}

fn register(ring: RawFd, operation: u32, argument: *const u8, number: u32) -> io::Result<()> {
    // SAFETY: the kernel reads structures of its own layout, as many as they say, at `argument`, which outlive
    // the call; both operations change nothing in this process' memory.
    match unsafe { libc::syscall(libc::SYS_io_uring_register, ring, operation, argument, number) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
