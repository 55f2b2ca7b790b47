//! Mounts that the kernel makes for tenants, of devices of their pools.
//!
//! ```text
//! daemon ── order, node, device, user namespace ──> maker ── fork ──> child: fsopen … open_tree
//!        <───────────── errno, or a mount that is mounted nowhere yet ─────────┘
//! ```
//! What comes of it is always nosuid and nodev, has its owners mapped to the tenant's user namespace,
//! and keeps both whatever root of that namespace does to it ([`maker`]). Which file systems, and with
//! which options: [`policy`]. This room looks at no path of a tenant's; who attaches the mount, and
//! where, is not its business, nor is whose device it is.

mod confine;
mod flags;
pub mod maker;
pub mod policy;

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

pub use policy::FileSystem;

use crate::error::{Error, Result};
use crate::loops::{Answer, Lent};
use crate::sys::packet;

/// How long a mount may take: a file system may have a journal to write back first.
const PATIENCE: Duration = Duration::from_secs(25);
/// How often whoever waits for it is asked meanwhile whether he still does.
const LOOK: Timespec = Timespec { tv_sec: 0, tv_nsec: 500_000_000 };
/// Mounts of one user that are being made at a time.
const AT_ONCE_PER_USER: usize = 4;
/// Options of a mount, as bytes: a page, as with the kernel's.
const DATA_MAX: usize = 4096;
/// Of a message: every byte of a text takes six at the most.
const ORDER_MAX: usize = 6 * DATA_MAX + 4096;

/// What the maker is told.
#[derive(Debug, Serialize, Deserialize)]
struct Order {
    name: String,
    size: u64,
    kind: String,
    flags: u64,
    data: String,
}

/// A mount that is asked for, as mount(2) does.
#[derive(Clone, Copy, Debug)]
pub struct Wanted<'a> {
    /// The file system.
    pub kind: &'a FileSystem,
    /// `MS_*`.
    pub flags: u64,
    /// Options of the file system.
    pub data: &'a str,
    /// Whose user namespace owners are shown as: a file of /proc/PID/ns/user. None: as they are.
    pub namespace: Option<BorrowedFd<'a>>,
    /// Whose mounts are counted.
    pub user: u32,
}

/// The way to the process that makes mounts.
#[derive(Debug)]
pub struct KernelMounts {
    socket: OwnedFd,
    making: Mutex<BTreeMap<u32, usize>>,
}

impl KernelMounts {
    /// Starts the process. It ends with this, or with the daemon.
    pub fn start() -> Result<KernelMounts> {
        let cannot = |error| Error::os(error, "cannot start the process that makes kernel mounts");
        let (socket, theirs) = packet::pair().map_err(|error| cannot(error.into()))?;
        let mut command = Command::new("/proc/self/exe");
        command.arg0("loopengine").arg("mount-maker").stdin(theirs).stdout(Stdio::null());
        command.spawn().map_err(cannot)?;
        Ok(KernelMounts { socket, making: Mutex::default() })
    }

    /// Has the kernel mount a device of a pool ([`crate::loops::Pool::lend`] lends it). The answer is a
    /// mount that is mounted nowhere yet, for move_mount(2); or the errno that mount(2) would have.
    ///
    /// `waits` is asked now and then: does whoever wants the mount still wait?
    pub fn make(&self, lent: &Lent, wanted: Wanted<'_>, waits: &dyn Fn() -> bool) -> Answer<OwnedFd> {
        if wanted.data.len() >= DATA_MAX {
            return Err(Errno::INVAL);
        }
        // Before anybody is troubled.
        wanted.kind.settings(wanted.data)?;
        flags::translate(wanted.flags)?;
        let _counted = self.count(wanted.user)?;
        let order = Order {
            name: lent.name.clone(),
            size: lent.size,
            kind: wanted.kind.name.to_owned(),
            flags: wanted.flags,
            data: wanted.data.to_owned(),
        };
        let order = serde_json::to_vec(&order).map_err(|_| Errno::INVAL)?;
        let (reply, theirs) = packet::pair()?;
        let fds =
            [Some(theirs.as_fd()), Some(lent.node.as_fd()), Some(lent.device.as_fd()), wanted.namespace];
        let fds: Vec<_> = fds.into_iter().flatten().collect();
        packet::send(self.socket.as_fd(), &order, &fds).map_err(|error| {
            tracing::error!(%error, "the process that makes kernel mounts does not answer; restart the daemon");
            Errno::IO
        })?;
        drop(theirs);
        let until = Instant::now() + PATIENCE;
        while Instant::now() < until && waits() {
            match poll(&mut [PollFd::new(&reply, PollFlags::IN)], Some(&LOOK)) {
                Ok(0) | Err(Errno::INTR) => {}
                _ => return answer(&reply),
            }
        }
        Err(Errno::TIMEDOUT)
    }

    fn count(&self, user: u32) -> Answer<Counted<'_>> {
        let mut making = self.making();
        let count = making.entry(user).or_default();
        if *count >= AT_ONCE_PER_USER {
            return Err(Errno::AGAIN);
        }
        *count += 1;
        Ok(Counted { mounts: self, user })
    }

    fn making(&self) -> MutexGuard<'_, BTreeMap<u32, usize>> {
        self.making.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One of a user's, until it is dropped.
struct Counted<'a> {
    mounts: &'a KernelMounts,
    user: u32,
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        let mut making = self.mounts.making();
        if let Some(count) = making.get_mut(&self.user) {
            *count -= 1;
            if *count == 0 {
                making.remove(&self.user);
            }
        }
    }
}

fn answer(reply: &OwnedFd) -> Answer<OwnedFd> {
    let packet = packet::receive(reply.as_fd(), 16)?.filter(|packet| packet.whole).ok_or(Errno::IO)?;
    let code = packet.bytes.try_into().map(i32::from_ne_bytes);
    match (code, packet.fds.into_iter().next()) {
        (Ok(0), Some(mount)) => Ok(mount),
        (Ok(errno @ 1..4096), _) => Err(Errno::from_raw_os_error(errno)),
        _ => Err(Errno::IO),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_waits_for_few_at_a_time() {
        let (socket, _other) = packet::pair().unwrap();
        let mounts = KernelMounts { socket, making: Mutex::default() };
        let held: Vec<_> = (0..AT_ONCE_PER_USER).map(|_| mounts.count(7).unwrap()).collect();
        assert_eq!(mounts.count(7).map(drop), Err(Errno::AGAIN));
        assert!(mounts.count(8).is_ok());
        drop(held);
        assert!(mounts.count(7).is_ok() && mounts.making().is_empty());
    }

    #[test]
    fn answers() {
        let said = |bytes: &[u8], fds: &[BorrowedFd<'_>]| {
            let (ours, theirs) = packet::pair().unwrap();
            packet::send(theirs.as_fd(), bytes, fds).unwrap();
            answer(&ours).map(drop)
        };
        let file = std::fs::File::open("/dev/null").unwrap();
        assert_eq!(said(&0_i32.to_ne_bytes(), &[file.as_fd()]), Ok(()));
        assert_eq!(said(&0_i32.to_ne_bytes(), &[]), Err(Errno::IO));
        assert_eq!(said(&libc::EINVAL.to_ne_bytes(), &[]), Err(Errno::INVAL));
        assert_eq!(said(&[1], &[]), Err(Errno::IO));
        assert_eq!(said(&5000_i32.to_ne_bytes(), &[]), Err(Errno::IO));
        // The child died.
        let (ours, theirs) = packet::pair().unwrap();
        drop(theirs);
        assert_eq!(answer(&ours).map(drop), Err(Errno::IO));
    }
}
