//! Containers as users of a pool: one after the other, each with a filter for every process that its
//! runtime starts in it.
//!
//! A pool that root has made for containers stays when one has gone: its devices are unbound, within a
//! second, and the next may come; usually the same one, started again. Knows who uses a pool now. Does
//! not know what runtimes say, nor what a call means.

use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::descriptors::check_listener;
use super::tree::Tree;
use super::{Caller, Registry, Shared, open_to};
use crate::error::{Error, Kind, Result};
use crate::sys::seccomp::is_over;

/// Filters of one container at a time: that of its first process, and one for each `exec`.
const FILTERS_MAX: usize = 64;
/// How long devices that somebody holds are left to him when their container has gone.
pub(super) const HELD_MAX: Duration = Duration::from_millis(500);
/// How long the next container waits for a pool to be as new.
const TURN_MAX: Duration = Duration::from_secs(5);
/// Characters of a hook's problem in the log.
const PROBLEM_MAX: usize = 1024;
const TURN_PAUSE: Duration = Duration::from_millis(10);

/// A process of a container, whose calls are to be served.
#[derive(Debug)]
pub struct Guest {
    /// The container's name with its runtime.
    pub id: String,
    /// The listener of its filter.
    pub listener: OwnedFd,
    /// Its user namespace, whose root is the pool's administrator; none: that of the container, which is
    /// there already.
    pub namespace: Option<OwnedFd>,
    /// Devices that it may use, if fewer than the pool has.
    pub max: Option<u32>,
    /// File systems that the kernel may mount for it, if fewer than the pool allows.
    pub mounts: Option<Vec<String>>,
}

/// Who uses a pool.
#[derive(Debug, Default)]
pub(super) struct Guests {
    id: String,
    listeners: Vec<OwnedFd>,
    namespace: Option<OwnedFd>,
    /// The last has gone, and its devices are being unbound.
    clearing: bool,
}

enum Turn {
    /// It is among the pool's, under this number.
    Now(RawFd),
    Later,
}

impl Guests {
    /// Somebody is there, or has just gone.
    pub(super) fn any(&self) -> bool {
        self.clearing || !self.listeners.is_empty()
    }

    /// Who that is, as its runtime calls it.
    pub(super) fn container(&self) -> Option<&str> {
        self.any().then_some(self.id.as_str())
    }

    /// A process of the container is there.
    fn is_used(&self) -> bool {
        !self.clearing && !self.listeners.iter().all(has_ended)
    }

    fn refusal(&self, pool: &str) -> Error {
        Error::new(Kind::Busy, format!("private pool {pool} is used by container {}", self.id))
            .hint("give each container a pool of its own")
    }

    fn enter(&mut self, pool: &str, guest: &mut Guest) -> Result<Turn> {
        if self.clearing {
            return Ok(Turn::Later);
        }
        if !self.listeners.is_empty() {
            // They are seen off by the reaper; a container of the same name may be another.
            if !self.is_used() {
                return Ok(Turn::Later);
            }
            if self.id != guest.id {
                return Err(self.refusal(pool));
            }
            self.listeners.retain(|listener| !has_ended(listener));
            if self.listeners.len() >= FILTERS_MAX {
                let message = format!("{FILTERS_MAX} processes were started in the container already");
                return Err(Error::new(Kind::Quota, message));
            }
        }
        let cannot = |error| Error::os(error, "cannot watch a container");
        match (&guest.namespace, &self.namespace) {
            (Some(its), _) => self.namespace = Some(its.try_clone().map_err(cannot)?),
            (None, Some(known)) if !self.listeners.is_empty() => {
                guest.namespace = Some(known.try_clone().map_err(cannot)?);
            }
            _ => return Err(Error::new(Kind::NotFound, format!("cannot find container {}", guest.id))),
        }
        let watched = guest.listener.try_clone().map_err(cannot)?;
        let number = watched.as_raw_fd();
        self.listeners.push(watched);
        self.id.clone_from(&guest.id);
        Ok(Turn::Now(number))
    }

    /// Has the last gone? Then its devices are to be unbound.
    fn leave(&mut self) -> bool {
        self.listeners.retain(|listener| !has_ended(listener));
        let last = self.listeners.is_empty() && !self.clearing;
        self.clearing |= last;
        last
    }
}

/// Nobody is left under its filter.
fn has_ended(listener: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(listener, PollFlags::empty())];
    let looked = poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }));
    looked.is_ok() && is_over(fds[0].revents())
}

impl Registry {
    /// Keeps the names of a pool's partitions in the /dev of a container that is being made. May block on `dev`.
    pub fn show_in(&self, name: &str, id: &str, dev: OwnedFd, caller: Caller) -> Result<()> {
        let container = Tree::adopt(dev)
            .map_err(|error| Error::os(error, format!("cannot make names in the /dev of container {id}")))?;
        let until = Instant::now() + TURN_MAX;
        loop {
            let mut state = self.shared.state();
            let (_, tenant, _) = open_to(&mut state, name, caller)?;
            let guests = &tenant.guests;
            if !guests.any() {
                let Some(mirror) = tenant.mirror.clone().filter(|_| tenant.spec.fixed) else {
                    return Err(Error::new(
                        Kind::Invalid,
                        format!("private pool {name} is not for containers"),
                    ));
                };
                drop(state);
                mirror.show_in(Some(container));
                return Ok(());
            }
            if guests.is_used() {
                return Err(guests.refusal(name));
            }
            drop(state);
            if Instant::now() >= until {
                return Err(Error::new(Kind::Busy, format!("private pool {name} is not free yet")));
            }
            std::thread::sleep(TURN_PAUSE);
        }
    }

