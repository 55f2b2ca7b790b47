// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The threads that all pools of the daemon share: they serve the events of many sources.
//!
//! Knows descriptors, times and threads. Does not know what an event means ([`EventSource`]).
//!
//! The threads follow a leader/follower scheme. Only the leader waits for events, one at a time, and
//! serves what it received. One follower monitors it meanwhile, and becomes the leader once a turn
//! takes longer than `LEADER_TIMEOUT`. So a short turn needs no switch of threads, and a turn that
//! hangs costs one thread and delays the others by a few milliseconds. Threads: one for each turn in
//! progress, the leader and its follower.
//!
//! # Fairness
//! - The kernel reports ready descriptors in turn, and each report leads to one request. Requests and
//!   times alternate.
//! - A source serves only [`EventSource::concurrency`] requests at a time. Further ones wait in the
//!   kernel.
//! - While [`EVENT_THREADS`] turns are in progress, each source serves one request at a time. So
//!   there is no moment at which the hanging requests of some sources stop another source.
//! - Times and ends count against no limit: a source has one turn for its time and one for its end.

mod state;
#[cfg(test)]
mod tests;
mod thread;

use std::cell::Cell;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;

use crate::error::{Error, Result};
use crate::limits::EVENT_THREADS;
use state::State;

/// The event that wakes the leader. Sources begin at 1.
const WAKE: u64 = 0;

/// What an event of a descriptor means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ready {
    /// Nothing.
    Nothing,
    /// A request waits.
    Request,
    /// No request will come.
    Over,
}

/// What follows a turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// The source stays, with its next time, if it has one.
    Continue(Option<Instant>),
    /// The source is removed.
    End,
}

/// Something with events: requests at a descriptor, times, or both. All functions except the first
/// four may block.
pub(crate) trait EventSource: Send + Sync {
    /// Readable while a request waits.
    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// The number of requests that it serves at a time.
    fn concurrency(&self) -> usize {
        1
    }

    /// What these events of its descriptor mean.
    fn interpret(&self, _events: EventFlags) -> Ready {
        Ready::Nothing
    }

    /// Whether [`EventSource::due`] may block. If not, it is called even if no thread can be started.
    fn due_may_block(&self) -> bool {
        true
    }

    /// Receives a request, if one still waits, calls [`Turn::received`] and serves it. The source
    /// gets no other request before that call.
    fn serve(&self, _turn: &Turn<'_>) -> Next {
        Next::Continue(None)
    }

    /// Its descriptor reports [`Ready::Over`], perhaps while requests are served. The source is being
    /// removed.
    fn over(&self) {}

    /// Its time has come. Called again only after its return.
    fn due(&self) -> Next {
        Next::Continue(None)
    }

    /// It is removed, and no turn of it is in progress. This is the last reference of the threads.
    fn removed(self: Arc<Self>) {}
}

/// The threads. Cheap to clone; they do not end.
#[derive(Clone)]
pub(crate) struct EventThreads(Arc<Shared>);

/// A source that was added.
#[derive(Clone)]
pub(crate) struct SourceHandle {
    threads: Arc<Shared>,
    key: u64,
}

/// A request in progress.
pub(crate) struct Turn<'a> {
    threads: &'a Shared,
    key: u64,
    received: Cell<bool>,
}

struct Shared {
    epoll: OwnedFd,
    /// Readable when the leader must check the state.
    wake: OwnedFd,
    threads_max: usize,
    state: Mutex<State>,
    /// There is no leader, or the leader needs a monitor.
    changed: Condvar,
    /// A source was removed, and no turn of it is in progress.
    removed: Condvar,
    /// No thread can be started.
    #[cfg(test)]
    refuses_threads: std::sync::atomic::AtomicBool,
}

