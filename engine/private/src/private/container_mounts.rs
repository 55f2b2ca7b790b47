// SPDX-License-Identifier: Apache-2.0 OR MIT
//! mount(2) and umount2(2) of a container: which device it is, and where it is mounted.
//!
//! Root of a container has, by default, no right to mount. So the daemon has the kernel mount a
//! device of the container's pool, and attaches the mount where the container asks
//! ([`KernelMounts`] does both). It unmounts only its own mounts. The kernel serves all other
//! calls, and refuses them with EPERM.
//!
//! The daemon identifies a mount by its unique mount id, and unmounts it through the directory that
//! it covers. So it keeps no descriptor that makes the mount busy.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::intercept::mounts::{MountHandler, MountRequest, UnmountRequest};
use crate::kernel_mounts::{FileSystem, KernelMounts, MountSpec};
use crate::loops::{Answer, Errno, Pool};
use crate::sys::process::ProcFds;

/// Maximum number of mounts of a pool.
const MOUNTS_MAX: usize = 256;
/// Maximum number of concurrent calls of a pool: each has a process that resolves a path.
const CALLS_MAX: usize = 4;

/// The mounts of a pool in its container.
#[derive(Debug, Default)]
pub(super) struct MountTable {
    mounts: Mutex<Vec<ContainerMount>>,
    busy: AtomicUsize,
}

#[derive(Debug)]
struct ContainerMount {
    number: u64,
    /// The directory that it covers.
    point: OwnedFd,
}

impl MountTable {
    /// Removes all: the mount namespace of the container is gone.
    pub(super) fn clear(&self) {
        let gone = std::mem::take(&mut *self.mounts());
        drop(gone);
    }

    fn forget(&self, number: u64) {
        self.mounts().retain(|mounted| mounted.number != number);
    }

    fn mounts(&self) -> MutexGuard<'_, Vec<ContainerMount>> {
        self.mounts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn enter(&self) -> Answer<CallGuard<'_>> {
        let busy = CallGuard(&self.busy);
        match self.busy.fetch_add(1, Relaxed) {
            count if count < CALLS_MAX => Ok(busy),
            _ => Err(Errno::AGAIN),
        }
    }
}

/// A call in progress, until this is dropped.
struct CallGuard<'a>(&'a AtomicUsize);

impl Drop for CallGuard<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}

/// Serves mounts of a pool for the processes under one filter.
pub(super) struct ContainerMounts {
    pub(super) pool: Arc<Pool>,
    pub(super) kernel: Arc<KernelMounts>,
    /// Allowed file systems.
    pub(super) allowed: Vec<&'static FileSystem>,
    /// The container's user namespace, if it has one of its own.
    pub(super) namespace: Option<OwnedFd>,
    pub(super) table: Arc<MountTable>,
}

impl MountHandler for ContainerMounts {
    fn mount(
        &self,
        request: &MountRequest,
        proc_fds: ProcFds,
        is_waiting: &dyn Fn() -> bool,
    ) -> Answer<Option<()>> {
        let _busy = self.table.enter()?;
        let found = self.kernel.find(&proc_fds, &request.source, &request.target, is_waiting)?;
        let Some((device, target)) = found.filter(|(device, _)| self.pool.has_device(*device)) else {
            return Ok(None);
        };
        // mount(8) reports an unknown file system.
        let kind = self.allowed.iter().find(|kind| kind.name == request.kind).ok_or(Errno::NODEV)?;
        if self.table.mounts().len() >= MOUNTS_MAX {
            return Err(Errno::NOSPC);
        }
        let wanted = MountSpec {
            kind,
            flags: request.flags,
            data: &request.data,
            namespace: self.namespace.as_ref().map(AsFd::as_fd),
            tenant: &self.pool.spec().name,
        };
        let make = |source: &_| self.kernel.make(source, wanted, is_waiting);
        let mount = request.attempted(self.pool.mount_source(device, make))?;
        // The caller may have been killed meanwhile.
        if !is_waiting() {
            return Err(Errno::INTR);
        }
        let number = KernelMounts::number(mount.as_fd())?;
        let point = target.try_clone().map_err(|_| Errno::MFILE)?;
        self.table.mounts().push(ContainerMount { number, point });
        let attached = self.kernel.attach(&proc_fds, mount, target.as_fd());
        if attached.is_err_and(|errno| errno != Errno::TIMEDOUT) {
            self.table.forget(number);
        }
        attached.map(Some)
    }

    fn umount(
        &self,
        request: &UnmountRequest,
        proc_fds: ProcFds,
        is_waiting: &dyn Fn() -> bool,
    ) -> Answer<Option<()>> {
        let _busy = self.table.enter()?;
        let follow = request.flags & libc::UMOUNT_NOFOLLOW.cast_unsigned() == 0;
        let Ok(Some(number)) = self.kernel.which(&proc_fds, &request.path, follow, is_waiting) else {
            return Ok(None);
        };
        let point = match self.table.mounts().iter().find(|mounted| mounted.number == number) {
            Some(mounted) => mounted.point.try_clone().map_err(|_| Errno::MFILE)?,
            None => return Ok(None),
        };
        // Root of a container may not abort I/O of others.
        if request.flags & libc::MNT_FORCE.cast_unsigned() != 0 {
            return Err(Errno::PERM);
        }
        self.kernel.detach(&proc_fds, point.as_fd(), request.flags)?;
        self.table.forget(number);
        // Its device may be released now.
        self.pool.expect_close();
        Ok(Some(()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_concurrent_calls() {
        let table = MountTable::default();
        let held: Vec<_> = (0..CALLS_MAX).map(|_| table.enter().unwrap()).collect();
        assert_eq!(table.enter().map(drop), Err(Errno::AGAIN));
        assert_eq!(table.enter().map(drop), Err(Errno::AGAIN));
        drop(held);
        assert!(table.enter().is_ok());
        assert_eq!(table.busy.load(Relaxed), 0);
    }
}
