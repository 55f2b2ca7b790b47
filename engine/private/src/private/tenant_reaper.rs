// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The thread that ends tenants: it waits for the end of their processes, and removes tenants
//! without devices from the registry.
//!
//! Each end runs on a thread of its own, since it may take seconds. The reaper itself never waits
//! for a pool, so that it detects other ends within a second.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};

use super::RegistryShared;
use super::mirror::Mirror;
use crate::error::{Error, Result};
use crate::loops::DeviceEntry;
use crate::sys::seccomp::is_over;
use crate::sys::stack::Stack;

/// Controls the thread.
pub(super) struct TenantReaper {
    wake: OwnedFd,
    work: Mutex<ReaperWork>,
}

#[derive(Default)]
struct ReaperWork {
    watch: Vec<(u64, OwnedFd)>,
    end: Vec<u64>,
    ended: Vec<u64>,
    stop: bool,
}

/// Receives the events of one tenant. May be called from any thread; never waits for a pool.
#[derive(Clone)]
pub struct TenantEvents {
    id: u64,
    mirror: Option<Arc<Mirror>>,
    reaper: Arc<TenantReaper>,
}

impl TenantEvents {
    /// The device with this number has changed. `now` returns its state; none: it is removed.
    pub fn changed(&self, number: u32, now: impl FnOnce() -> Option<DeviceEntry>) {
        if let Some(mirror) = &self.mirror {
            mirror.update_device(number, now);
        }
    }

    /// Devices with these numbers are created by their first lookup.
    pub fn preallocated(&self, numbers: &[u32]) {
        if let Some(mirror) = &self.mirror {
            mirror.preallocate(numbers);
        }
    }

    /// A disk stacked on its devices was added or removed.
    pub fn stack_changed(&self, stack: &Stack, is_there: bool) {
        if let Some(mirror) = &self.mirror {
            mirror.update_stack(stack, is_there);
        }
    }

    /// The pool has ended: it has no device left.
    pub fn ended(&self) {
        self.reaper.queue(|work| work.ended.push(self.id));
    }
}

impl TenantReaper {
    pub(super) fn start(shared: Arc<RegistryShared>) -> Result<Arc<TenantReaper>> {
        let cannot = |error: io::Error| Error::os(error, "cannot watch private pools");
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let wake = wake.map_err(|error| cannot(error.into()))?;
        let reaper = Arc::new(TenantReaper { wake, work: Mutex::default() });
        let own = Arc::clone(&reaper);
        let thread = std::thread::Builder::new().name("private".to_owned());
        thread.spawn(move || own.run(&shared)).map_err(cannot)?;
        Ok(reaper)
    }

    pub(super) fn events(self: &Arc<Self>, id: u64, mirror: Option<Arc<Mirror>>) -> TenantEvents {
        TenantEvents { id, mirror, reaper: Arc::clone(self) }
    }

    /// Ends the tenant's session when the last process under the filter of `listener` ends.
    pub(super) fn watch(&self, id: u64, listener: OwnedFd) -> io::Result<()> {
        self.queue(|work| work.watch.push((id, listener)));
        Ok(())
    }

    /// Ends the tenant by force.
    pub(super) fn end(&self, id: u64) {
        self.queue(|work| work.end.push(id));
    }

    pub(super) fn stop(&self) {
        self.queue(|work| work.stop = true);
    }

    fn work(&self) -> MutexGuard<'_, ReaperWork> {
        self.work.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn queue(&self, what: impl FnOnce(&mut ReaperWork)) {
        what(&mut self.work());
        // A full counter wakes the thread too.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    fn run(&self, shared: &Arc<RegistryShared>) {
        let mut listeners: Vec<(u64, OwnedFd)> = Vec::new();
        loop {
            let work = std::mem::take(&mut *self.work());
            if work.stop {
                return;
            }
            listeners.extend(work.watch);
            for id in work.ended {
                listeners.retain(|(of, _)| *of != id);
                spawn_or_run(shared, id, RegistryShared::remove);
            }
            for id in work.end {
                listeners.retain(|(of, _)| *of != id);
                spawn_or_run(shared, id, |shared, id| shared.end(id, true));
            }
            let gone = self.wait(&listeners);
            let mut left: Vec<u64> = Vec::new();
            let mut at = 0..;
            listeners.retain(|(id, _)| {
                let stays = !at.next().is_some_and(|at| gone.contains(&at));
                left.extend((!stays).then_some(*id));
                stays
            });
            left.dedup();
            left.into_iter().for_each(|id| spawn_or_run(shared, id, RegistryShared::session_ended));
        }
    }

    /// Waits for work. Returns the listeners without processes.
    fn wait(&self, listeners: &[(u64, OwnedFd)]) -> Vec<usize> {
        let mut fds = vec![PollFd::new(&self.wake, PollFlags::IN)];
        // POLLHUP is reported without a request.
        fds.extend(listeners.iter().map(|(_, listener)| PollFd::new(listener, PollFlags::empty())));
        if let Err(error) = poll(&mut fds, None)
            && error != rustix::io::Errno::INTR
        {
            tracing::error!("cannot watch private pools: {error}");
            std::thread::sleep(std::time::Duration::from_millis(100));
        }
        let _ = rustix::io::read(&self.wake, &mut [0; 8]);
        fds[1..].iter().enumerate().filter(|(_, fd)| is_over(fd.revents())).map(|(at, _)| at).collect()
    }
}

/// Runs `work` on a thread of its own; at most one or two per tenant.
fn spawn_or_run(shared: &Arc<RegistryShared>, id: u64, work: fn(&RegistryShared, u64)) {
    let of_thread = Arc::clone(shared);
    let thread = std::thread::Builder::new().name("private-end".to_owned());
    if let Err(error) = thread.spawn(move || work(&of_thread, id)) {
        tracing::warn!("cannot start a thread to end a private pool: {error}");
        work(shared, id);
    }
}
