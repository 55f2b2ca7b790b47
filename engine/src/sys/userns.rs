//! User namespaces.

use std::io;
use std::os::unix::fs::MetadataExt;

use rustix::thread::{UnshareFlags, unshare_unsafe};

/// The inode of the initial user namespace, the same on every machine (PROC_USER_INIT_INO).
const INITIAL: u64 = 0xefff_fffd;

/// Whether this process is in the initial user namespace, as far as /proc says.
pub fn is_initial() -> bool {
    std::fs::metadata("/proc/self/ns/user").is_ok_and(|namespace| namespace.ino() == INITIAL)
}

/// Moves this process into a user namespace of its own, and a mount namespace that belongs to it. Fails
/// if the process has more than one thread. Who is who in there must be written to `/proc/self/uid_map`
/// and `gid_map` next.
pub fn enter_own() -> io::Result<()> {
    // SAFETY: without UnshareFlags::FILES no file descriptor table is unshared.
    Ok(unsafe { unshare_unsafe(UnshareFlags::NEWUSER | UnshareFlags::NEWNS) }?)
}

/// Gives the calling thread a root and a working directory of its own, which it may change without
/// moving the others, and with which it may enter another mount namespace.
pub fn own_directories() -> rustix::io::Result<()> {
    // SAFETY: without UnshareFlags::FILES no file descriptor table is unshared.
    unsafe { unshare_unsafe(UnshareFlags::FS) }
}
