// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Sessions of containers in a pool: one container after the other, each with a filter per process
//! that its runtime starts in it.
//!
//! A pool that root opens for containers stays when a container ends: its devices are unbound
//! within a second, and the next container may start; usually the same one, restarted. Knows which
//! container uses a pool now. Does not know the messages of runtimes, nor what a call does.

use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::descriptors::check_listener;
use super::tree::Tree;
use super::{Caller, Registry, RegistryShared, RegistryState, Tenant, open_to};
use crate::error::{Error, Kind, Result};
use crate::sys::seccomp::is_over;

/// Maximum number of filters of a container: one for its first process, and one per `exec`.
const FILTERS_MAX: usize = 64;
/// How long holders may keep a device after the container ended.
pub(super) const HOLD_TIMEOUT: Duration = Duration::from_millis(500);
/// How long the next container waits until the pool is reset.
const ADMISSION_TIMEOUT: Duration = Duration::from_secs(5);
/// Maximum number of logged characters of a hook's error.
const PROBLEM_MAX: usize = 1024;
const ADMISSION_INTERVAL: Duration = Duration::from_millis(10);

/// A process of a container that requests service for its calls.
#[derive(Debug)]
pub struct ContainerSession {
    /// The id of the container at its runtime.
    pub id: String,
    /// The listener of its filter.
    pub listener: OwnedFd,
    /// Its user namespace, whose root administrates the pool. None: that of the container, which is
    /// known already.
    pub namespace: Option<OwnedFd>,
    /// How many devices it may use, if fewer than the pool has.
    pub max: Option<u32>,
    /// Allowed kernel mounts, if fewer than the pool allows.
    pub mounts: Option<Vec<String>>,
}

/// The container that uses a pool.
#[derive(Debug, Default)]
pub(super) struct ContainerSessions {
    id: String,
    listeners: Vec<OwnedFd>,
    namespace: Option<OwnedFd>,
    /// The container has ended, and its devices are being unbound.
    clearing: bool,
}

enum Admission {
    /// The session is recorded, with this descriptor of its listener.
    Admitted(RawFd),
    Retry,
}

impl ContainerSessions {
    /// Whether a container uses the pool, or its devices are being unbound.
    pub(super) fn is_active(&self) -> bool {
        self.clearing || !self.listeners.is_empty()
    }

    /// The id of that container.
    pub(super) fn container(&self) -> Option<&str> {
        self.is_active().then_some(self.id.as_str())
    }

    /// Whether a process of the container is alive.
    fn is_used(&self) -> bool {
        !self.clearing && !self.listeners.iter().all(has_ended)
    }

    fn busy_error(&self, pool: &str) -> Error {
        Error::new(Kind::Busy, format!("private pool {pool} is used by container {}", self.id))
            .hint("give each container a pool of its own")
    }

    fn admit(&mut self, pool: &str, session: &mut ContainerSession) -> Result<Admission> {
        if self.clearing {
            return Ok(Admission::Retry);
        }
        if !self.listeners.is_empty() {
            // The reaper will end this container; one of the same id may be another.
            if !self.is_used() {
                return Ok(Admission::Retry);
            }
            if self.id != session.id {
                return Err(self.busy_error(pool));
            }
            self.listeners.retain(|listener| !has_ended(listener));
            if self.listeners.len() >= FILTERS_MAX {
                let message =
                    format!("container {} has {FILTERS_MAX} processes with a filter already", self.id);
                return Err(Error::new(Kind::Quota, message));
            }
        }
        let cannot = |error| Error::os(error, "cannot watch a container");
        match (&session.namespace, &self.namespace) {
            (Some(its), _) => self.namespace = Some(its.try_clone().map_err(cannot)?),
            (None, Some(known)) if !self.listeners.is_empty() => {
                session.namespace = Some(known.try_clone().map_err(cannot)?);
            }
            _ => return Err(Error::new(Kind::NotFound, format!("cannot find container {}", session.id))),
        }
        let watched = session.listener.try_clone().map_err(cannot)?;
        let number = watched.as_raw_fd();
        self.listeners.push(watched);
        self.id.clone_from(&session.id);
        Ok(Admission::Admitted(number))
    }

