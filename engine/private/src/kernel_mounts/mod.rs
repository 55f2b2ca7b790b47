//! Mounts that the kernel makes for tenants, of devices of their pools.
//!
//! ```text
//! daemon ── order, node, device, user namespace ──> maker ── fork ──> child: fsopen … open_tree
//!        <───────────── errno, or a mount that is mounted nowhere yet ─────────┘
//! daemon ── order, a container's directories ──> attacher ── fork ──> child: setns, openat2, move_mount
//! ```
//! What comes of the first is always nosuid and nodev, has its owners mapped to the tenant's user
//! namespace, and keeps both whatever root of that namespace does to it ([`maker`]). Which file systems, and
//! with which options: [`policy`]. The second is for containers, where nobody may attach it
//! ([`attacher`]). This room itself looks at no path of a tenant's, and does not know whose a device is.

pub mod attacher;
mod children;
mod confine;
mod flags;
pub mod maker;
mod orders;
pub mod policy;

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::io::Errno;
use serde::{Deserialize, Serialize};

pub use policy::FileSystem;

use crate::error::Result;
use crate::loops::{Answer, MountSource};
use crate::sys::process::Place;
use orders::{Done, Process};

/// The hidden commands that the processes are started as.
pub const MAKER: &str = "mount-maker";
/// See [`MAKER`].
pub const ATTACHER: &str = "mount-attacher";
/// Mounts of one tenant that are being made at a time.
const AT_ONCE_PER_TENANT: usize = 4;
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
    /// Whose mounts are counted: of one name few are made at a time.
    pub whose: &'a str,
}

/// The way to the processes that make mounts and attach them.
#[derive(Debug)]
pub struct KernelMounts {
    maker: Process,
    attacher: Process,
    making: Mutex<BTreeMap<String, usize>>,
}

impl KernelMounts {
    /// Starts the processes. They end with this, or with the daemon.
    pub fn start() -> Result<KernelMounts> {
        let (maker, attacher) = (Process::start(MAKER)?, Process::start(ATTACHER)?);
        Ok(KernelMounts { maker, attacher, making: Mutex::default() })
    }

    /// Has the kernel mount a device of a pool ([`crate::loops::Pool::mount_source`] lends it). The answer is a
    /// mount that is mounted nowhere yet, for move_mount(2); or the errno that mount(2) would have.
    ///
    /// `waits` is asked now and then: does whoever wants the mount still wait?
    pub fn make(
        &self,
        source: &MountSource,
        wanted: Wanted<'_>,
        waits: &dyn Fn() -> bool,
    ) -> Answer<OwnedFd> {
        if wanted.data.len() >= DATA_MAX {
            return Err(Errno::INVAL);
        }
        // Before anybody is troubled.
        wanted.kind.settings(wanted.data)?;
        flags::translate(wanted.flags)?;
        let _counted = self.count(wanted.whose)?;
        let order = Order {
            name: source.name.clone(),
            size: source.size,
            kind: wanted.kind.name.to_owned(),
            flags: wanted.flags,
            data: wanted.data.to_owned(),
        };
        let fds = [Some(source.node.as_fd()), Some(source.device.as_fd()), wanted.namespace];
        let fds: Vec<_> = fds.into_iter().flatten().collect();
        self.maker.ask(&order, &fds, waits)?.fd.ok_or(Errno::IO)
    }

    /// The number of the device at a path of a container's, and a directory there. None: no device.
    pub fn find(
        &self,
        place: &Place,
        source: &[u8],
        target: &[u8],
        waits: &dyn Fn() -> bool,
    ) -> Answer<Option<(u64, OwnedFd)>> {
        let order = attacher::Order::Find { source: source.to_vec(), target: target.to_vec() };
        let Done { number, fd } = self.attacher.ask(&order, &place.each_ref().map(AsFd::as_fd), waits)?;
        Ok(fd.map(|target| (number, target)))
    }

    /// The number of a mount, which no other will ever have.
    pub fn number(mount: BorrowedFd<'_>) -> Answer<u64> {
        attacher::number_of(mount)
    }

    /// Attaches a mount to a directory that was found. TIMEDOUT: it may be attached all the same.
    pub fn attach(&self, place: &Place, mount: OwnedFd, target: BorrowedFd<'_>) -> Answer<()> {
        let [_, _, namespace] = place;
        let fds = [namespace.as_fd(), mount.as_fd(), target];
        self.attacher.ask(&attacher::Order::Attach, &fds, &|| true).map(drop)
    }

    /// The number of the mount that has its root at a path of a container's.
    pub fn which(
        &self,
        place: &Place,
        path: &[u8],
        follow: bool,
        waits: &dyn Fn() -> bool,
    ) -> Answer<Option<u64>> {
        let order = attacher::Order::Which { path: path.to_vec(), follow };
        let done = self.attacher.ask(&order, &place.each_ref().map(AsFd::as_fd), waits)?;
        Ok((done.number != 0).then_some(done.number))
    }

    /// Takes off what is mounted on a directory, as umount2(2) with these flags.
    pub fn detach(&self, place: &Place, point: BorrowedFd<'_>, flags: u32) -> Answer<()> {
        let [_, _, namespace] = place;
        let order = attacher::Order::Detach { flags };
        self.attacher.ask(&order, &[namespace.as_fd(), point], &|| true).map(drop)
    }

    fn count(&self, whose: &str) -> Answer<Counted<'_>> {
        let mut making = self.making();
        let count = making.entry(whose.to_owned()).or_default();
        if *count >= AT_ONCE_PER_TENANT {
            return Err(Errno::AGAIN);
        }
        *count += 1;
        Ok(Counted { mounts: self, whose: whose.to_owned() })
    }

    fn making(&self) -> MutexGuard<'_, BTreeMap<String, usize>> {
        self.making.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One of a tenant's, until it is dropped.
struct Counted<'a> {
    mounts: &'a KernelMounts,
    whose: String,
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        let mut making = self.mounts.making();
        if let Some(count) = making.get_mut(&self.whose) {
            *count -= 1;
            if *count == 0 {
                making.remove(&self.whose);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::packet;

    #[test]
    fn a_tenant_waits_for_few_at_a_time() {
        let ((socket, _maker), (other, _attacher)) = (packet::pair().unwrap(), packet::pair().unwrap());
        let (maker, attacher) = (Process::of(socket), Process::of(other));
        let mounts = KernelMounts { maker, attacher, making: Mutex::default() };
        let held: Vec<_> = (0..AT_ONCE_PER_TENANT).map(|_| mounts.count("a").unwrap()).collect();
        assert_eq!(mounts.count("a").map(drop), Err(Errno::AGAIN));
        assert!(mounts.count("b").is_ok());
        drop(held);
        assert!(mounts.count("a").is_ok() && mounts.making().is_empty());
    }
}
