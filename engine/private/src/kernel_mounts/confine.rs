// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Confines the processes that make and attach mounts.
//!
//! Such a process has a mount namespace with one tmpfs: two empty, read-only directories. It keeps
//! few capabilities, and a filter allows only the system calls that it makes.

use std::os::fd::{AsFd, OwnedFd};

use libc::c_long;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, UnmountFlags, fsconfig_create,
    fsconfig_set_string, fsmount, fsopen, move_mount, unmount,
};
use rustix::process::{chdir, pivot_root};
use rustix::thread::{CapabilitySet, set_no_new_privs};

use crate::error::{Error, Result};
use crate::sandbox;
use crate::sys::{mntns, mount, seccomp};

/// The mount point of a new mount, and the directory of its device.
pub const DIRECTORIES: [&str; 2] = ["/mnt", "/dev"];
/// Exists on every Linux: temporary mount point of the new root.
const ANY_DIRECTORY: &str = "/proc";

/// Confines this single-threaded process to these capabilities, and to these system calls beyond
/// [`ALL`].
pub fn enter(capabilities: CapabilitySet, calls: &[c_long]) -> Result<()> {
    let cannot = |what: &'static str| move |error: Errno| Error::os(error, format!("cannot {what}"));
    enter_own_root().map_err(cannot("create its own root directory"))?;
    sandbox::keep(capabilities).map_err(cannot("drop capabilities"))?;
    set_no_new_privs(true).map_err(cannot("set no_new_privs"))?;
    let program =
        sandbox::only(&[calls, ALL].concat()).ok_or(Errno::NOSYS).map_err(cannot("filter its calls here"))?;
    let filtered: std::io::Result<()> = seccomp::restrict(&program);
    filtered.map_err(|error| Error::os(error, "cannot filter its calls"))
}

fn enter_own_root() -> rustix::io::Result<()> {
    mntns::enter_own().map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
    let root = tmpfs()?;
    for place in DIRECTORIES {
        rustix::fs::mkdirat(&root, place.trim_start_matches('/'), Mode::from_raw_mode(0o755))?;
    }
    move_mount(&root, "", rustix::fs::CWD, ANY_DIRECTORY, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
    chdir(ANY_DIRECTORY)?;
    pivot_root(".", ".")?;
    // The old root is mounted over the new one now.
    unmount(".", UnmountFlags::DETACH)?;
    chdir("/")?;
    mount::set_read_only(root.as_fd())
}

/// A detached tmpfs.
pub fn tmpfs() -> rustix::io::Result<OwnedFd> {
    let context = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    for (key, value) in [("mode", "0755"), ("size", "64k"), ("nr_inodes", "8")] {
        fsconfig_set_string(&context, key, value)?;
    }
    fsconfig_create(&context)?;
    fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::MOUNT_ATTR_NOSUID)
}

/// Creates an empty file as a mount point for a node.
pub fn empty_file(dir: impl AsFd, name: &str) -> rustix::io::Result<()> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(dir, name, flags, Mode::from_raw_mode(0o600)).map(drop)
}

/// System calls of all helper processes: files by descriptor, their socket, their children, memory,
/// and those of the C library. No threads, so that they may fork; no programs, other sockets,
/// nodes.
const ALL: &[c_long] = &[
    libc::SYS_close,
    libc::SYS_fcntl,
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_fstat,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_ppoll,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_poll,
    libc::SYS_wait4,
    libc::SYS_kill,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_clock_gettime,
    libc::SYS_brk,
    libc::SYS_mmap,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_mprotect,
    libc::SYS_madvise,
    libc::SYS_futex,
    libc::SYS_getrandom,
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_restart_syscall,
];

#[cfg(test)]
mod tests {
    use super::*;

    /// A filter holds for the thread that installs it.
    #[test]
    fn rejects_unlisted_system_calls() {
        let tried = std::thread::spawn(|| {
            let program = sandbox::only(ALL).unwrap();
            set_no_new_privs(true).unwrap();
            seccomp::restrict(&program).unwrap();
            let errno_of = crate::sys::testing::errno_of;
            for number in
                [libc::SYS_execve, libc::SYS_mknodat, libc::SYS_bpf, libc::SYS_ptrace, libc::SYS_socket]
            {
                assert_eq!(errno_of(number), Some(libc::EPERM), "{number}");
            }
            // It is listed, and fails as usual.
            assert_eq!(errno_of(libc::SYS_close), Some(libc::EBADF));
            assert!(std::thread::Builder::new().spawn(|| ()).is_err(), "a thread was started");
        });
        tried.join().unwrap();
    }
}
