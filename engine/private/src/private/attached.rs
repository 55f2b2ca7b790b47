//! mount(2) and umount2(2) of a container: whose device it is, and what of it is mounted where.
//!
//! Root of a container has, by default, no right to mount. So the daemon has the kernel mount a device of
//! the container's pool, and that attached where the container says ([`KernelMounts`] does both); and it takes off
//! what it has attached, and nothing else. What is mounted elsewhere, or is no device of the pool, is
//! left to the kernel, which says EPERM.
//!
//! A mount is known by its number, which no other ever has, and by the directory that it covers: through
//! that it is taken off, so that nothing of it is in use meanwhile.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::intercept::mounts::{Asked, Mounts, Unmount};
use crate::kernel_mounts::{FileSystem, KernelMounts, MountSpec};
use crate::loops::{Answer, Errno, Pool};
use crate::sys::process::Place;

/// Mounts of a pool at the most, as many as a container could want.
const MOUNTS_MAX: usize = 256;
/// Calls of a pool that are served at a time: each has a process look for a path.
const AT_ONCE: usize = 4;

/// What is mounted of a pool in its container.
#[derive(Debug, Default)]
pub(super) struct Table {
    mounts: Mutex<Vec<Mounted>>,
    busy: AtomicUsize,
}

#[derive(Debug)]
struct Mounted {
    number: u64,
    /// The directory that it covers.
    point: OwnedFd,
}

impl Table {
    /// Forgets all: the container has gone, and its mount namespace with it.
    pub(super) fn clear(&self) {
        let gone = std::mem::take(&mut *self.mounts());
        drop(gone);
    }

    fn forget(&self, number: u64) {
        self.mounts().retain(|mounted| mounted.number != number);
    }

    fn mounts(&self) -> MutexGuard<'_, Vec<Mounted>> {
        self.mounts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn enter(&self) -> Answer<Busy<'_>> {
        let busy = Busy(&self.busy);
        match self.busy.fetch_add(1, Relaxed) {
            count if count < AT_ONCE => Ok(busy),
            _ => Err(Errno::AGAIN),
        }
    }
}

/// A call that is being served, until it is dropped.
struct Busy<'a>(&'a AtomicUsize);

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}

/// Mounts of a pool for the processes under one filter.
pub(super) struct Attached {
    pub(super) pool: Arc<Pool>,
    pub(super) kernel: Arc<KernelMounts>,
    /// File systems that may be mounted.
    pub(super) allowed: Vec<&'static FileSystem>,
    /// The container's user namespace, if it has one of its own.
    pub(super) namespace: Option<OwnedFd>,
    pub(super) table: Arc<Table>,
}

impl Mounts for Attached {
    fn mount(&self, asked: &Asked, place: Place, waits: &dyn Fn() -> bool) -> Answer<Option<()>> {
        let _busy = self.table.enter()?;
        let found = self.kernel.find(&place, &asked.source, &asked.target, waits)?;
        let Some((device, target)) = found.filter(|(device, _)| self.pool.has(*device)) else {
            return Ok(None);
        };
        // mount(8) calls it an unknown file system.
        let kind = self.allowed.iter().find(|kind| kind.name == asked.kind).ok_or(Errno::NODEV)?;
        if self.table.mounts().len() >= MOUNTS_MAX {
            return Err(Errno::NOSPC);
        }
        let wanted = MountSpec {
            kind,
            flags: asked.flags,
            data: &asked.data,
            namespace: self.namespace.as_ref().map(AsFd::as_fd),
            tenant: &self.pool.spec().name,
        };
        let mount = self.pool.lend(device, |lent| self.kernel.make(lent, wanted, waits))?;
        // Who was killed meanwhile wants none.
        if !waits() {
            return Err(Errno::INTR);
        }
        let number = KernelMounts::number(mount.as_fd())?;
        let point = target.try_clone().map_err(|_| Errno::MFILE)?;
        self.table.mounts().push(Mounted { number, point });
        let attached = self.kernel.attach(&place, mount, target.as_fd());
        if attached.is_err_and(|errno| errno != Errno::TIMEDOUT) {
            self.table.forget(number);
        }
        attached.map(Some)
    }

    fn umount(&self, asked: &Unmount, place: Place, waits: &dyn Fn() -> bool) -> Answer<Option<()>> {
        let _busy = self.table.enter()?;
        let follow = asked.flags & libc::UMOUNT_NOFOLLOW.cast_unsigned() == 0;
        let Ok(Some(number)) = self.kernel.which(&place, &asked.path, follow, waits) else {
            return Ok(None);
        };
        let point = match self.table.mounts().iter().find(|mounted| mounted.number == number) {
            Some(mounted) => mounted.point.try_clone().map_err(|_| Errno::MFILE)?,
            None => return Ok(None),
        };
        // To break what others wait for is more than root of a container may.
        if asked.flags & libc::MNT_FORCE.cast_unsigned() != 0 {
            return Err(Errno::PERM);
        }
        self.kernel.detach(&place, point.as_fd(), asked.flags)?;
        self.table.forget(number);
        // Its device may be unbound now.
        self.pool.expect_close();
        Ok(Some(()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_calls_at_a_time() {
        let table = Table::default();
        let held: Vec<_> = (0..AT_ONCE).map(|_| table.enter().unwrap()).collect();
        assert_eq!(table.enter().map(drop), Err(Errno::AGAIN));
        assert_eq!(table.enter().map(drop), Err(Errno::AGAIN));
        drop(held);
        assert!(table.enter().is_ok());
        assert_eq!(table.busy.load(Relaxed), 0);
    }
}
