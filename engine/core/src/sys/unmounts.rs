// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The kernel's events of unmounts, in chosen mount namespaces: fanotify(7), since Linux 6.15.
//!
//! A watched namespace may end meanwhile, which is reported as the unmounts that it causes.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// linux/fanotify.h.
const FAN_REPORT_MNT: u32 = 0x4000;
const FAN_MARK_MNTNS: u32 = 0x110;
const FAN_MNT_DETACH: u64 = 0x0200_0000;

/// Opens a descriptor that is readable after unmounts; reads do not wait. The sandbox forbids to
/// open one.
pub fn open() -> io::Result<OwnedFd> {
    let flags = libc::FAN_CLOEXEC | libc::FAN_NONBLOCK | libc::FAN_UNLIMITED_MARKS | FAN_REPORT_MNT;
    // SAFETY: takes integers.
    let group = unsafe { libc::fanotify_init(flags, 0) };
    if group < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just returned it.
    Ok(unsafe { OwnedFd::from_raw_fd(group) })
}

/// Reports unmounts in this mount namespace, an open file of /proc/PID/ns, from now on.
pub fn watch(group: BorrowedFd<'_>, namespace: BorrowedFd<'_>) -> io::Result<()> {
    let (flags, group, namespace) =
        (libc::FAN_MARK_ADD | FAN_MARK_MNTNS, group.as_raw_fd(), namespace.as_raw_fd());
    // SAFETY: takes integers; without a path the descriptor is the object.
    match unsafe { libc::fanotify_mark(group, flags, FAN_MNT_DETACH, namespace, std::ptr::null()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::fd::AsFd;

    use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

    #[test]
    fn reports_unmounts_and_the_end_of_a_namespace() {
        let Ok(group) = open() else { return eprintln!("skipped: Linux 6.15 and root are needed") };
        let mut bytes = [0; 4096];
        // The thread is the only one in its mount namespace.
        let changed = std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                crate::sys::mntns::enter_own()?;
                watch(group.as_fd(), File::open("/proc/thread-self/ns/mnt")?.as_fd())?;
                let mut bytes = [0; 4096];
                mount("none", "/tmp", "tmpfs", MountFlags::empty(), None)?;
                let silent = rustix::io::read(&group, &mut bytes).is_err();
                unmount("/tmp", UnmountFlags::empty())?;
                let told = rustix::io::read(&group, &mut bytes).is_ok();
                io::Result::Ok((silent, told))
            });
            thread.join().unwrap()
        });
        match changed {
            Ok(changed) => assert_eq!(changed, (true, true)),
            Err(error) => return eprintln!("skipped: {error}"),
        }
        let ended = (0..100).any(|_| {
            std::thread::sleep(std::time::Duration::from_millis(10));
            rustix::io::read(&group, &mut bytes).is_ok()
        });
        assert!(ended, "the end of the namespace was not reported");
    }
}