impl Shared {
    /// No code of a source except the functions that do not block runs under this lock.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self) {
        // A full counter wakes the leader too.
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
    }

    fn schedule(&self, state: &mut State, key: u64, at: Instant) {
        if state.schedule(key, at) && state.wait.ends_after(at) {
            self.wake();
        }
    }

    fn remove(&self, state: &mut State, key: u64) {
        let Some(source) = state.remove(key) else { return };
        if let Some(descriptor) = source.descriptor() {
            // Others may have duplicates, so that a close is not enough.
            let _ = epoll::delete(&self.epoll, descriptor);
        }
        if state.has_ended() {
            self.wake();
        }
    }

    /// Waits for the next request of a source that was full, unless it still is.
    fn arm_again(&self, state: &mut State, key: u64) {
        if let Some(source) = state.rearm(key, self.threads_max) {
            self.set_interest(key, &*source, EventFlags::IN);
        }
    }

    fn set_interest(&self, key: u64, source: &dyn EventSource, interest: EventFlags) {
        let Some(descriptor) = source.descriptor() else { return };
        if let Err(error) = epoll::modify(&self.epoll, descriptor, EventData::new_u64(key), interest) {
            tracing::error!(%error, "bug: cannot change which events of a pool are awaited");
        }
    }
}

impl EventThreads {
    /// Those of this process. The first call starts them.
    pub(crate) fn shared() -> Result<EventThreads> {
        static SHARED: Mutex<Option<EventThreads>> = Mutex::new(None);
        let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
        match &*shared {
            Some(threads) => Ok(threads.clone()),
            None => Ok(shared.insert(EventThreads::start(EVENT_THREADS)?).clone()),
        }
    }

    /// Starts the leader and a follower. `threads_max`: see [`EVENT_THREADS`].
    fn start(threads_max: usize) -> Result<EventThreads> {
        let cannot = |error: Errno| Error::os(error, "cannot wait for events of pools");
        let shared = Arc::new(Shared {
            epoll: epoll::create(epoll::CreateFlags::CLOEXEC).map_err(cannot)?,
            wake: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(cannot)?,
            threads_max,
            state: Mutex::default(),
            changed: Condvar::new(),
            removed: Condvar::new(),
            #[cfg(test)]
            refuses_threads: false.into(),
        });
        epoll::add(&shared.epoll, &shared.wake, EventData::new_u64(WAKE), EventFlags::IN).map_err(cannot)?;
        for _ in 0..2 {
            shared.lock().followers += 1;
            thread::spawn(&shared).map_err(|error| Error::os(error, "cannot start a thread"))?;
        }
        Ok(EventThreads(shared))
    }

    /// Serves a source from now on.
    pub(crate) fn add(&self, source: Arc<dyn EventSource>) -> Result<SourceHandle> {
        let mut state = self.0.lock();
        let key = state.insert(Arc::clone(&source));
        if let Some(descriptor) = source.descriptor() {
            let added = epoll::add(&self.0.epoll, descriptor, EventData::new_u64(key), EventFlags::IN);
            if let Err(error) = added {
                state.forget(key);
                return Err(Error::os(error, "cannot wait for events of a pool"));
            }
        }
        Ok(SourceHandle { threads: Arc::clone(&self.0), key })
    }
}

impl SourceHandle {
    /// Calls [`EventSource::due`] at this time, or at an earlier one that is already set.
    pub(crate) fn schedule(&self, at: Instant) {
        let mut state = self.threads.lock();
        self.threads.schedule(&mut state, self.key, at);
    }

    /// Serves no further event of the source. Does not wait for its turns in progress.
    pub(crate) fn remove(&self) {
        let mut state = self.threads.lock();
        self.threads.remove(&mut state, self.key);
    }

    /// Waits until the source is removed and no turn of it is in progress. False: not in time.
    pub(crate) fn wait_until_removed(&self, within: Duration) -> bool {
        let state = self.threads.lock();
        let is_there = |state: &mut State| state.contains(self.key);
        let waited = self.threads.removed.wait_timeout_while(state, within, is_there);
        !waited.unwrap_or_else(PoisonError::into_inner).0.contains(self.key)
    }
}

impl std::fmt::Debug for SourceHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "source {}", self.key)
    }
}

impl Turn<'_> {
    /// The request was received: the source may get the next one, and may need a turn at a time.
    pub(crate) fn received(&self, due: Option<Instant>) {
        if self.received.replace(true) {
            return;
        }
        let mut state = self.threads.lock();
        state.received(self.key);
        self.threads.arm_again(&mut state, self.key);
        if let Some(due) = due {
            self.threads.schedule(&mut state, self.key, due);
        }
    }
}
