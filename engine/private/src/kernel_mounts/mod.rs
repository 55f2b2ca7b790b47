// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Kernel mounts for tenants, of devices of their pools.
//!
//! ```text
//! daemon ── request, node, device, user namespace ─> mount-maker ── fork ─> child: fsopen … open_tree
//!        <───────────── errno, or a detached mount ─────────┘
//! daemon ── request, a container's directories ─> mount-attacher ── fork ─> child: setns, openat2, move_mount
//! ```
//! The first process returns mounts that are always nosuid and nodev and have their owners mapped
//! to the tenant's user namespace; root of that namespace cannot change this ([`mount_maker`]).
//! [`policy`] lists the file systems and options. The second process is for containers that may not
//! mount themselves ([`mount_attacher`]). This module resolves no path of a tenant and does not
//! know a device's owner.

mod children;
mod confine;
mod flags;
mod helper;
pub mod mount_attacher;
pub mod mount_maker;
pub mod policy;

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::io::Errno;
use serde::{Deserialize, Serialize};

pub use policy::FileSystem;

use crate::error::Result;
use crate::loops::{Answer, MountSource};
use crate::sys::process::ProcFds;
use helper::{HelperProcess, HelperReply};

/// The hidden command of the process that makes mounts.
pub const MOUNT_MAKER: &str = "mount-maker";
/// The hidden command of the process that attaches mounts.
pub const MOUNT_ATTACHER: &str = "mount-attacher";
/// Maximum number of concurrent mounts per tenant.
const PER_TENANT_MAX: usize = 4;
/// Maximum size of mount options in bytes: a page, as in the kernel.
const DATA_MAX: usize = 4096;
/// Maximum size of a message: JSON takes at most six bytes per byte of text.
const REQUEST_MAX: usize = 6 * DATA_MAX + 4096;

/// A request to the mount-maker.
#[derive(Debug, Serialize, Deserialize)]
struct MakerRequest {
    name: String,
    size: u64,
    kind: String,
    flags: u64,
    data: String,
}

/// The arguments of a mount, as for mount(2).
#[derive(Clone, Copy, Debug)]
pub struct MountSpec<'a> {
    /// The file system.
    pub kind: &'a FileSystem,
    /// `MS_*`.
    pub flags: u64,
    /// Options of the file system.
    pub data: &'a str,
    /// The user namespace to which owners are mapped: a file of /proc/PID/ns/user. None: not
    /// mapped.
    pub namespace: Option<BorrowedFd<'a>>,
    /// The tenant whose concurrent mounts are limited.
    pub tenant: &'a str,
}

/// The client of the processes that make and attach mounts.
#[derive(Debug)]
pub struct KernelMounts {
    maker: HelperProcess,
    attacher: HelperProcess,
    making: Mutex<BTreeMap<String, usize>>,
}

impl KernelMounts {
    /// Starts the processes. They end with this value, or with the daemon.
    pub fn start() -> Result<KernelMounts> {
        let (maker, attacher) = (HelperProcess::start(MOUNT_MAKER)?, HelperProcess::start(MOUNT_ATTACHER)?);
        Ok(KernelMounts { maker, attacher, making: Mutex::default() })
    }

    /// Has the kernel mount a device of a pool ([`crate::loops::Pool::mount_source`] lends it). The answer
    /// is a mount that is mounted nowhere yet, for move_mount(2); or the errno that mount(2) would
    /// have.
    ///
    /// `still_waiting` is polled: whether the requester still waits for the mount.
    pub fn make(
        &self,
        mount_source: &MountSource,
        spec: MountSpec<'_>,
        still_waiting: &dyn Fn() -> bool,
    ) -> Answer<OwnedFd> {
        if spec.data.len() >= DATA_MAX {
            return Err(Errno::INVAL);
        }
        // Validates before the process is asked.
        spec.kind.settings(spec.data)?;
        flags::translate(spec.flags)?;
        let _counted = self.count(spec.tenant)?;
        let request = MakerRequest {
            name: mount_source.name.clone(),
            size: mount_source.size,
            kind: spec.kind.name.to_owned(),
            flags: spec.flags,
            data: spec.data.to_owned(),
        };
        let fds = [Some(mount_source.node.as_fd()), Some(mount_source.device.as_fd()), spec.namespace];
        let fds: Vec<_> = fds.into_iter().flatten().collect();
        self.maker.ask(&request, &fds, still_waiting)?.fd.ok_or(Errno::IO)
    }

