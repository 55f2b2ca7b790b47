// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The memory of another thread's process.
//!
//! Knows process_vm_readv(2), /proc/TID/mem and /proc/TID/maps. Does not know whether the thread is
//! still the one that is meant: thread ids are used again, so the caller of this module must ask that
//! after [`read`], and between [`Writable::open`] and [`Writable::write`].

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileExt;

use rustix::fs::{Mode, OFlags, openat};
use rustix::process::Pid;

/// linux/fs.h, Linux 6.11: `_IOWR('f', 17, struct procmap_query)`.
const PROCMAP_QUERY: libc::Ioctl = 0xc068_6611_u32 as libc::Ioctl;
const PROCMAP_QUERY_VMA_WRITABLE: u64 = 2;

/// `struct procmap_query`; unnamed fields are none of our business.
#[repr(C)]
#[derive(Default)]
struct ProcmapQuery {
    size: u64,
    query_flags: u64,
    query_addr: u64,
    vma_start: u64,
    vma_end: u64,
    rest: [u64; 8],
}

const _: () = assert!(size_of::<ProcmapQuery>() == 104);

/// Copies all of `into` from the thread's memory, once. Fails where the thread itself could not read.
pub fn read(tid: Pid, address: u64, into: &mut [u8]) -> io::Result<()> {
    let local = libc::iovec { iov_base: into.as_mut_ptr().cast(), iov_len: into.len() };
    let base = usize::try_from(address).map_err(|_| io::ErrorKind::InvalidInput)?;
    let remote = libc::iovec { iov_base: std::ptr::without_provenance_mut(base), iov_len: into.len() };
    let tid = tid.as_raw_nonzero().get();
    // SAFETY: the kernel writes at most `into.len()` bytes into `into`, which is borrowed for the
    // call; the other address is never used in this process.
    let read = unsafe { libc::process_vm_readv(tid, &raw const local, 1, &raw const remote, 1, 0) };
    match usize::try_from(read) {
        Ok(read) if read == into.len() => Ok(()),
        Ok(_) => Err(io::Error::from_raw_os_error(libc::EFAULT)),
        Err(_) => Err(io::Error::last_os_error()),
    }
}

/// An address space opened for writing. It stays that of the thread that was opened, whatever
/// becomes of the thread's number: with process_vm_writev(2) a caller killed at the right moment
/// would have us write into another process.
#[derive(Debug)]
pub struct Writable {
    memory: File,
    maps: File,
}

impl Writable {
    /// Opens that of the thread whose directory of /proc this is.
    pub fn open(directory: impl AsFd) -> rustix::io::Result<Writable> {
        let open = |name, flags| openat(&directory, name, flags | OFlags::CLOEXEC, Mode::empty());
        let memory = open("mem", OFlags::WRONLY)?.into();
        Ok(Writable { memory, maps: open("maps", OFlags::RDONLY)?.into() })
    }

    /// Writes all of `from`. Fails where the thread itself could not write.
    pub fn write(&self, address: u64, from: &[u8]) -> io::Result<()> {
        self.check(address, from.len() as u64)?;
        self.memory.write_all_at(from, address)
    }

    /// /proc/TID/mem writes through write protection, as debuggers need it; callers expect EFAULT.
    /// Who takes the protection back or on in the meantime harms nobody else.
    fn check(&self, address: u64, len: u64) -> io::Result<()> {
        let fault = || io::Error::from_raw_os_error(libc::EFAULT);
        let end = address.checked_add(len).ok_or_else(fault)?;
        let mut at = address;
        while at < end {
            let mut query = ProcmapQuery {
                size: size_of::<ProcmapQuery>() as u64,
                query_flags: PROCMAP_QUERY_VMA_WRITABLE,
                query_addr: at,
                ..Default::default()
            };
            // SAFETY: the kernel reads and fills `size` bytes of `query`; lengths of names are 0, so
            // that it uses no other address.
            let done = unsafe { libc::ioctl(self.maps.as_raw_fd(), PROCMAP_QUERY, &raw mut query) };
            if done != 0 {
                let error = io::Error::last_os_error();
                // Before Linux 6.11: written through.
                return if error.raw_os_error() == Some(libc::ENOTTY) { Ok(()) } else { Err(fault()) };
            }
            if query.vma_end <= at {
                return Err(fault());
            }
            at = query.vma_end;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn me() -> Pid {
        rustix::thread::gettid()
    }

    fn my_memory() -> Writable {
        Writable::open(File::open("/proc/thread-self").unwrap()).unwrap()
    }

    #[test]
    fn memory_of_a_thread_is_copied_both_ways() {
        let there = [7_u8; 300];
        let mut here = [0_u8; 300];
        read(me(), there.as_ptr().addr() as u64, &mut here).unwrap();
        assert_eq!(here, there);

        let file = tempfile::tempfile().unwrap();
        file.set_len(8192).unwrap();
        let target = vec![0_u8; 300];
        my_memory().write(target.as_ptr().addr() as u64, &here).unwrap();
        assert_eq!(std::hint::black_box(target), there);
    }

    #[test]
    fn inaccessible_memory_is_a_fault() {
        static CONSTANT: [u8; 64] = [3; 64];
        let writable = my_memory();
        let errno = |done: io::Result<()>| done.unwrap_err().raw_os_error();
        for address in [0, 1, u64::MAX, u64::MAX - 100, 1 << 63, 0xffff_8000_0000_0000] {
            assert_eq!(errno(read(me(), address, &mut [0; 64])), Some(libc::EFAULT), "{address:x}");
            assert_eq!(errno(writable.write(address, &[1; 64])), Some(libc::EFAULT), "{address:x}");
        }
        let constant = CONSTANT.as_ptr().addr() as u64;
        assert_eq!(errno(writable.write(constant, &[1; 64])), Some(libc::EFAULT));
        assert_eq!(std::hint::black_box(&CONSTANT), &[3; 64]);
    }
}
