//! The threads that serve one listener: receive, decide, answer, until the last caller is gone.
//!
//! Knows how many calls are served at a time, how long one may take, and when it is over. Does not
//! know what a call means (`calls`).
//!
//! One thread leads: it alone receives, and serves what it received. A second watches it while there is
//! anything to serve, and leads in its place once a call takes longer than [`LEAD`]: so short calls cost
//! no change of threads, and there is always one that sees the end, a deadline and
//! [`Supervisor::stop`], however many calls hang. There is one thread more than calls are served at a
//! time; with nothing to do there are one or two. Calls beyond the limit wait in the kernel, where a
//! signal reaches them.

use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;

use super::caller::{self, Administrators, Thread};
use super::calls::{Desk, Ioctl, IsControl, Loops, Verdict};
use super::filter::{self, Call};
use super::mknod::Mknod;
use super::mounts::{self, Mounts};
use crate::error::{Error, Kind, Result};
use crate::sys::seccomp::{Listener, Notification, is_over};

/// Calls of one listener that are served at a time.
pub const AT_ONCE: usize = crate::limits::CALLS_AT_ONCE;

/// How long a call may take. Long, since flushing a large image may take long; its caller can be
/// killed all the while.
pub const DEADLINE: Duration = Duration::from_secs(60);

/// A call that takes up to twice as long may keep the others waiting.
const LEAD: Duration = Duration::from_millis(2);

/// How a listener is served.
pub struct Options {
    /// Whose it is, for logs and names of threads.
    pub name: String,
    /// Knows the pool's loop-control.
    pub is_control: IsControl,
    /// Who administrates the pool.
    pub administrators: Administrators,
    /// Devices that the callers may bind: the first so many; none: all.
    pub first: Option<u32>,
    /// Who mounts for the callers; none: the kernel, as if there were no filter.
    pub mounts: Option<Arc<dyn Mounts>>,
    /// Block nodes that are not the callers' are refused; or, like all other calls, left to the kernel.
    pub nodes: bool,
    /// See [`AT_ONCE`].
    pub at_once: usize,
    /// See [`DEADLINE`].
    pub deadline: Duration,
    /// Called once, when nobody is left who could call; not after [`Supervisor::stop`]. Calls of
    /// those who were killed may still be in progress.
    pub on_end: Box<dyn FnOnce() + Send>,
}

/// What has happened so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Calls received.
    pub calls: u64,
    /// Of these, not ours.
    pub passed: u64,
    /// Of these, answered with an errno.
    pub failed: u64,
    /// Of these, failed because they took too long.
    pub overdue: u64,
    /// Of these, failed because of a bug in this program.
    pub panicked: u64,
}

#[derive(Default)]
struct Counters {
    calls: AtomicU64,
    passed: AtomicU64,
    failed: AtomicU64,
    overdue: AtomicU64,
    panicked: AtomicU64,
}

/// A call being served.
struct Busy {
    id: u64,
    until: Instant,
    overdue: bool,
}

/// What the thread that leads does.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Lead {
    /// None leads.
    #[default]
    Nobody,
    /// Waits for a call.
    Receives,
    /// Serves the one with this id.
    Serves(u64),
}

#[derive(Default)]
struct State {
    busy: Vec<Busy>,
    threads: usize,
    lead: Lead,
    /// Threads that wait to lead.
    idle: usize,
    /// One of them looks now and then whether the one that leads still serves the same call.
    watched: bool,
    over: bool,
    on_end: Option<Box<dyn FnOnce() + Send>>,
}

struct Shared {
    listener: Listener,
    desk: Desk,
    mounts: Option<Arc<dyn Mounts>>,
    nodes: bool,
    name: String,
    at_once: usize,
    deadline: Duration,
    /// Readable when the leader should look at the state again.
    wake: OwnedFd,
    known: caller::Known,
    state: Mutex<State>,
    /// The lead is free, there is something to watch, or it is over.
    look: Condvar,
    ended: Condvar,
    counters: Counters,
}

/// One listener, served. Dropped, it takes on nothing more, and waits for nothing.
pub struct Supervisor(Arc<Shared>);

