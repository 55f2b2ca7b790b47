// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Attributes of a mount that is named by its descriptor.

use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::io::Errno;
use rustix::mount::MountAttrFlags;

/// Nothing is changed.
const NONE: libc::mount_attr = libc::mount_attr { attr_set: 0, attr_clr: 0, propagation: 0, userns_fd: 0 };

/// Makes a mount read-only.
pub fn set_read_only(mount: BorrowedFd<'_>) -> rustix::io::Result<()> {
    set(mount, &libc::mount_attr { attr_set: libc::MOUNT_ATTR_RDONLY, ..NONE })
}

/// Adds attributes, but none of access times.
pub fn add_attributes(mount: BorrowedFd<'_>, attributes: MountAttrFlags) -> rustix::io::Result<()> {
    set(mount, &libc::mount_attr { attr_set: attributes.bits().into(), ..NONE })
}

/// Shows the owners of files as this user namespace has them: user 0 of the file system is its user 0.
/// Only for a mount that was mounted nowhere yet.
pub fn map_owners(mount: BorrowedFd<'_>, namespace: BorrowedFd<'_>) -> rustix::io::Result<()> {
    let userns_fd = u64::from(namespace.as_raw_fd().unsigned_abs());
    set(mount, &libc::mount_attr { attr_set: libc::MOUNT_ATTR_IDMAP, userns_fd, ..NONE })
}

fn set(mount: BorrowedFd<'_>, attributes: &libc::mount_attr) -> rustix::io::Result<()> {
    // SAFETY: the path is an empty string that ends with a zero, and the structure outlives the
    // call, which reads as many bytes of it as it is told: its size. `mount` is open meanwhile, and so
    // is the namespace, if the structure names one: it is borrowed by our only callers.
    let done = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            std::ptr::from_ref(attributes),
            size_of::<libc::mount_attr>(),
        )
    };
    match done {
        0 => Ok(()),
        _ => Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)),
    }
}
