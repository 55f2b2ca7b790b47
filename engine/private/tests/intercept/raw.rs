// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Raw system calls of a client: any number, any argument, of either ABI.
//!
//! The only file of these tests with `unsafe`.

use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use loopengine_core::sys::seccomp;

/// Result of a call: its value, or errno.
pub type Done = Result<i64, i32>;

/// ioctl(2) of this program's own ABI.
pub fn ioctl(fd: RawFd, command: u64, argument: u64) -> Done {
    // SAFETY: addresses among the arguments are those of memory that the callers below own, or of
    // none at all, which the kernel refuses.
    match unsafe { libc::syscall(libc::SYS_ioctl, fd, command, argument) } {
        -1 => Err(errno()),
        value => Ok(value),
    }
}

/// ioctl(2) as an i386 program calls it.
#[cfg(target_arch = "x86_64")]
pub fn ioctl32(fd: RawFd, command: u32, argument: u32) -> Done {
    let mut value: i32 = 54;
    // SAFETY: as above; rbx is LLVM's own and put back, and the call keeps all but these registers.
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

fn errno() -> i32 {
    std::io::Error::last_os_error().raw_os_error().unwrap()
}

/// Memory below 4 GiB, followed by an inaccessible page.
pub fn low_memory(pages: usize) -> *mut u8 {
    map(pages, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_32BIT)
}

/// Memory that may be read only.
pub fn read_only_memory() -> *mut u8 {
    map(1, libc::PROT_READ, 0)
}

fn map(pages: usize, protection: i32, flags: i32) -> *mut u8 {
    let flags = flags | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: new memory, which nothing in Rust knows of.
    unsafe {
        let whole = libc::mmap(std::ptr::null_mut(), (pages + 1) * 4096, libc::PROT_NONE, flags, -1, 0);
        assert_ne!(whole, libc::MAP_FAILED);
        assert_eq!(libc::mprotect(whole, pages * 4096, protection), 0);
        whole.cast()
    }
}

/// Writes to memory of [`low_memory`], which another thread may be using.
pub fn poke(at: *mut u8, bytes: &[u8]) {
    for (offset, &byte) in bytes.iter().enumerate() {
        // SAFETY: the callers stay inside of what they mapped.
        unsafe { at.add(offset).write_volatile(byte) }
    }
}

/// Installs the filter and sends the listener over the socket at stdin.
pub fn install_and_send(program: &[libc::sock_filter]) {
    let listener = seccomp::install_with_listener(program).unwrap();
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = rustix::net::SendAncillaryBuffer::new(&mut space);
    let fds = [std::os::fd::AsFd::as_fd(&listener)];
    assert!(control.push(rustix::net::SendAncillaryMessage::ScmRights(&fds)));
    let data = [std::io::IoSlice::new(b"x")];
    let stdin = rustix::stdio::stdin();
    rustix::net::sendmsg(stdin, &data, &mut control, rustix::net::SendFlags::empty()).unwrap();
}

/// Duplicates a file to this descriptor number.
pub fn dup2(file: &OwnedFd, onto: RawFd) {
    // SAFETY: the number is one that the callers use by number only.
    assert_eq!(unsafe { libc::dup2(file.as_raw_fd(), onto) }, onto);
}

/// fork(2): returns the process id in the parent and 0 in the child, which only makes system calls.
pub fn fork() -> i32 {
    // SAFETY: these programs have one thread when they call it.
    unsafe { libc::fork() }
}

/// Gives this thread a table of descriptors of its own.
pub fn unshare_files() {
    // SAFETY: the thread uses its descriptors by number only.
    unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::FILES) }.unwrap();
}

/// Installs an empty handler of SIGALRM, without SA_RESTART, and a fast periodic timer.
pub fn storm_of_signals(every_us: i64) {
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

/// Drops all capabilities.
pub fn become_nobody() {
    // SAFETY: takes integers.
    unsafe {
        assert_eq!(libc::setgroups(0, std::ptr::null()), 0);
        assert_eq!(libc::setresgid(65534, 65534, 65534), 0);
        assert_eq!(libc::setresuid(65534, 65534, 65534), 0);
    }
}

/// mount(2) of a source in memory that can be written.
pub fn mount(source: &mut [u8], target: &std::ffi::CStr, kind: &std::ffi::CStr, flags: u64) -> Done {
    let source = source.as_mut_ptr().cast();
    // SAFETY: the texts outlive the call, and the kernel reads each up to a NUL or its limit.
    match unsafe { libc::mount(source, target.as_ptr(), kind.as_ptr(), flags, std::ptr::null()) } {
        -1 => Err(errno()),
        value => Ok(value.into()),
    }
}

/// mount(2) without a source.
pub fn mount_without_source(target: &std::ffi::CStr, kind: &std::ffi::CStr) -> Done {
    // SAFETY: as above.
    match unsafe { libc::mount(std::ptr::null(), target.as_ptr(), kind.as_ptr(), 0, std::ptr::null()) } {
        -1 => Err(errno()),
        value => Ok(value.into()),
    }
}

/// fsopen(2).
pub fn fsopen(kind: &std::ffi::CStr) -> Done {
    // SAFETY: as above.
    match unsafe { libc::syscall(430, kind.as_ptr(), 0) } {
        -1 => Err(errno()),
        value => Ok(value),
    }
}

/// fsconfig(2) with FSCONFIG_SET_STRING and a wrong file descriptor.
pub fn fsconfig(key: &std::ffi::CStr, value: &mut [u8]) -> Done {
    // SAFETY: as above.
    match unsafe { libc::syscall(431, -1, 1, key.as_ptr(), value.as_mut_ptr(), 0) } {
        -1 => Err(errno()),
        value => Ok(value),
    }
}

/// mknod(2), which the C library does not call.
#[cfg(target_arch = "x86_64")]
pub fn mknod(path: &std::ffi::CStr, mode: u32) -> Done {
    // SAFETY: the path ends with a NUL and outlives the call.
    match unsafe { libc::syscall(libc::SYS_mknod, path.as_ptr(), mode, 0x10307) } {
        -1 => Err(errno()),
        value => Ok(value),
    }
}