impl Supervisor {
    /// Takes over a listener, which may come from anybody.
    pub fn start(listener: OwnedFd, loops: impl Loops + 'static, options: Options) -> Result<Supervisor> {
        let what = || format!("cannot intercept the calls of {}", options.name);
        caller::check_kernel().map_err(|error| {
            let error = Error::os(error, what()).with_kind(Kind::Unsupported);
            error.hint("Linux 6.9 or later is needed")
        })?;
        let listener = Listener::new(listener).map_err(|error| Error::os(error, what()))?;
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let wake = wake.map_err(|error| Error::os(error, what()))?;
        let context = what();
        let Options { name, is_control, administrators, first, mounts, nodes, at_once, deadline, on_end } =
            options;
        let first = first.unwrap_or(u32::MAX);
        let shared = Arc::new(Shared {
            listener,
            desk: Desk { loops: Box::new(loops), is_control, administrators, first },
            mounts,
            nodes,
            name,
            at_once: at_once.max(1),
            deadline,
            wake,
            known: caller::Known::default(),
            state: Mutex::new(State { on_end: Some(on_end), ..State::default() }),
            look: Condvar::new(),
            ended: Condvar::new(),
            counters: Counters::default(),
        });
        // From here on dropping it stops the thread.
        let supervisor = Supervisor(shared);
        add_thread(&supervisor.0).map_err(|error| Error::os(error, context))?;
        Ok(supervisor)
    }

    /// What has happened so far.
    pub fn counts(&self) -> Counts {
        let Counters { calls, passed, failed, overdue, panicked } = &self.0.counters;
        Counts {
            calls: calls.load(Relaxed),
            passed: passed.load(Relaxed),
            failed: failed.load(Relaxed),
            overdue: overdue.load(Relaxed),
            panicked: panicked.load(Relaxed),
        }
    }

    /// Nobody can call any more, or it was stopped.
    pub fn is_over(&self) -> bool {
        lock(&self.0.state).over
    }

    /// Takes on nothing more, and waits for the calls in progress. Answers whether they were over in
    /// time; when they are, the listener is closed, and callers get ENOSYS.
    pub fn stop(self, within: Duration) -> bool {
        self.0.stop();
        let state = lock(&self.0.state);
        let waited = self.0.ended.wait_timeout_while(state, within, |state| state.threads > 0);
        let (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        state.threads == 0
    }
}

impl Drop for Supervisor {
    fn drop(&mut self) {
        self.0.stop();
    }
}

/// Nothing is left half done where a panic could happen under these locks.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn add_thread(shared: &Arc<Shared>) -> std::io::Result<()> {
    lock(&shared.state).threads += 1;
    let its = Arc::clone(shared);
    let name = format!("calls-{}", shared.name);
    let started = std::thread::Builder::new().name(name.replace('\0', "")).spawn(move || run(&its));
    if started.is_err() {
        shared.leave();
    }
    started.map(drop)
}

fn run(shared: &Arc<Shared>) {
    let mut leads = false;
    while leads || shared.wait_to_lead() {
        let Some(note) = shared.lead() else { break };
        // Without another thread this one leads again when it has served: slower, but not wrong.
        if !shared.is_watched()
            && let Err(error) = add_thread(shared)
        {
            tracing::warn!(pool = shared.name, %error, "calls are served one by one");
        }
        shared.serve(&note);
        leads = shared.done(&note);
        if !leads && lock(&shared.state).idle > 0 {
            break;
        }
    }
    shared.leave();
}

impl Shared {
    fn stop(&self) {
        lock(&self.state).over = true;
        self.look.notify_all();
        self.wake();
    }

    fn wake(&self) {
        // Full is as good as written.
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
    }

    fn leave(&self) {
        lock(&self.state).threads -= 1;
        self.ended.notify_all();
    }

