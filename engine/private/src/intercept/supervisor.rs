// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The threads that serve one listener: receive, decide, reply, until the last caller is gone.
//!
//! Knows how many calls are served concurrently, and how long one may take. Does not know what a
//! call does (`calls`).
//!
//! The threads follow a leader/follower scheme. Only the leader receives, and serves what it
//! received. One follower monitors it meanwhile, and becomes the leader once a call takes longer
//! than [`LEADER_TIMEOUT`]. So a short call needs no switch of threads. And there is always a
//! thread that notices the end, a deadline and [`Supervisor::stop`], however many calls hang. There
//! is one thread more than concurrent calls; an idle listener has one or two. Calls beyond the
//! limit wait in the kernel, where a signal reaches them.

use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;

use super::caller::{self, Administrators, CallerThread};
use super::calls::{CallAction, IoctlCall, IoctlDispatcher, IsControl, PoolOps};
use super::filter::{self, Call};
use super::mknod::MknodCall;
use super::mounts::{self, MountHandler};
use super::source_names;
use crate::error::{Error, Kind, Result};
use crate::sys::seccomp::{Listener, Notification, is_over};

/// Concurrent calls of one listener.
pub const CALLS_AT_ONCE: usize = crate::limits::CALLS_AT_ONCE;

/// Timeout of a call. Long, since the flush of a large image may take long; the caller can be
/// killed meanwhile.
pub const DEADLINE: Duration = Duration::from_secs(60);

/// A leader that serves one call for this long, or up to twice as long, is replaced.
const LEADER_TIMEOUT: Duration = Duration::from_millis(2);

/// Options of a supervisor.
pub struct SupervisorOptions {
    /// The pool, for logs and thread names.
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

/// The state of the leader.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Leader {
    /// There is no leader.
    #[default]
    None,
    /// It waits for a call.
    Receiving,
    /// It serves the call with this id.
    Serving(u64),
}

#[derive(Default)]
struct SupervisorState {
    calls: Vec<ServedCall>,
    threads: usize,
    leader: Leader,
    /// Followers.
    followers: usize,
    /// A follower monitors the leader.
    monitored: bool,
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
    /// Readable when the leader must check the state.
    wake: OwnedFd,
    proc_cache: caller::ProcCache,
    state: Mutex<SupervisorState>,
    /// There is no leader, a leader needs a monitor, or the listener has ended.
    changed: Condvar,
    threads_ended: Condvar,
}

/// Serves one listener. When dropped, it receives no more calls, and does not wait.
pub struct Supervisor(Arc<SupervisorShared>);

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
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let wake = wake.map_err(|error| Error::os(error, what()))?;
        let context = what();
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
            wake,
            proc_cache: caller::ProcCache::default(),
            state: Mutex::new(SupervisorState { on_end: Some(on_end), ..SupervisorState::default() }),
            changed: Condvar::new(),
            threads_ended: Condvar::new(),
        });
        // From here on, a drop stops the thread.
        let supervisor = Supervisor(shared);
        add_thread(&supervisor.0).map_err(|error| Error::os(error, context))?;
        Ok(supervisor)
    }

    /// The statistics so far.
    pub fn counts(&self) -> Counts {
        lock(&self.0.state).counts
    }

    /// Whether no caller is left, or it was stopped.
    pub fn is_over(&self) -> bool {
        lock(&self.0.state).ended
    }

    /// Receives no more calls, and waits for those in progress. True: they ended in time; then the
    /// listener is closed, and callers get ENOSYS.
    pub fn stop(self, within: Duration) -> bool {
        self.0.stop();
        let state = lock(&self.0.state);
        let waited = self.0.threads_ended.wait_timeout_while(state, within, |state| state.threads > 0);
        let (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        state.threads == 0
    }
}

impl Drop for Supervisor {
    fn drop(&mut self) {
        self.0.stop();
    }
}

/// A panic under these locks leaves the state consistent.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn add_thread(shared: &Arc<SupervisorShared>) -> std::io::Result<()> {
    lock(&shared.state).threads += 1;
    let its = Arc::clone(shared);
    let name = format!("calls-{}", shared.name);
    let started = std::thread::Builder::new().name(name.replace('\0', "")).spawn(move || run(&its));
    if started.is_err() {
        shared.thread_ended();
    }
    started.map(drop)
}

fn run(shared: &Arc<SupervisorShared>) {
    let mut is_leader = false;
    while is_leader || shared.wait_for_leadership() {
        let Some(note) = shared.receive_next() else { break };
        // Without another thread this one leads again after the call: slower, but correct.
        if !shared.has_monitor()
            && let Err(error) = add_thread(shared)
        {
            tracing::warn!(pool = shared.name, %error, "cannot start a thread: calls are served one at a time");
        }
        shared.serve(&note);
        is_leader = shared.finish_call(&note);
        if !is_leader && lock(&shared.state).followers > 0 {
            break;
        }
    }
    shared.thread_ended();
}

