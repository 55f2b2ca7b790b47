//! The thread that ends tenants: it waits for the end of their processes, and takes them from the
//! table when no device of them is left.
//!
//! Ends run on threads of their own, since one may take seconds. The thread itself never waits for a
//! pool, so that the ends of others are seen within their second.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};

use super::Shared;
use super::mirror::Mirror;
use crate::error::{Error, Result};
use crate::loops::Entry;
use crate::sys::seccomp::is_over;
use crate::sys::stack::Stack;

/// See the module.
pub(super) struct Reaper {
    wake: OwnedFd,
    todo: Mutex<Todo>,
}

#[derive(Default)]
struct Todo {
    watch: Vec<(u64, OwnedFd)>,
    end: Vec<u64>,
    ended: Vec<u64>,
    stop: bool,
}

/// What the parts of one tenant report. May be called from anywhere; never waits for a pool.
#[derive(Clone)]
pub struct Events {
    id: u64,
    mirror: Option<Arc<Mirror>>,
    reaper: Arc<Reaper>,
}

impl Events {
    /// The device with this number has changed: `now` tells what it is like; none: it is gone.
    pub fn changed(&self, number: u32, now: impl FnOnce() -> Option<Entry>) {
        if let Some(mirror) = &self.mirror {
            mirror.show(number, now);
        }
    }

    /// Devices with these numbers will be there when somebody looks their names up.
    pub fn promised(&self, numbers: &[u32]) {
        if let Some(mirror) = &self.mirror {
            mirror.promise(numbers);
        }
    }

    /// A disk that lies upon its devices has come, or gone.
    pub fn stacked(&self, stack: &Stack, is_there: bool) {
        if let Some(mirror) = &self.mirror {
            mirror.show_stack(stack, is_there);
        }
    }

    /// No device is left, and none will come.
    pub fn ended(&self) {
        self.reaper.tell(|todo| todo.ended.push(self.id));
    }
}

impl Reaper {
    pub(super) fn start(shared: Arc<Shared>) -> Result<Arc<Reaper>> {
        let cannot = |error: io::Error| Error::os(error, "cannot watch over private pools");
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let wake = wake.map_err(|error| cannot(error.into()))?;
        let reaper = Arc::new(Reaper { wake, todo: Mutex::default() });
        let own = Arc::clone(&reaper);
        let thread = std::thread::Builder::new().name("private".to_owned());
        thread.spawn(move || own.run(&shared)).map_err(cannot)?;
        Ok(reaper)
    }

    pub(super) fn events(self: &Arc<Self>, id: u64, mirror: Option<Arc<Mirror>>) -> Events {
        Events { id, mirror, reaper: Arc::clone(self) }
    }

    /// Has the tenant told when the last process under the filter of `listener` is gone.
    pub(super) fn watch(&self, id: u64, listener: OwnedFd) -> io::Result<()> {
        self.tell(|todo| todo.watch.push((id, listener)));
        Ok(())
    }

    /// Ends the tenant by force.
    pub(super) fn end(&self, id: u64) {
        self.tell(|todo| todo.end.push(id));
    }

    pub(super) fn stop(&self) {
        self.tell(|todo| todo.stop = true);
    }

    fn todo(&self) -> MutexGuard<'_, Todo> {
        self.todo.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell(&self, what: impl FnOnce(&mut Todo)) {
        what(&mut self.todo());
        // Full means that it wakes anyway.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    fn run(&self, shared: &Arc<Shared>) {
        let mut listeners: Vec<(u64, OwnedFd)> = Vec::new();
        loop {
            let todo = std::mem::take(&mut *self.todo());
            if todo.stop {
                return;
            }
            listeners.extend(todo.watch);
            for id in todo.ended {
                listeners.retain(|(of, _)| *of != id);
                apart(shared, id, Shared::forget);
            }
            for id in todo.end {
                listeners.retain(|(of, _)| *of != id);
                apart(shared, id, |shared, id| shared.end(id, true));
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
            left.into_iter().for_each(|id| apart(shared, id, Shared::left));
        }
    }

    /// Waits until there is something to do; answers which listeners' processes are gone.
    fn wait(&self, listeners: &[(u64, OwnedFd)]) -> Vec<usize> {
        let mut fds = vec![PollFd::new(&self.wake, PollFlags::IN)];
        // No event is asked for: the end is reported all the same.
        fds.extend(listeners.iter().map(|(_, listener)| PollFd::new(listener, PollFlags::empty())));
        if let Err(error) = poll(&mut fds, None)
            && error != rustix::io::Errno::INTR
        {
            tracing::error!("cannot watch over private pools: {error}");
            std::thread::sleep(std::time::Duration::from_millis(100));
        }
        let _ = rustix::io::read(&self.wake, &mut [0; 8]);
        fds[1..].iter().enumerate().filter(|(_, fd)| is_over(fd.revents())).map(|(at, _)| at).collect()
    }
}

/// Does `work` on a thread of its own; at most one or two a tenant.
fn apart(shared: &Arc<Shared>, id: u64, work: fn(&Shared, u64)) {
    let of_thread = Arc::clone(shared);
    let thread = std::thread::Builder::new().name("private-end".to_owned());
    if let Err(error) = thread.spawn(move || work(&of_thread, id)) {
        tracing::warn!("no thread to end a private pool: {error}");
        work(shared, id);
    }
}
