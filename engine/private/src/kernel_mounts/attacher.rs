//! The process that attaches mounts in the mount namespaces of containers, and takes them off again.
//!
//! Root of a container has, by default, no right to mount; the daemon has, but is to resolve no path of a
//! container's. So a child of this process does: in the container's mount namespace, from its root
//! directory, through no magic link, and as what it can do less than the daemon. What it finds it hands
//! over as descriptors; what is to be done with them the daemon decides, and another child does.
//!
//! Knows namespaces and paths. Does not know whose a device is, nor what was mounted by whom.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, ResolveFlags, Statx, StatxAttributes, StatxFlags};
use rustix::io::Errno;
use rustix::mount::{MoveMountFlags, UnmountFlags, move_mount, unmount};
use rustix::process::{chroot, fchdir};
use rustix::thread::{CapabilitySet, LinkNameSpaceType, move_into_link_name_space};
use serde::{Deserialize, Serialize};

use super::orders::Done;
use super::{children, confine};
use crate::error::{Error, Result};
use crate::loops::Answer;
use crate::sys::process::Alone;
use crate::sys::pseudo;

/// Of a path, as with the kernel's.
const PATH_MAX: usize = 4096;
/// Of a message: two paths, every byte written as up to four characters.
const ORDER_MAX: usize = 2 * 4 * PATH_MAX + 4096;
/// Children at a time. One that looks for a path may wait for a file system of FUSE.
const AT_ONCE: usize = 64;

/// STATX_MNT_ID_UNIQUE (Linux 6.8): a number that no other mount will have.
const UNIQUE: StatxFlags = StatxFlags::from_bits_retain(0x4000);

/// What the attacher is told. With every order come its container's places: root directory, working
/// directory, mount namespace; or what is said here.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Order {
    /// Answers the number of the device at `source`, 0 if there is none, and the directory `target`.
    Find { source: Vec<u8>, target: Vec<u8> },
    /// Attaches: comes with a mount namespace, a mount, and the directory.
    Attach,
    /// Answers the number of the mount that has its root at `path`; 0: none has.
    Which { path: Vec<u8>, follow: bool },
    /// Takes off what is mounted on a directory: comes with a mount namespace, and that directory.
    Detach { flags: u32 },
}

/// What it calls, beside what all such processes do.
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

/// Takes orders from this socket until it is closed.
pub fn serve(socket: BorrowedFd<'_>) -> Result<()> {
    let cannot = |error: std::io::Error| Error::os(error, "cannot attach mounts");
    let alone = Alone::check().map_err(cannot)?;
    // The last: paths of a container lead where its root may go, who may search any directory.
    let kept = CapabilitySet::SYS_ADMIN | CapabilitySet::SYS_CHROOT | CapabilitySet::DAC_READ_SEARCH;
    confine::enter(kept, ALLOWED)?;
    children::serve(&alone, socket, ORDER_MAX, AT_ONCE, act).map_err(|error| cannot(error.into()))
}

/// Called in a child.
fn act(order: &Order, fds: Vec<OwnedFd>) -> Answer<Done> {
    match order {
        Order::Find { source, target } => find(&step_into(fds)?, source, target),
        Order::Which { path, follow } => {
            step_into(fds)?;
            let at = open(path, if *follow { OFlags::empty() } else { OFlags::NOFOLLOW })?;
            let number = mount_with_root(&look(at.as_fd())?).unwrap_or(0);
            Ok(Done { number, fd: None })
        }
        Order::Attach => {
            let [namespace, mount, target] = three(fds)?;
            enter(&namespace)?;
            let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
            move_mount(&mount, "", &target, "", flags)?;
            // Or it would be in use until this process has ended.
            drop(mount);
            Ok(Done::default())
        }
        Order::Detach { flags } => {
            let [namespace, point] = <[OwnedFd; 2]>::try_from(fds).map_err(|_| Errno::INVAL)?;
            enter(&namespace)?;
            fchdir(&point)?;
            drop(point);
            // From the directory below the mount the kernel steps onto it by itself, so that nothing of
            // it is in use here.
            unmount(".", UnmountFlags::from_bits_retain(*flags))?;
            Ok(Done::default())
        }
    }
}

fn find(roots: &[u64], source: &[u8], target: &[u8]) -> Answer<Done> {
    let Ok(source) = open(source, OFlags::empty()) else { return Ok(Done::default()) };
    let stat = rustix::fs::fstat(&source)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::BlockDevice {
        return Ok(Done::default());
    }
    let target = open(target, OFlags::DIRECTORY)?;
    if mount_with_root(&look(target.as_fd())?).is_some_and(|number| roots.contains(&number)) {
        return Err(Errno::PERM);
    }
    if pseudo::name(rustix::fs::fstatfs(&target)?.f_type).is_some() {
        return Err(Errno::PERM);
    }
    Ok(Done { number: stat.st_rdev, fd: Some(target) })
}

/// Goes where the caller is. Answers which mounts are its roots: of its namespace, and its own.
fn step_into(fds: Vec<OwnedFd>) -> Answer<[u64; 2]> {
    let [root, cwd, namespace] = three(fds)?;
    enter(&namespace)?;
    let number = || Ok::<_, Errno>(look(open(b"/", OFlags::empty())?.as_fd())?.stx_mnt_id);
    let first = number()?;
    fchdir(&root)?;
    chroot(".")?;
    fchdir(&cwd)?;
    Ok([first, number()?])
}

fn three(fds: Vec<OwnedFd>) -> Answer<[OwnedFd; 3]> {
    fds.try_into().map_err(|_| Errno::INVAL)
}

fn enter(namespace: &OwnedFd) -> Answer<()> {
    move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Mount))
}

fn open(path: &[u8], flags: OFlags) -> Answer<OwnedFd> {
    let flags = flags | OFlags::PATH | OFlags::CLOEXEC;
    rustix::fs::openat2(CWD, path, flags, Mode::empty(), ResolveFlags::NO_MAGICLINKS)
}

/// Asks no file system.
fn look(at: BorrowedFd<'_>) -> Answer<Statx> {
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    let stat = rustix::fs::statx(at, "", flags, UNIQUE)?;
    match stat.stx_mask & UNIQUE.bits() {
        0 => Err(Errno::NOSYS),
        _ => Ok(stat),
    }
}

/// The number of the mount whose root this is.
fn mount_with_root(stat: &Statx) -> Option<u64> {
    stat.stx_attributes.contains(StatxAttributes::MOUNT_ROOT).then_some(stat.stx_mnt_id)
}

/// The number of a mount.
pub(super) fn number_of(mount: BorrowedFd<'_>) -> Answer<u64> {
    Ok(look(mount)?.stx_mnt_id)
}
