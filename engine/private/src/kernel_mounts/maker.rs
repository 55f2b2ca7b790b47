//! The process that has the kernel mount: one child for each mount.
//!
//! It is started before the daemon gives up its privileges, and ends with it. What a file system does to
//! a child, or how long it takes, is no matter of the next ([`children`]). The child makes the mount in a mount namespace of its own, which has nothing but that device. The
//! mount that it hands over is a copy from a second one, of a new user namespace: on the way there the
//! kernel locks nosuid, nodev and the rest, so that root of a tenant's namespace cannot take them off.
//! With the child both namespaces end; nothing is to be cleaned up.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::CWD;
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MoveMountFlags, OpenTreeFlags, fsconfig_create, fsconfig_set_flag,
    fsconfig_set_string, fsmount, fsopen, move_mount, open_tree,
};
use rustix::thread::CapabilitySet;

use super::orders::Done;
use super::{ORDER_MAX, Order, children, confine, flags, policy};
use crate::error::{Error, Result};
use crate::image::Region;
use crate::loops::Answer;
use crate::sys::{self, mntns, process::Alone};

/// What it calls, beside what all such processes do.
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

/// Children at a time.
const AT_ONCE: usize = 16;

/// Takes orders from this socket until it is closed.
pub fn serve(socket: BorrowedFd<'_>) -> Result<()> {
    let cannot = |error: std::io::Error| Error::os(error, "cannot make mounts");
    let alone = Alone::check().map_err(cannot)?;
    confine::enter(CapabilitySet::SYS_ADMIN, ALLOWED)?;
    children::serve(&alone, socket, ORDER_MAX, AT_ONCE, make).map_err(|error| cannot(error.into()))
}

/// Called in a child. With the order came its device's node, as a mount; the device; a user namespace.
fn make(order: &Order, fds: Vec<OwnedFd>) -> Answer<Done> {
    let mut fds = fds.into_iter();
    let (Some(node), Some(device), namespace) = (fds.next(), fds.next(), fds.next()) else {
        return Err(Errno::INVAL);
    };
    let system = policy::find(&order.kind).ok_or(Errno::NODEV)?;
    let settings = system.settings(&order.data)?;
    let (words, of_mount) = flags::translate(order.flags)?;
    system.check(&mut Region::new(device.as_fd(), 0, order.size))?;
    drop(device);

    mntns::enter_own().map_err(|error| errno(&error))?;
    let source = show(&order.name, node)?;
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
    let [place, _] = confine::PLACES;
    move_mount(&mount, "", CWD, place, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
    drop(mount);
    // Here it is locked. Found by its path, for which nothing of the image is asked.
    sys::userns::enter_own().map_err(|error| errno(&error))?;
    let mount = open_tree(CWD, place, OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC)?;
    Ok(Done { number: 0, fd: Some(mount) })
}

/// Shows the device, under the name that tables of mounts are to have. Answers its path.
fn show(name: &str, node: OwnedFd) -> Answer<String> {
    let [_, place] = confine::PLACES;
    let own = confine::memory()?;
    confine::empty_file(&own, name)?;
    move_mount(&own, "", CWD, place, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
    let source = format!("{place}/{name}");
    move_mount(&node, "", CWD, &source, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
    Ok(source)
}

fn errno(error: &std::io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}
