// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The few things that the standard library and rustix do not offer, each in a safe wrapper.
//!
//! Knows the kernel's interfaces only. One of the three rooms with `unsafe`.

pub mod activation;
pub mod block;
pub mod block_stats;
pub mod descriptor;
pub mod extents;
pub mod ioctl;
pub mod loop_device;
pub mod loop_names;
pub mod mntns;
pub mod mount;
pub mod packet;
pub mod process;
pub mod processes;
pub mod pseudo;
pub mod range_lock;
pub mod remote;
pub mod seccomp;
pub mod stack;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod uevent;
pub mod unmounts;
pub mod uring;
pub mod usage;
pub mod userns;
pub mod uses;
pub mod watch;

use crate::error::{Error, Result};

/// Replaces control characters, so that a path fits in one line of a message or a log.
pub fn printable(path: &str) -> String {
    let shown = |c: char| if c.is_control() { '?' } else { c };
    path.chars().map(shown).collect()
}

/// Opens a configuration file: a regular one only, and without waiting for another side of a pipe.
pub fn open_regular(path: &std::path::Path) -> std::io::Result<std::fs::File> {
    use rustix::fs::{CWD, Mode, OFlags, openat};
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let file = std::fs::File::from(openat(CWD, path, flags, Mode::empty())?);
    match file.metadata()?.is_file() {
        true => Ok(file),
        false => Err(std::io::Error::new(std::io::ErrorKind::InvalidInput, "not a regular file")),
    }
}

/// Lets the calling thread run on these CPUs only; on all it already may for an empty list.
pub fn run_on(cpus: &[usize]) -> Result<()> {
    if cpus.is_empty() {
        return Ok(());
    }
    let mut set = rustix::thread::CpuSet::new();
    for &cpu in cpus.iter().filter(|&&cpu| cpu < rustix::thread::CpuSet::MAX_CPU) {
        set.set(cpu);
    }
    rustix::thread::sched_setaffinity(None, &set)
        .map_err(|error| Error::os(error, format!("cannot run a worker on the CPUs {cpus:?}")))
}

/// Tells the kernel that this thread is part of the block layer's way to the disk, so that its own
/// allocations never wait for writes that only it can do. Needs CAP_SYS_RESOURCE; without it
/// nothing is lost but this protection.
pub fn declare_io_flusher() {
    const PR_SET_IO_FLUSHER: libc::c_int = 57;
    // SAFETY: takes and returns integers; affects the calling thread only.
    let done = unsafe { libc::prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0) };
    if done != 0 {
        let error = std::io::Error::last_os_error();
        // It is the same for all threads of the process.
        static ONCE: std::sync::Once = std::sync::Once::new();
        ONCE.call_once(|| {
            tracing::warn!(%error, "workers may wait for their own writes when memory is short; give the daemon CAP_SYS_RESOURCE");
        });
    }
}

/// Sets a file's size by its path, without opening it.
pub fn truncate(path: &std::path::Path, bytes: u64) -> std::io::Result<()> {
    use std::os::unix::ffi::OsStrExt;
    let path = std::ffi::CString::new(path.as_os_str().as_bytes())?;
    let bytes = libc::off_t::try_from(bytes).map_err(|_| std::io::ErrorKind::InvalidInput)?;
    // SAFETY: reads a string that ends with a zero and outlives the call.
    match unsafe { libc::truncate(path.as_ptr(), bytes) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

/// Raises the limit on open files to `wanted`, or as far as this process may (root: any). A device
/// takes several, and a ring's table of fixed files may not be larger than the limit.
pub fn raise_file_limit(wanted: u64) {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let hard = getrlimit(Resource::Nofile).maximum.unwrap_or(u64::MAX);
    let limit = |n| Rlimit { current: Some(n), maximum: Some(n) };
    let raised = hard < wanted && setrlimit(Resource::Nofile, limit(wanted)).is_ok();
    if !raised {
        let _ = setrlimit(Resource::Nofile, limit(hard));
    }
}

/// The CPUs that this process may run on.
pub fn allowed_cpus() -> Vec<usize> {
    match rustix::thread::sched_getaffinity(None) {
        Ok(set) => (0..rustix::thread::CpuSet::MAX_CPU).filter(|&cpu| set.is_set(cpu)).collect(),
        Err(_) => vec![0],
    }
}
