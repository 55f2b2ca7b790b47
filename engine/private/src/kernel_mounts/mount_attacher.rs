// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The process that attaches and detaches mounts in the mount namespaces of containers.
//!
//! By default root of a container may not mount. The daemon may, but must not resolve a container's
//! paths. So a child of this process does, in the container's mount namespace, from its root
//! directory, without magic links, and with fewer capabilities than the daemon. It returns what it
//! finds as descriptors. The daemon decides, and another child acts.
//!
//! Knows namespaces and paths. Does not know the owners of devices and mounts.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, ResolveFlags, Statx, StatxAttributes, StatxFlags};
use rustix::io::Errno;
use rustix::mount::{MoveMountFlags, UnmountFlags, move_mount, unmount};
use rustix::process::{chroot, fchdir};
use rustix::thread::{CapabilitySet, LinkNameSpaceType, move_into_link_name_space};
use serde::{Deserialize, Serialize};

use super::helper::HelperReply;
use super::{children, confine};
use crate::error::{Error, Result};
use crate::loops::Answer;
use crate::sys::process::Alone;
use crate::sys::pseudo;

/// Maximum length of a path, as in the kernel.
const PATH_MAX: usize = 4096;
/// Maximum size of a message: two paths with at most four characters per byte.
const REQUEST_MAX: usize = 2 * 4 * PATH_MAX + 4096;
/// Maximum number of children. One that resolves a path may wait for a FUSE file system.
const CHILDREN_MAX: usize = 64;

/// STATX_MNT_ID_UNIQUE (Linux 6.8): ids that are never reused.
const UNIQUE: StatxFlags = StatxFlags::from_bits_retain(0x4000);

/// A request to the mount-attacher. Every request passes its container's descriptors: root
/// directory, working directory, mount namespace; or those named here.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum AttachRequest {
    /// Returns the number of the device at `source`, 0 if there is none, and the directory
    /// `target`.
    Find { source: Vec<u8>, target: Vec<u8> },
    /// Attaches a mount: passes a mount namespace, the mount, and the directory.
    Attach,
    /// Returns the id of the mount whose root is at `path`; 0: none.
    Which { path: Vec<u8>, follow: bool },
    /// Unmounts a directory: passes a mount namespace, and that directory.
    Detach { flags: u32 },
}

/// System calls beyond those of all helper processes.
const ALLOWED: &[libc::c_long] = &[
    libc::SYS_setns,
    libc::SYS_fchdir,
    libc::SYS_chroot,
    libc::SYS_openat2,
    libc::SYS_statx,
    libc::SYS_fstatfs,
    libc::SYS_move_mount,
    libc::SYS_umount2,
];

/// Serves requests from this socket until it is closed.
pub fn serve(socket: BorrowedFd<'_>) -> Result<()> {
    let cannot = |error: std::io::Error| Error::os(error, "cannot attach mounts");
    let alone = Alone::check().map_err(cannot)?;
    // DAC_READ_SEARCH: a container's root may search any directory of its paths.
    let kept = CapabilitySet::SYS_ADMIN | CapabilitySet::SYS_CHROOT | CapabilitySet::DAC_READ_SEARCH;
    confine::enter(kept, ALLOWED)?;
    children::serve(&alone, socket, REQUEST_MAX, CHILDREN_MAX, act).map_err(|error| cannot(error.into()))
}

/// Runs in a child.
fn act(request: &AttachRequest, fds: Vec<OwnedFd>) -> Answer<HelperReply> {
    match request {
        AttachRequest::Find { source, target } => find(&enter_container(fds)?, source, target),
        AttachRequest::Which { path, follow } => {
            enter_container(fds)?;
            let at = open(path, if *follow { OFlags::empty() } else { OFlags::NOFOLLOW })?;
            let number = id_of_mount_root(&statx_mount(at.as_fd())?).unwrap_or(0);
            Ok(HelperReply { number, fd: None })
        }
        AttachRequest::Attach => {
            let [namespace, mount, target] = three_fds(fds)?;
            enter(&namespace)?;
            let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
            move_mount(&mount, "", &target, "", flags)?;
            // Closes it, or it would stay in use until this process ends.
            drop(mount);
            Ok(HelperReply::default())
        }
        AttachRequest::Detach { flags } => {
            let [namespace, point] = <[OwnedFd; 2]>::try_from(fds).map_err(|_| Errno::INVAL)?;
            enter(&namespace)?;
            fchdir(&point)?;
            drop(point);
            // From the directory below the mount the kernel enters the mount itself, so that
            // nothing of it is in use here.
            unmount(".", UnmountFlags::from_bits_retain(*flags))?;
            Ok(HelperReply::default())
        }
    }
}

fn find(roots: &[u64], source: &[u8], target: &[u8]) -> Answer<HelperReply> {
    let Ok(source) = open(source, OFlags::empty()) else { return Ok(HelperReply::default()) };
    let stat = rustix::fs::fstat(&source)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::BlockDevice {
        return Ok(HelperReply::default());
    }
    let target = open(target, OFlags::DIRECTORY)?;
    if id_of_mount_root(&statx_mount(target.as_fd())?).is_some_and(|number| roots.contains(&number)) {
        return Err(Errno::PERM);
    }
    if pseudo::name(rustix::fs::fstatfs(&target)?.f_type).is_some() {
        return Err(Errno::PERM);
    }
    Ok(HelperReply { number: stat.st_rdev, fd: Some(target) })
}

/// Enters the caller's namespace and directories. Returns the ids of its root mounts: of its
/// namespace, and its own.
fn enter_container(fds: Vec<OwnedFd>) -> Answer<[u64; 2]> {
    let [root, cwd, namespace] = three_fds(fds)?;
    enter(&namespace)?;
    let number = || Ok::<_, Errno>(statx_mount(open(b"/", OFlags::empty())?.as_fd())?.stx_mnt_id);
    let first = number()?;
    fchdir(&root)?;
    chroot(".")?;
    fchdir(&cwd)?;
    Ok([first, number()?])
}

fn three_fds(fds: Vec<OwnedFd>) -> Answer<[OwnedFd; 3]> {
    fds.try_into().map_err(|_| Errno::INVAL)
}

fn enter(namespace: &OwnedFd) -> Answer<()> {
    move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Mount))
}

fn open(path: &[u8], flags: OFlags) -> Answer<OwnedFd> {
    let flags = flags | OFlags::PATH | OFlags::CLOEXEC;
    rustix::fs::openat2(CWD, path, flags, Mode::empty(), ResolveFlags::NO_MAGICLINKS)
}

/// Does not query the file system.
fn statx_mount(at: BorrowedFd<'_>) -> Answer<Statx> {
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    let stat = rustix::fs::statx(at, "", flags, UNIQUE)?;
    match stat.stx_mask & UNIQUE.bits() {
        0 => Err(Errno::NOSYS),
        _ => Ok(stat),
    }
}

/// The id of the mount whose root this is.
fn id_of_mount_root(stat: &Statx) -> Option<u64> {
    stat.stx_attributes.contains(StatxAttributes::MOUNT_ROOT).then_some(stat.stx_mnt_id)
}

/// The id of a mount.
pub(super) fn mount_id_of(mount: BorrowedFd<'_>) -> Answer<u64> {
    Ok(statx_mount(mount)?.stx_mnt_id)
}
