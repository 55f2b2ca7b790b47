// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Attaches the mount that a client gets.
//!
//! Knows mounts; knows nothing of pools. Works for root, and for any user in a mount namespace of
//! their own: a mount made in the initial user namespace keeps its usable device nodes when it
//! moves into the mount namespace of another user namespace.

use std::os::fd::BorrowedFd;
use std::path::Path;

use rustix::fs::CWD;
use rustix::io::Errno;
use rustix::mount::{MoveMountFlags, move_mount};

use crate::error::{Error, Kind, Result};
use crate::sys::mount::set_read_only;

/// Attaches a detached mount to `directory`. The caller must close the descriptor afterwards: it
/// keeps the pool.
pub fn attach_mount(mount: BorrowedFd<'_>, directory: &Path) -> Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_SYMLINKS;
    move_mount(mount, "", CWD, directory, flags).map_err(|error| failed(error, directory))
}

/// The same, read-only: nobody can change owners and modes, or remove devices by name. Devices
/// remain writable.
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
