// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The process that makes mounts: one child per mount.
//!
//! It starts before the daemon drops its privileges, and ends with it. A file system that crashes
//! or delays a child does not affect the next one ([`children`]). The child makes the mount in its
//! own mount namespace, which contains only that device. It then returns a copy from a second mount
//! namespace, owned by a new user namespace: the kernel thereby locks nosuid, nodev and the rest,
//! so that root of a tenant's namespace cannot clear them. Both namespaces end with the child,
//! without cleanup.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::CWD;
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MoveMountFlags, OpenTreeFlags, fsconfig_create, fsconfig_set_flag,
    fsconfig_set_string, fsmount, fsopen, move_mount, open_tree,
};
use rustix::thread::CapabilitySet;

use super::helper::HelperReply;
use super::{MakerRequest, REQUEST_MAX, children, confine, flags, policy};
use crate::error::{Error, Result};
use crate::image::Region;
use crate::loops::Answer;
use crate::sys::{self, mntns, process::Alone};

/// System calls beyond those of all helper processes.
const ALLOWED: &[libc::c_long] = &[
    libc::SYS_fsopen,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_move_mount,
    libc::SYS_open_tree,
    libc::SYS_mount_setattr,
    libc::SYS_mount,
    libc::SYS_unshare,
    libc::SYS_openat,
    libc::SYS_pread64,
];

/// Maximum number of children.
const CHILDREN_MAX: usize = 16;

/// Serves requests from this socket until it is closed.
pub fn serve(socket: BorrowedFd<'_>) -> Result<()> {
    let cannot = |error: std::io::Error| Error::os(error, "cannot make mounts");
    let alone = Alone::check().map_err(cannot)?;
    confine::enter(CapabilitySet::SYS_ADMIN, ALLOWED)?;
    children::serve(&alone, socket, REQUEST_MAX, CHILDREN_MAX, make).map_err(|error| cannot(error.into()))
}

/// Runs in a child. The request passes its device's node, as a mount; the device; a user namespace.
fn make(request: &MakerRequest, fds: Vec<OwnedFd>) -> Answer<HelperReply> {
    let mut fds = fds.into_iter();
    let (Some(node), Some(device), namespace) = (fds.next(), fds.next(), fds.next()) else {
        return Err(Errno::INVAL);
    };
    let system = policy::find(&request.kind).ok_or(Errno::NODEV)?;
    let settings = system.settings(&request.data)?;
    let (words, of_mount) = flags::translate(request.flags)?;
    system.check(&mut Region::new(device.as_fd(), 0, request.size))?;
    drop(device);

    mntns::enter_own().map_err(|error| errno(&error))?;
    let source = show(&request.name, node)?;
    let context = fsopen(system.driver, FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(&context, "source", &source)?;
    for word in words {
        fsconfig_set_flag(&context, word)?;
    }
    for (key, value) in settings {
        match value {
            Some(value) => fsconfig_set_string(&context, key, value)?,
            None => fsconfig_set_flag(&context, key)?,
        }
    }
    fsconfig_create(&context)?;
    let mount = fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, of_mount)?;
    drop(context);
    if let Some(namespace) = namespace {
        sys::mount::map_owners(mount.as_fd(), namespace.as_fd())?;
    }
    let [place, _] = confine::DIRECTORIES;
    move_mount(&mount, "", CWD, place, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
    drop(mount);
    // This locks the flags. The path lookup does not involve the image's file system.
    sys::userns::enter_own().map_err(|error| errno(&error))?;
    let mount = open_tree(CWD, place, OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC)?;
    Ok(HelperReply { number: 0, fd: Some(mount) })
}

/// Mounts the device's node under the name that mount tables show. Returns its path.
fn show(name: &str, node: OwnedFd) -> Answer<String> {
    let [_, place] = confine::DIRECTORIES;
    let own = confine::tmpfs()?;
    confine::empty_file(&own, name)?;
    move_mount(&own, "", CWD, place, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
    let source = format!("{place}/{name}");
    move_mount(&node, "", CWD, &source, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
    Ok(source)
}

fn errno(error: &std::io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}
