//! What a client does with the mount that it was given.
//!
//! Knows mounts; knows nothing of pools. Works for root, and for anybody in a mount namespace of his
//! own: a mount that was made in the initial user namespace keeps its usable device nodes when it
//! is moved into the mount namespace of another user namespace.

use std::os::fd::BorrowedFd;
use std::path::Path;

use rustix::fs::CWD;
use rustix::io::Errno;
use rustix::mount::{MoveMountFlags, move_mount};

use crate::error::{Error, Kind, Result};
use crate::sys::mount::set_read_only;

/// Attaches a detached mount to `directory`. Who calls this is to close the descriptor afterwards,
/// or the pool lives as long as it does.
pub fn attach_mount(mount: BorrowedFd<'_>, directory: &Path) -> Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_SYMLINKS;
    move_mount(mount, "", CWD, directory, flags).map_err(|error| failed(error, directory))
}

/// The same, read-only: owners and modes stay as they are, and no device is removed by its name.
/// Devices can be written to all the same.
pub fn attach_mount_read_only(mount: BorrowedFd<'_>, directory: &Path) -> Result<()> {
    set_read_only(mount).map_err(|error| failed(error, directory))?;
    attach_mount(mount, directory)
}

fn failed(error: Errno, directory: &Path) -> Error {
    let made = Error::os(error, format!("cannot mount loop devices on {}", directory.display()));
    match error {
        Errno::PERM => made.hint("run this as root, or in a mount namespace of your own ('loopengine run')"),
        Errno::NOSYS => made.with_kind(Kind::Unsupported).hint("Linux 5.12 or later is needed"),
        _ => made,
    }
}