    /// The number of the device at a container's path, and a directory there. None: no device.
    pub fn find(
        &self,
        proc_fds: &ProcFds,
        source: &[u8],
        target: &[u8],
        still_waiting: &dyn Fn() -> bool,
    ) -> Answer<Option<(u64, OwnedFd)>> {
        let request =
            mount_attacher::AttachRequest::Find { source: source.to_vec(), target: target.to_vec() };
        let HelperReply { number, fd } =
            self.attacher.ask(&request, &proc_fds.each_ref().map(AsFd::as_fd), still_waiting)?;
        Ok(fd.map(|target| (number, target)))
    }

    /// The unique id of a mount.
    pub fn number(mount: BorrowedFd<'_>) -> Answer<u64> {
        mount_attacher::mount_id_of(mount)
    }

    /// Attaches a mount to a directory that was found. TIMEDOUT: it may be attached all the same.
    pub fn attach(&self, proc_fds: &ProcFds, mount: OwnedFd, target: BorrowedFd<'_>) -> Answer<()> {
        let [_, _, namespace] = proc_fds;
        let fds = [namespace.as_fd(), mount.as_fd(), target];
        self.attacher.ask(&mount_attacher::AttachRequest::Attach, &fds, &|| true).map(drop)
    }

    /// The id of the mount whose root is at a container's path.
    pub fn which(
        &self,
        proc_fds: &ProcFds,
        path: &[u8],
        follow: bool,
        still_waiting: &dyn Fn() -> bool,
    ) -> Answer<Option<u64>> {
        let request = mount_attacher::AttachRequest::Which { path: path.to_vec(), follow };
        let reply = self.attacher.ask(&request, &proc_fds.each_ref().map(AsFd::as_fd), still_waiting)?;
        Ok((reply.number != 0).then_some(reply.number))
    }

    /// Unmounts a directory, as umount2(2) with these flags.
    pub fn detach(&self, proc_fds: &ProcFds, point: BorrowedFd<'_>, flags: u32) -> Answer<()> {
        let [_, _, namespace] = proc_fds;
        let request = mount_attacher::AttachRequest::Detach { flags };
        self.attacher.ask(&request, &[namespace.as_fd(), point], &|| true).map(drop)
    }

    fn count(&self, tenant: &str) -> Answer<MountPermit<'_>> {
        let mut making = self.making();
        let count = making.entry(tenant.to_owned()).or_default();
        if *count >= PER_TENANT_MAX {
            return Err(Errno::AGAIN);
        }
        *count += 1;
        Ok(MountPermit { mounts: self, tenant: tenant.to_owned() })
    }

    fn making(&self) -> MutexGuard<'_, BTreeMap<String, usize>> {
        self.making.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One concurrent mount of a tenant.
struct MountPermit<'a> {
    mounts: &'a KernelMounts,
    tenant: String,
}

impl Drop for MountPermit<'_> {
    fn drop(&mut self) {
        let mut making = self.mounts.making();
        if let Some(count) = making.get_mut(&self.tenant) {
            *count -= 1;
            if *count == 0 {
                making.remove(&self.tenant);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::packet;

    #[test]
    fn limits_concurrent_mounts_per_tenant() {
        let ((socket, _maker), (other, _attacher)) = (packet::pair().unwrap(), packet::pair().unwrap());
        let (maker, attacher) = (HelperProcess::of(socket), HelperProcess::of(other));
        let mounts = KernelMounts { maker, attacher, making: Mutex::default() };
        let held: Vec<_> = (0..PER_TENANT_MAX).map(|_| mounts.count("a").unwrap()).collect();
        assert_eq!(mounts.count("a").map(drop), Err(Errno::AGAIN));
        assert!(mounts.count("b").is_ok());
        drop(held);
        assert!(mounts.count("a").is_ok() && mounts.making().is_empty());
    }
}
