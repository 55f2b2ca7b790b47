// SPDX-License-Identifier: Apache-2.0 OR MIT
//! System calls as programs in other languages make them: any number, any argument, by either ABI.
//!
//! The only file of these tests with `unsafe`: there is no safe interface for such calls.

use std::os::fd::RawFd;

/// Result of a call: its value, or errno.
pub(crate) type Done = Result<i64, i32>;

/// Bytes of a page.
pub(crate) const PAGE: usize = 4096;

/// ioctl(2) of this program's own ABI.
pub(crate) fn ioctl(fd: RawFd, command: u64, argument: u64) -> Done {
    // SAFETY: addresses among the arguments are those of a `Memory`, or invalid, which the kernel
    // refuses.
    match unsafe { libc::syscall(libc::SYS_ioctl, fd, command, argument) } {
        -1 => Err(std::io::Error::last_os_error().raw_os_error().unwrap_or(0)),
        value => Ok(value),
    }
}

/// ioctl(2) as an i386 program calls it.
#[cfg(target_arch = "x86_64")]
pub(crate) fn ioctl32(fd: RawFd, command: u32, argument: u32) -> Done {
    let mut value: i32 = 54;
    // SAFETY: as above; rbx, which LLVM reserves, is restored, and the call preserves all other
    // registers.
    unsafe {
        std::arch::asm!(
            "xchg {fd:r}, rbx",
            "int 0x80",
            "xchg {fd:r}, rbx",
            fd = inout(reg) i64::from(fd) => _,
            inout("eax") value,
            in("ecx") command,
            in("edx") argument,
            out("r8") _, out("r9") _, out("r10") _, out("r11") _,
        );
    }
    if value < 0 { Err(-value) } else { Ok(value.into()) }
}

/// Other architectures have no such programs.
#[cfg(not(target_arch = "x86_64"))]
pub(crate) fn ioctl32(_fd: RawFd, _command: u32, _argument: u32) -> Done {
    Err(libc::ENOSYS)
}

/// A page below 2 GiB, followed by an inaccessible page.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Memory(*mut u8);

// SAFETY: Rust has no reference to this memory; threads access it concurrently, as volatile bytes.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    /// A new page of zeroes, which is never unmapped.
    pub(crate) fn new(writable: bool) -> Memory {
        let flags = libc::MAP_32BIT | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let protection = if writable { libc::PROT_READ | libc::PROT_WRITE } else { libc::PROT_READ };
        // SAFETY: new memory, to which Rust has no reference.
        unsafe {
            let whole = libc::mmap(std::ptr::null_mut(), 2 * PAGE, libc::PROT_NONE, flags, -1, 0);
            assert_ne!(whole, libc::MAP_FAILED);
            assert_eq!(libc::mprotect(whole, PAGE, protection), 0);
            Memory(whole.cast())
        }
    }

    /// Its address.
    pub(crate) fn address(self) -> u64 {
        self.0.expose_provenance() as u64
    }

    /// Writes to its beginning; other threads may do so concurrently.
    pub(crate) fn put(self, bytes: &[u8]) {
        for (at, &byte) in bytes.iter().take(PAGE).enumerate() {
            // SAFETY: within the page.
            unsafe { self.0.add(at).write_volatile(byte) }
        }
    }

    /// Reads from its beginning.
    pub(crate) fn get(self, len: usize) -> Vec<u8> {
        // SAFETY: within the page.
        (0..len.min(PAGE)).map(|at| unsafe { self.0.add(at).read_volatile() }).collect()
    }
}

/// mount(2) with this memory as every path, whatever it contains at the moment.
pub(crate) fn mount(paths: Memory) -> Done {
    let at = paths.address();
    // SAFETY: the memory is never unmapped, and an inaccessible page follows it.
    match unsafe { libc::syscall(libc::SYS_mount, at, at, c"ext4".as_ptr(), 0, at) } {
        -1 => Err(std::io::Error::last_os_error().raw_os_error().unwrap_or(0)),
        value => Ok(value),
    }
}

/// Duplicates a descriptor to this number.
pub(crate) fn dup2(from: RawFd, onto: RawFd) {
    // SAFETY: the callers use this descriptor by its number only.
    assert_eq!(unsafe { libc::dup2(from, onto) }, onto);
}

/// Closes the descriptor with this number.
pub(crate) fn close(fd: RawFd) {
    // SAFETY: as above. It may be closed already.
    unsafe { libc::close(fd) };
}

/// Sends SIGALRM at this interval to a handler that does nothing and does not restart calls; 0
/// stops it.
pub(crate) fn storm_of_signals(every_us: i64) {
    extern "C" fn nothing(_: i32) {}
    let every = libc::timeval { tv_sec: 0, tv_usec: every_us };
    let timer = libc::itimerval { it_interval: every, it_value: every };
    // SAFETY: the structs are complete, and the handler touches nothing.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = nothing as extern "C" fn(i32) as usize;
        assert_eq!(libc::sigaction(libc::SIGALRM, &raw const action, std::ptr::null_mut()), 0);
        assert_eq!(libc::setitimer(libc::ITIMER_REAL, &raw const timer, std::ptr::null_mut()), 0);
    }
}
