// SPDX-License-Identifier: Apache-2.0 OR MIT
//! User namespaces.

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
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

/// Who made the outermost user namespace, below ours, of the process that connected `socket`. None: it
/// has no other namespace than we have, or the kernel does not say.
pub fn owner_of_peer(socket: impl AsFd) -> Option<u32> {
    const SO_PEERPIDFD: libc::c_int = 77;
    const PIDFD_GET_USER_NAMESPACE: libc::Ioctl = 0xff09;
    const NS_GET_PARENT: libc::Ioctl = 0xb702;
    const NS_GET_OWNER_UID: libc::Ioctl = 0xb704;
    /// The kernel's own limit on how deep they are.
    const DEPTH_MAX: usize = 33;
    let (mut pidfd, mut len) = (-1, size_of::<libc::c_int>() as libc::socklen_t);
    // SAFETY: writes one int into `pidfd` and its size into `len`, both of which outlive the call.
    let got = unsafe {
        let socket = socket.as_fd().as_raw_fd();
        libc::getsockopt(socket, libc::SOL_SOCKET, SO_PEERPIDFD, (&raw mut pidfd).cast(), &raw mut len)
    };
    let process = (got == 0).then(|| own(pidfd))??;
    // SAFETY: takes no argument, and answers a new descriptor.
    let derive = |file: &OwnedFd, call| own(unsafe { libc::ioctl(file.as_raw_fd(), call, 0) });
    let mut namespace = derive(&process, PIDFD_GET_USER_NAMESPACE)?;
    // The parent of a namespace that is ours is kept from us.
    let mut owner = None;
    for _ in 0..DEPTH_MAX {
        let Some(parent) = derive(&namespace, NS_GET_PARENT) else { break };
        let mut uid = 0_u32;
        // SAFETY: writes one uid_t into `uid`, which outlives the call.
        let told = unsafe { libc::ioctl(namespace.as_raw_fd(), NS_GET_OWNER_UID, &raw mut uid) };
        owner = (told == 0).then_some(uid);
        namespace = parent;
    }
    owner
}

fn own(number: libc::c_int) -> Option<OwnedFd> {
    // SAFETY: the kernel has just answered it, so nobody else owns it.
    (number >= 0).then(|| unsafe { OwnedFd::from_raw_fd(number) })
}