    /// Logs why a container could not be prepared for a pool: its runtime may show that to nobody.
    pub fn report_container(&self, name: &str, id: &str, problem: &str, caller: Caller) -> Result<()> {
        open_to(&mut self.shared.state(), name, caller)?;
        // Quoted, since a container's name and its files are strangers' words; and not without end.
        let problem: String = problem.chars().take(PROBLEM_MAX).collect();
        tracing::warn!("container {id:?} was not prepared for private pool {name}: {problem:?}");
        Ok(())
    }

    /// Serves a process of a container. The pool is one that root has made for containers; or any of its, which
    /// then ends with the container.
    pub fn admit(&self, name: &str, mut guest: Guest, caller: Caller) -> Result<()> {
        check_listener(&guest.listener)?;
        let until = Instant::now() + TURN_MAX;
        let (id, number, room) = loop {
            let mut state = self.shared.state();
            let (id, tenant, room) = open_to(&mut state, name, caller)?;
            if !tenant.spec.fixed {
                drop(state);
                let missing = || Error::new(Kind::NotFound, format!("cannot find container {}", guest.id));
                let namespace = guest.namespace.ok_or_else(missing)?;
                return self.supervise(name, guest.listener, namespace, None, caller);
            }
            match tenant.guests.enter(name, &mut guest)? {
                Turn::Now(number) => break (id, number, room),
                Turn::Later if Instant::now() >= until => {
                    return Err(Error::new(Kind::Busy, format!("private pool {name} is not free yet")));
                }
                Turn::Later => drop(state),
            }
            std::thread::sleep(TURN_PAUSE);
        };
        let watched = guest.listener.try_clone();
        let served = watched
            .map_err(|error| Error::os(error, "cannot watch a container"))
            .and_then(|watched| room.admit(guest).map(|()| watched))
            .inspect_err(|_| {
                // Whoever keeps a listener and does not serve it has its callers wait for ever.
                if let Some(tenant) = self.shared.state().tenants.get_mut(&id) {
                    tenant.guests.listeners.retain(|listener| listener.as_raw_fd() != number);
                }
            })?;
        self.reaper.watch(id, served).map_err(|error| Error::os(error, "cannot watch a container"))
    }
}

impl Shared {
    /// The processes under one filter are gone: the end of a pool, or the turn of the next container.
    pub(super) fn left(&self, id: u64) {
        let (name, guest, room, mirror) = {
            let mut state = self.state();
            let Some(tenant) = state.tenants.get_mut(&id) else { return };
            if !tenant.spec.fixed {
                drop(state);
                return self.end(id, true);
            }
            if !tenant.guests.leave() {
                return;
            }
            (tenant.spec.name.clone(), tenant.guests.id.clone(), tenant.room.clone(), tenant.mirror.clone())
        };
        if let Some(room) = room {
            room.reset();
        }
        if let Some(mirror) = mirror {
            mirror.show_in(None);
        }
        tracing::info!("container {guest:?} has left private pool {name}");
        if let Some(tenant) = self.state().tenants.get_mut(&id) {
            tenant.guests = Guests::default();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Any descriptor whose other end can go stands for a listener here.
    fn guest(id: &str) -> (Guest, std::io::PipeWriter) {
        let (reader, writer) = std::io::pipe().unwrap();
        let namespace = Some(std::fs::File::open("/proc/self/ns/user").unwrap().into());
        (Guest { id: id.to_owned(), listener: reader.into(), namespace, max: None, mounts: None }, writer)
    }

    fn enters(guests: &mut Guests, guest: &mut Guest) -> Option<bool> {
        guests.enter("ci", guest).ok().map(|turn| matches!(turn, Turn::Now(_)))
    }

    #[test]
    fn one_container_after_the_other() {
        let mut guests = Guests::default();
        let ((mut one, first), (mut exec, second)) = (guest("a"), guest("a"));
        let (mut other, _third) = guest("b");
        exec.namespace = None;
        assert_eq!(enters(&mut guests, &mut exec), None, "of what container?");
        assert_eq!(guests.container(), None);
        assert_eq!(enters(&mut guests, &mut one), Some(true));
        assert_eq!(enters(&mut guests, &mut exec), Some(true), "another process of the same");
        assert!(exec.namespace.is_some(), "as its container");
        assert_eq!(guests.container(), Some("a"));
        assert_eq!(guests.enter("ci", &mut other).err().map(|error| error.kind()), Some(Kind::Busy));
        drop(first);
        assert!(!guests.leave(), "one process is left");
        assert_eq!(enters(&mut guests, &mut other), None);
        drop(second);
        // Gone, and not cleared away yet: also for one of the same name.
        assert_eq!(enters(&mut guests, &mut exec), Some(false));
        assert!(guests.leave() && guests.any());
        assert!(!guests.leave(), "once");
        assert_eq!(enters(&mut guests, &mut other), Some(false));
        guests = Guests::default();
        assert_eq!(enters(&mut guests, &mut other), Some(true));
    }

    #[test]
    fn processes_of_a_container_are_bounded() {
        let mut guests = Guests::default();
        let mut held: Vec<_> = (0..FILTERS_MAX).map(|_| guest("a")).collect();
        assert!(held.iter_mut().all(|(guest, _)| enters(&mut guests, guest) == Some(true)));
        let (mut more, _writer) = guest("a");
        assert_eq!(guests.enter("ci", &mut more).err().map(|error| error.kind()), Some(Kind::Quota));
    }
}