    /// Waits until nobody leads, or the one that leads is busy for too long. Not so: it is over.
    fn wait_to_lead(&self) -> bool {
        let mut state = lock(&self.state);
        state.idle += 1;
        let mut seen = Lead::Nobody;
        while !state.over && state.lead != Lead::Nobody {
            if let Lead::Serves(_) = state.lead {
                if state.lead == seen {
                    break;
                }
                seen = state.lead;
                state.watched = true;
                let waited = self.look.wait_timeout(state, LEAD);
                state = waited.unwrap_or_else(PoisonError::into_inner).0;
                state.watched = false;
            } else {
                state = self.look.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
        }
        state.idle -= 1;
        state.lead = Lead::Receives;
        !state.over
    }

    /// A thread watches this one while it serves; if not, there should be one more.
    fn is_watched(&self) -> bool {
        let state = lock(&self.state);
        if !state.watched && state.idle > 0 {
            self.look.notify_one();
        }
        state.idle > 0 || state.threads > self.at_once
    }

    /// Leads until there is a call to serve. None: it is over.
    fn lead(&self) -> Option<Notification> {
        loop {
            let (full, timeout) = self.look()?;
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
                        state.busy.push(Busy { id: note.id, until, overdue: false });
                        state.lead = Lead::Serves(note.id);
                        drop(state);
                        self.counters.calls.fetch_add(1, Relaxed);
                        return Some(note);
                    }
                    // A caller that was killed before it was received, or a signal to this thread.
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

    /// A call has been served. Does this thread still lead?
    fn done(&self, note: &Notification) -> bool {
        let mut state = lock(&self.state);
        let was_full = state.busy.len() >= self.at_once;
        state.busy.retain(|busy| busy.id != note.id);
        let leads = state.lead == Lead::Serves(note.id);
        if leads {
            state.lead = Lead::Receives;
        }
        drop(state);
        if was_full && !leads {
            self.wake();
        }
        leads
    }

    /// Fails what is overdue. Are as many calls served as may be, and when is the next overdue?
    /// None: it is over.
    fn look(&self) -> Option<(bool, Option<Timespec>)> {
        let mut state = lock(&self.state);
        if state.over {
            return None;
        }
        let now = Instant::now();
        for busy in state.busy.iter_mut().filter(|busy| !busy.overdue && busy.until <= now) {
            busy.overdue = true;
            // From now on the operation finds that nobody waits for it.
            if self.listener.answer(busy.id, Err(Errno::IO)).is_ok() {
                self.counters.overdue.fetch_add(1, Relaxed);
                self.counters.failed.fetch_add(1, Relaxed);
                tracing::warn!(pool = self.name, "a call took too long and was failed");
            }
        }
        let next = state.busy.iter().filter(|busy| !busy.overdue).map(|busy| busy.until).min();
        let timeout = next.map(|next| {
            let left = next.saturating_duration_since(now);
            Timespec { tv_sec: left.as_secs().cast_signed(), tv_nsec: left.subsec_nanos().into() }
        });
        Some((state.busy.len() >= self.at_once, timeout))
    }

    /// Nobody can call any more, or nobody can be served.
    fn end(&self, why: Option<std::io::Error>) {
        if let Some(error) = why {
            tracing::error!(pool = self.name, %error, "calls are not intercepted any more");
        }
        let mut state = lock(&self.state);
        state.over = true;
        let on_end = state.on_end.take();
        drop(state);
        self.look.notify_all();
        if let Some(on_end) = on_end
            && catch_unwind(AssertUnwindSafe(on_end)).is_err()
        {
            tracing::error!(pool = self.name, "bug: the end of the last caller was not noticed");
        }
    }

    fn serve(&self, note: &Notification) {
        let verdict = catch_unwind(AssertUnwindSafe(|| self.verdict(note)));
        let verdict = verdict.unwrap_or_else(|_| {
            self.counters.panicked.fetch_add(1, Relaxed);
            tracing::error!(pool = self.name, "bug: a call could not be served");
            Verdict::Answer(Err(Errno::IO))
        });
        // Nobody may wait any more: killed, failed as overdue, or answered by the owner of the filter.
        let (told, counter) = match verdict {
            Verdict::Pass => (self.listener.let_through(note.id), Some(&self.counters.passed)),
            Verdict::Answer(answer) => {
                let failed = answer.is_err().then_some(&self.counters.failed);
                (self.listener.answer(note.id, answer), failed)
            }
        };
        if let (Ok(()), Some(counter)) = (told, counter) {
            counter.fetch_add(1, Relaxed);
        }
    }

    /// Nothing of a call that is not known has been looked at: it may pass.
    fn verdict(&self, note: &Notification) -> Verdict {
        let Some(thread) = Thread::new(&self.listener, note.id, note.pid, &self.known) else {
            return Verdict::Pass;
        };
        match filter::decode(note.data.arch, note.data.nr) {
            Some((abi, Call::Ioctl)) => self.desk.ioctl(&thread, &Ioctl::new(abi, &note.data.args)),
            Some((_, Call::Mknod | Call::Mknodat)) if !self.nodes => Verdict::Pass,
            Some((abi, Call::Mknod)) => self.desk.mknod(&thread, &Mknod::new(abi, &note.data.args)),
            Some((abi, Call::Mknodat)) => self.desk.mknod(&thread, &Mknod::at(abi, &note.data.args)),
            Some((abi, call @ (Call::Mount | Call::Umount))) => match &self.mounts {
                Some(mounts) => {
                    let serve = if call == Call::Mount { mounts::mount } else { mounts::umount };
                    serve(&**mounts, &thread, abi, &note.data.args, self.desk.administrators)
                }
                None => Verdict::Pass,
            },
            None => Verdict::Pass,
        }
    }
}