impl SupervisorShared {
    fn stop(&self) {
        lock(&self.state).ended = true;
        self.changed.notify_all();
        self.wake();
    }

    fn wake(&self) {
        // A full counter wakes the leader too.
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
    }

    fn thread_ended(&self) {
        lock(&self.state).threads -= 1;
        self.threads_ended.notify_all();
    }

    /// Waits until there is no leader, or the leader serves one call for too long. False: the
    /// listener has ended.
    fn wait_for_leadership(&self) -> bool {
        let mut state = lock(&self.state);
        state.followers += 1;
        let mut seen = Leader::None;
        while !state.ended && state.leader != Leader::None {
            if let Leader::Serving(_) = state.leader {
                if state.leader == seen {
                    break;
                }
                seen = state.leader;
                state.monitored = true;
                let waited = self.changed.wait_timeout(state, LEADER_TIMEOUT);
                state = waited.unwrap_or_else(PoisonError::into_inner).0;
                state.monitored = false;
            } else {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
        }
        state.followers -= 1;
        state.leader = Leader::Receiving;
        !state.ended
    }

    /// Whether a follower can monitor this thread while it serves. If not, there should be one
    /// more.
    fn has_monitor(&self) -> bool {
        let state = lock(&self.state);
        if !state.monitored && state.followers > 0 {
            self.changed.notify_one();
        }
        state.followers > 0 || state.threads > self.concurrency
    }

    /// As the leader, waits for the next call. None: the listener has ended.
    fn receive_next(&self) -> Option<Notification> {
        loop {
            let (full, timeout) = self.fail_overdue()?;
            let events = if full { PollFlags::empty() } else { PollFlags::IN };
            let mut fds = [PollFd::new(&self.listener, events), PollFd::new(&self.wake, PollFlags::IN)];
            match poll(&mut fds, timeout.as_ref()) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => {
                    self.end(Some(error.into()));
                    return None;
                }
            }
            let [listener, wake] = fds.map(|fd| fd.revents());
            if !wake.is_empty() {
                let _ = rustix::io::read(&self.wake, &mut [0; 8]);
            }
            if listener.contains(PollFlags::IN) {
                match self.listener.receive() {
                    Ok(note) => {
                        let until = Instant::now() + self.deadline;
                        let mut state = lock(&self.state);
                        state.calls.push(ServedCall { id: note.id, until, overdue: false });
                        state.leader = Leader::Serving(note.id);
                        state.counts.calls += 1;
                        return Some(note);
                    }
                    // The caller was killed, or this thread got a signal.
                    Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EINTR)) => {}
                    Err(error) => {
                        self.end(Some(error));
                        return None;
                    }
                }
            } else if is_over(listener) {
                self.end(None);
                return None;
            }
        }
    }

    /// Records the end of a call. True: this thread is still the leader.
    fn finish_call(&self, note: &Notification) -> bool {
        let mut state = lock(&self.state);
        let was_full = state.calls.len() >= self.concurrency;
        state.calls.retain(|call| call.id != note.id);
        let is_leader = state.leader == Leader::Serving(note.id);
        if is_leader {
            state.leader = Leader::Receiving;
        }
        drop(state);
        if was_full && !is_leader {
            self.wake();
        }
        is_leader
    }

    /// Fails overdue calls. Returns whether the limit of calls is reached, and the time to the next
    /// deadline. None: the listener has ended.
    fn fail_overdue(&self) -> Option<(bool, Option<Timespec>)> {
        let mut state = lock(&self.state);
        if state.ended {
            return None;
        }
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
        let next = state.calls.iter().filter(|call| !call.overdue).map(|call| call.until).min();
        let timeout = next.map(|next| {
            let left = next.saturating_duration_since(now);
            Timespec { tv_sec: left.as_secs().cast_signed(), tv_nsec: left.subsec_nanos().into() }
        });
        Some((state.calls.len() >= self.concurrency, timeout))
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
        self.changed.notify_all();
        if let Some(on_end) = on_end
            && catch_unwind(AssertUnwindSafe(on_end)).is_err()
        {
            tracing::error!(pool = self.name, "bug: panic at the end of the last caller");
        }
    }

    fn serve(&self, note: &Notification) {
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
            Some((abi, Call::Fsconfig)) => {
                source_names::fsconfig(&thread, abi, &note.data.args);
                CallAction::Pass
            }
            None => CallAction::Pass,
        }
    }
}