    /// Removes ended sessions. True: the last one ended, and the devices must be unbound.
    fn remove_ended(&mut self) -> bool {
        self.listeners.retain(|listener| !has_ended(listener));
        let last = self.listeners.is_empty() && !self.clearing;
        self.clearing |= last;
        last
    }
}

/// The pool, if it is one for containers: only root has these.
fn for_containers<'a>(state: &'a mut RegistryState, name: &str, caller: Caller) -> Result<&'a mut Tenant> {
    let (_, tenant, _) = open_to(state, name, caller)?;
    if !tenant.spec.fixed {
        return Err(Error::new(Kind::Invalid, format!("private pool {name} is not for containers")));
    }
    Ok(tenant)
}

/// Whether no process is left under its filter.
fn has_ended(listener: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(listener, PollFlags::empty())];
    let looked = poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }));
    looked.is_ok() && is_over(fds[0].revents())
}

impl Registry {
    /// Keeps the names of the pool's partitions in the /dev of a container that is being created.
    /// May block on `dev`.
    pub fn set_container_dev(&self, name: &str, id: &str, dev: OwnedFd, caller: Caller) -> Result<()> {
        // First, who asks: the next step may block on a file system of the caller's choice.
        for_containers(&mut self.shared.state(), name, caller)?;
        let container = Tree::adopt(dev).map_err(|error| {
            Error::os(error, format!("cannot create names in the /dev of container {id}"))
        })?;
        let until = Instant::now() + ADMISSION_TIMEOUT;
        loop {
            let mut state = self.shared.state();
            let tenant = for_containers(&mut state, name, caller)?;
            let sessions = &tenant.sessions;
            if !sessions.is_active() {
                let mirror = tenant.mirror.clone();
                drop(state);
                if let Some(mirror) = mirror {
                    mirror.set_container_dev(Some(container));
                }
                return Ok(());
            }
            if sessions.is_used() {
                return Err(sessions.busy_error(name));
            }
            drop(state);
            if Instant::now() >= until {
                return Err(Error::new(Kind::Busy, format!("private pool {name} is still being reset")));
            }
            std::thread::sleep(ADMISSION_INTERVAL);
        }
    }

    /// Logs why a hook could not prepare a container: the runtime may discard the hook's message.
    pub fn report_container(&self, name: &str, id: &str, problem: &str, caller: Caller) -> Result<()> {
        for_containers(&mut self.shared.state(), name, caller)?;
        // Untrusted text: quoted, and of limited length.
        let problem: String = problem.chars().take(PROBLEM_MAX).collect();
        tracing::warn!("container {id:?} was not prepared for private pool {name}: {problem:?}");
        Ok(())
    }

    /// Serves a process of a container. The pool is one for containers, or any other, which then
    /// ends with the container.
    pub fn admit(&self, name: &str, mut session: ContainerSession, caller: Caller) -> Result<()> {
        check_listener(&session.listener)?;
        let until = Instant::now() + ADMISSION_TIMEOUT;
        let (id, number, pool) = loop {
            let mut state = self.shared.state();
            let (id, tenant, pool) = open_to(&mut state, name, caller)?;
            if !tenant.spec.fixed {
                drop(state);
                let missing = || Error::new(Kind::NotFound, format!("cannot find container {}", session.id));
                let namespace = session.namespace.ok_or_else(missing)?;
                return self.supervise(name, session.listener, namespace, None, caller);
            }
            match tenant.sessions.admit(name, &mut session)? {
                Admission::Admitted(number) => break (id, number, pool),
                Admission::Retry if Instant::now() >= until => {
                    return Err(Error::new(Kind::Busy, format!("private pool {name} is still being reset")));
                }
                Admission::Retry => drop(state),
            }
            std::thread::sleep(ADMISSION_INTERVAL);
        };
        let watched = session.listener.try_clone();
        let served = watched
            .map_err(|error| Error::os(error, "cannot watch a container"))
            .and_then(|watched| pool.admit(session).map(|()| watched))
            .inspect_err(|_| {
                // Callers of a listener that is open and not served wait for ever.
                if let Some(tenant) = self.shared.state().tenants.get_mut(&id) {
                    tenant.sessions.listeners.retain(|listener| listener.as_raw_fd() != number);
                }
            })?;
        self.reaper.watch(id, served).map_err(|error| Error::os(error, "cannot watch a container"))
    }
}

