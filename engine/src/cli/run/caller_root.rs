// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The paths of an intercepted mount(2) as its caller sees them: in its root and working directories and
//! its mount namespace.
//!
//! Knows threads and namespaces. Does not know what is mounted.

use std::fs;
use std::os::fd::AsFd;

use rustix::io::Errno;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::intercept::mounts::{MountRequest, MounterRequest};
use crate::loops::Answer;
use crate::sys;

/// True if the source must be a block device.
pub(super) fn needs_device(asked: &MountRequest) -> bool {
    let kinds = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    asked.source.starts_with(b"/dev/")
        && kinds.lines().any(|line| line.strip_prefix('\t') == Some(&asked.kind))
}

/// Calls `open` in the caller's root and working directories, on a separate thread: it stays
/// there, where no drivers are searched.
pub(super) fn in_root_of_caller<T: Send>(
    request: &MounterRequest,
    open: impl FnOnce() -> Answer<T> + Send,
) -> Answer<T> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().spawn_scoped(scope, || {
            enter_caller_namespace(request)?;
            rustix::process::fchdir(&request.root)?;
            rustix::process::chroot(".")?;
            rustix::process::fchdir(&request.cwd)?;
            open()
        });
        thread.map_err(|_| Errno::AGAIN)?.join().unwrap_or(Err(Errno::IO))
    })
}

/// Moves only this thread into the caller's mount namespace.
pub(super) fn enter_caller_namespace(request: &MounterRequest) -> Answer<()> {
    sys::userns::own_directories()?;
    move_into_link_name_space(request.namespace.as_fd(), Some(LinkNameSpaceType::Mount))
}
