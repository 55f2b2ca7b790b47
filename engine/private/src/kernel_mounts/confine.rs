//! What the processes that make and attach mounts can see and do: little.
//!
//! Such a process has a mount namespace with one file system, in memory: two empty directories, which
//! nobody can write to. It keeps few capabilities, and a filter lets it make only the calls that it makes.
//! Knows nothing of what it is for.

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

/// Where a mount is made, and where its device is shown.
pub const PLACES: [&str; 2] = ["/mnt", "/dev"];
/// There on every Linux: the new root is put upon it for a moment.
const ANY_DIRECTORY: &str = "/proc";

/// Confines this process, which has one thread: to these capabilities, and to these calls beside [`ALL`].
pub fn enter(capabilities: CapabilitySet, calls: &[c_long]) -> Result<()> {
    let cannot = |what: &'static str| move |error: Errno| Error::os(error, format!("cannot {what}"));
    own_root().map_err(cannot("make a root directory of its own"))?;
    sandbox::keep(capabilities).map_err(cannot("drop capabilities"))?;
    set_no_new_privs(true).map_err(cannot("give up gaining privileges"))?;
    let program =
        sandbox::only(&[calls, ALL].concat()).ok_or(Errno::NOSYS).map_err(cannot("filter its calls here"))?;
    let filtered: std::io::Result<()> = seccomp::restrict(&program);
    filtered.map_err(|error| Error::os(error, "cannot filter its calls"))
}

fn own_root() -> rustix::io::Result<()> {
    mntns::enter_own().map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
    let root = memory()?;
    for place in PLACES {
        rustix::fs::mkdirat(&root, place.trim_start_matches('/'), Mode::from_raw_mode(0o755))?;
    }
    move_mount(&root, "", rustix::fs::CWD, ANY_DIRECTORY, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
    chdir(ANY_DIRECTORY)?;
    pivot_root(".", ".")?;
    // The old one lies on the new one now.
    unmount(".", UnmountFlags::DETACH)?;
    chdir("/")?;
    mount::set_read_only(root.as_fd())
}

/// A file system in memory, mounted nowhere yet.
pub fn memory() -> rustix::io::Result<OwnedFd> {
    let context = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    for (key, value) in [("mode", "0755"), ("size", "64k"), ("nr_inodes", "8")] {
        fsconfig_set_string(&context, key, value)?;
    }
    fsconfig_create(&context)?;
    fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::MOUNT_ATTR_NOSUID)
}

/// An empty file, to mount a node upon.
pub fn empty_file(dir: impl AsFd, name: &str) -> rustix::io::Result<()> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(dir, name, flags, Mode::from_raw_mode(0o600)).map(drop)
}

/// What all call: files by descriptor, their socket, their children, memory, and what the C library does
/// by itself. No thread, so that they may fork; no program, no other socket, no node.
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
    fn what_is_not_listed_is_refused() {
        let tried = std::thread::spawn(|| {
            let program = sandbox::only(ALL).unwrap();
            set_no_new_privs(true).unwrap();
            seccomp::restrict(&program).unwrap();
            let errno_of = seccomp::tests::errno_of;
            for number in
                [libc::SYS_execve, libc::SYS_mknodat, libc::SYS_bpf, libc::SYS_ptrace, libc::SYS_socket]
            {
                assert_eq!(errno_of(number), Some(libc::EPERM), "{number}");
            }
            // It is listed, and says what it says of nonsense.
            assert_eq!(errno_of(libc::SYS_close), Some(libc::EBADF));
            assert!(std::thread::Builder::new().spawn(|| ()).is_err(), "a thread was started");
        });
        tried.join().unwrap();
    }
}