impl RegistryShared {
    /// The processes under one filter have ended. Ends the pool, or resets it for the next
    /// container.
    pub(super) fn session_ended(&self, id: u64) {
        let (name, session, pool, mirror) = {
            let mut state = self.state();
            let Some(tenant) = state.tenants.get_mut(&id) else { return };
            if !tenant.spec.fixed {
                drop(state);
                return self.end(id, true);
            }
            if !tenant.sessions.remove_ended() {
                return;
            }
            (tenant.spec.name.clone(), tenant.sessions.id.clone(), tenant.pool.clone(), tenant.mirror.clone())
        };
        if let Some(pool) = pool {
            pool.reset();
        }
        if let Some(mirror) = mirror {
            mirror.set_container_dev(None);
        }
        tracing::info!("container {session:?} has left private pool {name}");
        if let Some(tenant) = self.state().tenants.get_mut(&id) {
            tenant.sessions = ContainerSessions::default();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A pipe stands for a listener: its other end can be closed.
    fn session(id: &str) -> (ContainerSession, std::io::PipeWriter) {
        let (reader, writer) = std::io::pipe().unwrap();
        let namespace = Some(std::fs::File::open("/proc/self/ns/user").unwrap().into());
        (
            ContainerSession {
                id: id.to_owned(),
                listener: reader.into(),
                namespace,
                max: None,
                mounts: None,
            },
            writer,
        )
    }

    fn admits(sessions: &mut ContainerSessions, session: &mut ContainerSession) -> Option<bool> {
        sessions.admit("ci", session).ok().map(|turn| matches!(turn, Admission::Admitted(_)))
    }

    #[test]
    fn admits_one_container_at_a_time() {
        let mut sessions = ContainerSessions::default();
        let ((mut one, first), (mut exec, second)) = (session("a"), session("a"));
        let (mut other, _third) = session("b");
        exec.namespace = None;
        assert_eq!(admits(&mut sessions, &mut exec), None, "no container is known");
        assert_eq!(sessions.container(), None);
        assert_eq!(admits(&mut sessions, &mut one), Some(true));
        assert_eq!(admits(&mut sessions, &mut exec), Some(true), "another process of the same");
        assert!(exec.namespace.is_some(), "as its container");
        assert_eq!(sessions.container(), Some("a"));
        assert_eq!(sessions.admit("ci", &mut other).err().map(|error| error.kind()), Some(Kind::Busy));
        drop(first);
        assert!(!sessions.remove_ended(), "one process is left");
        assert_eq!(admits(&mut sessions, &mut other), None);
        drop(second);
        // The container has ended, and is not reset yet; one of the same id waits too.
        assert_eq!(admits(&mut sessions, &mut exec), Some(false));
        assert!(sessions.remove_ended() && sessions.is_active());
        assert!(!sessions.remove_ended(), "once");
        assert_eq!(admits(&mut sessions, &mut other), Some(false));
        sessions = ContainerSessions::default();
        assert_eq!(admits(&mut sessions, &mut other), Some(true));
    }

    #[test]
    fn limits_processes_of_a_container() {
        let mut sessions = ContainerSessions::default();
        let mut held: Vec<_> = (0..FILTERS_MAX).map(|_| session("a")).collect();
        assert!(held.iter_mut().all(|(session, _)| admits(&mut sessions, session) == Some(true)));
        let (mut more, _writer) = session("a");
        assert_eq!(sessions.admit("ci", &mut more).err().map(|error| error.kind()), Some(Kind::Quota));
    }
}
