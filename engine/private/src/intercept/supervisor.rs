// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Serves one listener: receive, decide, reply, until the last caller is gone.
//!
//! Knows how many calls are served concurrently, and how long one may take. Does not know what a
//! call does (`calls`), nor which thread serves it (`event_threads`).
//!
//! The threads receive one call at a time, and more only while fewer than
//! [`SupervisorOptions::concurrency`] are in progress. The others wait in the kernel, where a signal
//! reaches them. The end, a deadline and [`Supervisor::stop`] are noticed however many calls hang.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::epoll::EventFlags;
use rustix::io::Errno;

use super::caller::{self, Administrators, CallerThread};
use super::calls::{CallAction, IoctlCall, IoctlDispatcher, IsControl, PoolOps};
use super::devtmpfs;
use super::filter::{self, Call};
use super::mknod::MknodCall;
use super::mounts::{self, MountHandler};
use super::source_names;
use crate::counters::INTERCEPTED_CALLS;
use crate::error::{Error, Kind, Result};
use crate::event_threads::{EventSource, EventThreads, Next, Ready, SourceHandle, Turn};
use crate::sys::seccomp::{Listener, Notification};

/// Concurrent calls of one listener.
pub const CALLS_AT_ONCE: usize = crate::limits::CALLS_AT_ONCE;

/// Timeout of a call. Long, since the flush of a large image may take long; the caller can be
/// killed meanwhile.
pub const DEADLINE: Duration = Duration::from_secs(60);

/// Options of a supervisor.
pub struct SupervisorOptions {
    /// The pool, for logs.
    pub name: String,
    /// Recognises the pool's loop-control.
    pub is_control: IsControl,
    /// The administrators of the pool.
    pub administrators: Administrators,
    /// Callers may bind only devices below this number; none: all.
    pub device_limit: Option<u32>,
    /// Serves mounts of the callers; none: the kernel does, as without a filter.
    pub mounts: Option<Arc<dyn MountHandler>>,
    /// Refuses to make block nodes of foreign devices; false: the kernel decides.
    pub refuse_foreign_nodes: bool,
    /// See [`CALLS_AT_ONCE`].
    pub concurrency: usize,
    /// See [`DEADLINE`].
    pub deadline: Duration,
    /// Called once, when the last process under the filter is gone; not after [`Supervisor::stop`].
    /// Calls of killed callers may still be in progress.
    pub on_end: Box<dyn FnOnce() + Send>,
}

/// Statistics of the calls.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Calls received.
    pub calls: u64,
    /// Of these, left to the kernel.
    pub passed: u64,
    /// Of these, failed with an errno.
    pub failed: u64,
    /// Of these, failed at their deadline.
    pub overdue: u64,
    /// Of these, failed by a panic.
    pub panicked: u64,
}

/// A call in progress.
struct ServedCall {
    id: u64,
    until: Instant,
    overdue: bool,
}

#[derive(Default)]
struct SupervisorState {
    calls: Vec<ServedCall>,
    ended: bool,
    counts: Counts,
    on_end: Option<Box<dyn FnOnce() + Send>>,
}

struct SupervisorShared {
    listener: Listener,
    dispatcher: IoctlDispatcher,
    mounts: Option<Arc<dyn MountHandler>>,
    refuse_foreign_nodes: bool,
    name: String,
    concurrency: usize,
    deadline: Duration,
    proc_cache: caller::ProcCache,
    state: Mutex<SupervisorState>,
}

/// Serves one listener. When dropped, it receives no more calls, and does not wait.
pub struct Supervisor {
    shared: Arc<SupervisorShared>,
    source: SourceHandle,
}

impl Supervisor {
    /// Takes over a listener, which is not trusted.
    pub fn start(
        listener: OwnedFd,
        loops: impl PoolOps + 'static,
        options: SupervisorOptions,
    ) -> Result<Supervisor> {
        let what = || format!("cannot intercept the calls of {}", options.name);
        caller::check_kernel().map_err(|error| {
            let error = Error::os(error, what()).with_kind(Kind::Unsupported);
            error.hint("Linux 6.9 or later is needed")
        })?;
        let listener = Listener::new(listener).map_err(|error| Error::os(error, what()))?;
        let SupervisorOptions {
            name,
            is_control,
            administrators,
            device_limit,
            mounts,
            refuse_foreign_nodes,
            concurrency,
            deadline,
            on_end,
        } = options;
        let device_limit = device_limit.unwrap_or(u32::MAX);
        let shared = Arc::new(SupervisorShared {
            listener,
            dispatcher: IoctlDispatcher { loops: Box::new(loops), is_control, administrators, device_limit },
            mounts,
            refuse_foreign_nodes,
            name,
            concurrency: concurrency.max(1),
            deadline,
            proc_cache: caller::ProcCache::default(),
            state: Mutex::new(SupervisorState { on_end: Some(on_end), ..SupervisorState::default() }),
        });
        let source = EventThreads::shared()?.add(Arc::clone(&shared) as _)?;
        Ok(Supervisor { shared, source })
    }

    /// The statistics so far.
    pub fn counts(&self) -> Counts {
        lock(&self.shared.state).counts
    }

    /// Whether no caller is left, or it was stopped.
    pub fn is_over(&self) -> bool {
        lock(&self.shared.state).ended
    }

    /// Receives no more calls, and waits for those in progress. True: they ended in time; then the
    /// listener is closed, and callers get ENOSYS.
    pub fn stop(self, within: Duration) -> bool {
        self.end();
        self.source.wait_until_removed(within)
    }

