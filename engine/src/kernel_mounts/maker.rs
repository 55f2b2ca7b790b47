//! The process that has the kernel mount: one child for each mount.
//!
//! It is started before the daemon gives up its privileges, and ends with it. It takes one order after
//! the other from its socket, and has a child do each: what a file system does to a child, or how long
//! it takes, is no matter of the next. A child that takes too long is killed; one that cannot be, since
//! it waits for a device whose file hangs, counts until it can.
//!
//! The child makes the mount in a mount namespace of its own, which has nothing but that device. The
//! mount that it hands over is a copy from a second one, of a new user namespace: on the way there the
//! kernel locks nosuid, nodev and the rest, so that root of a tenant's namespace cannot take them off.
//! With the child both namespaces end; nothing is to be cleaned up.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::CWD;
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MoveMountFlags, OpenTreeFlags, fsconfig_create, fsconfig_set_flag,
    fsconfig_set_string, fsmount, fsopen, move_mount, open_tree,
};
use rustix::process::{Pid, Signal, WaitOptions, kill_process, waitpid};

use super::{ORDER_MAX, Order, confine, flags, policy};
use crate::error::{Error, Result};
use crate::image::Region;
use crate::loops::Answer;
use crate::sys::{self, mntns, packet, process::Alone};

/// Children at a time.
const AT_ONCE: usize = 16;
/// How long one may take; the daemon gives up a little earlier.
const CHILD_MAX: Duration = Duration::from_secs(30);
/// How often children are looked after while there are any.
const LOOK: Timespec = Timespec { tv_sec: 0, tv_nsec: 200_000_000 };

struct Child {
    pid: Pid,
    until: Instant,
}

/// Takes orders from this socket until it is closed.
pub fn serve(socket: BorrowedFd<'_>) -> Result<()> {
    let cannot = |error: std::io::Error| Error::os(error, "cannot make mounts");
    let alone = Alone::check().map_err(cannot)?;
    confine::enter()?;
    let mut children: Vec<Child> = Vec::new();
    loop {
        let timeout = (!children.is_empty()).then_some(&LOOK);
        let mut fds = [PollFd::new(&socket, PollFlags::IN)];
        let ready = match poll(&mut fds, timeout) {
            Err(Errno::INTR) => 0,
            polled => polled.map_err(|error| cannot(error.into()))?,
        };
        look_after(&mut children);
        if ready == 0 {
            continue;
        }
        let Some(packet) = packet::receive(socket, ORDER_MAX).map_err(|error| cannot(error.into()))? else {
            break;
        };
        let mut fds = packet.fds.into_iter();
        let Some(reply) = fds.next() else { continue };
        let order = serde_json::from_slice::<Order>(&packet.bytes).ok().filter(|_| packet.whole);
        let pid = match order {
            None => Err(Errno::INVAL),
            Some(_) if children.len() >= AT_ONCE => Err(Errno::AGAIN),
            Some(order) => {
                let work = || answer(reply.as_fd(), make(&order, fds));
                alone.fork(work).map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::AGAIN))
            }
        };
        match pid {
            Ok(pid) => children.push(Child { pid, until: Instant::now() + CHILD_MAX }),
            Err(errno) => answer(reply.as_fd(), Err(errno)),
        }
    }
    for child in &children {
        let _ = kill_process(child.pid, Signal::KILL);
    }
    Ok(())
}

fn look_after(children: &mut Vec<Child>) {
    children.retain(|child| {
        if Instant::now() >= child.until {
            let _ = kill_process(child.pid, Signal::KILL);
        }
        matches!(waitpid(Some(child.pid), WaitOptions::NOHANG), Ok(None) | Err(Errno::INTR))
    });
}

/// Nobody may wait any more: then the mount ends with its descriptor.
fn answer(reply: BorrowedFd<'_>, made: Answer<OwnedFd>) {
    let _ = match made {
        Ok(mount) => packet::send(reply, &0_i32.to_ne_bytes(), &[mount.as_fd()]),
        Err(errno) => packet::send(reply, &errno.raw_os_error().to_ne_bytes(), &[]),
    };
}

/// Called in a child. With the order came its device's node, as a mount; the device; a user namespace.
fn make(order: &Order, mut fds: impl Iterator<Item = OwnedFd>) -> Answer<OwnedFd> {
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
    open_tree(CWD, place, OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC)
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