    fn end(&self) {
        lock(&self.shared.state).ended = true;
        self.source.remove();
    }
}

impl Drop for Supervisor {
    fn drop(&mut self) {
        self.end();
    }
}

/// A panic under these locks leaves the state consistent.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl EventSource for SupervisorShared {
    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        Some(self.listener.as_fd())
    }

    fn concurrency(&self) -> usize {
        self.concurrency
    }

    /// See `sys::seccomp::is_over`: ERR says nothing.
    fn interpret(&self, events: EventFlags) -> Ready {
        match events {
            events if events.contains(EventFlags::IN) => Ready::Request,
            events if events.contains(EventFlags::HUP) => Ready::Over,
            _ => Ready::Nothing,
        }
    }

    fn due_may_block(&self) -> bool {
        false
    }

    fn serve(&self, turn: &Turn<'_>) -> Next {
        let note = match self.listener.receive() {
            Ok(note) => note,
            // The caller was killed, or this thread got a signal.
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EINTR)) => {
                return Next::Continue(None);
            }
            Err(error) => {
                self.end(Some(error));
                return Next::End;
            }
        };
        let until = Instant::now() + self.deadline;
        let mut state = lock(&self.state);
        state.calls.push(ServedCall { id: note.id, until, overdue: false });
        state.counts.calls += 1;
        INTERCEPTED_CALLS.count();
        drop(state);
        turn.received(Some(until));
        self.serve_call(&note);
        lock(&self.state).calls.retain(|call| call.id != note.id);
        Next::Continue(None)
    }

    fn over(&self) {
        self.end(None);
    }

    fn due(&self) -> Next {
        Next::Continue(self.fail_overdue())
    }
}

impl SupervisorShared {
    /// Fails overdue calls. Returns the next deadline.
    fn fail_overdue(&self) -> Option<Instant> {
        let mut state = lock(&self.state);
        let now = Instant::now();
        let SupervisorState { calls, counts, .. } = &mut *state;
        for call in calls.iter_mut().filter(|call| !call.overdue && call.until <= now) {
            call.overdue = true;
            // From now on the operation sees that its caller does not wait.
            if self.listener.answer(call.id, Err(Errno::IO)).is_ok() {
                counts.overdue += 1;
                counts.failed += 1;
                tracing::warn!(pool = self.name, "a call failed: it exceeded its deadline");
            }
        }
        state.calls.iter().filter(|call| !call.overdue).map(|call| call.until).min()
    }

    /// No caller is left, or the listener failed.
    fn end(&self, why: Option<std::io::Error>) {
        if let Some(error) = why {
            tracing::error!(pool = self.name, %error, "cannot receive calls: interception ends");
        }
        let mut state = lock(&self.state);
        state.ended = true;
        let on_end = state.on_end.take();
        drop(state);
        if let Some(on_end) = on_end
            && catch_unwind(AssertUnwindSafe(on_end)).is_err()
        {
            tracing::error!(pool = self.name, "bug: panic at the end of the last caller");
        }
    }

    fn serve_call(&self, note: &Notification) {
        let action = catch_unwind(AssertUnwindSafe(|| self.decide(note)));
        let action = action.unwrap_or_else(|_| {
            lock(&self.state).counts.panicked += 1;
            tracing::error!(pool = self.name, "bug: panic in a call");
            CallAction::Answer(Err(Errno::IO))
        });
        // The caller may be killed, failed at its deadline, or answered by the owner of the filter.
        let (told, passed, failed) = match action {
            CallAction::Pass => (self.listener.let_through(note.id), 1, 0),
            CallAction::Answer(answer) => (self.listener.answer(note.id, answer), 0, answer.is_err().into()),
        };
        if told.is_ok() {
            let counts = &mut lock(&self.state).counts;
            counts.passed += passed;
            counts.failed += failed;
        }
    }

    /// An unknown call passes: nothing of it has been read.
    fn decide(&self, note: &Notification) -> CallAction {
        let Some(thread) = CallerThread::new(&self.listener, note.id, note.pid, &self.proc_cache) else {
            return CallAction::Pass;
        };
        match filter::decode(note.data.arch, note.data.nr) {
            Some((abi, Call::Ioctl)) => self.dispatcher.ioctl(&thread, &IoctlCall::new(abi, &note.data.args)),
            Some((_, Call::Mknod | Call::Mknodat)) if !self.refuse_foreign_nodes => CallAction::Pass,
            Some((abi, Call::Mknod)) => self.dispatcher.mknod(&thread, &MknodCall::new(abi, &note.data.args)),
            Some((abi, Call::Mknodat)) => {
                self.dispatcher.mknod(&thread, &MknodCall::at(abi, &note.data.args))
            }
            Some((abi, call @ (Call::Mount | Call::Umount))) => {
                let args = &note.data.args;
                let serve = if call == Call::Mount { mounts::mount } else { mounts::umount };
                let served = self.mounts.as_ref().map_or(CallAction::Pass, |mounts| {
                    serve(&**mounts, &thread, abi, args, self.dispatcher.administrators)
                });
                if (call, &served) == (Call::Mount, &CallAction::Pass) {
                    source_names::mount(&thread, abi, args);
                }
                served
            }
            Some((abi, Call::Fsopen)) => match &self.mounts {
                Some(_) => devtmpfs::fsopen(&thread, abi, &note.data.args, self.dispatcher.administrators),
                None => CallAction::Pass,
            },
            Some((abi, Call::Fsconfig)) => {
                source_names::fsconfig(&thread, abi, &note.data.args);
                CallAction::Pass
            }
            None => CallAction::Pass,
        }
    }
}
