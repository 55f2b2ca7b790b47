// SPDX-License-Identifier: Apache-2.0 OR MIT
//! One thread: it leads, serves one turn, and follows or ends.
//!
//! Knows the order of these. What may be served is in `state`.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use super::state::{Leader, State, TurnKind, Wait};
use super::{EventSource, Next, Ready, Shared, Turn, WAKE};

/// A leader that serves one turn for this long, or up to twice as long, is replaced.
const LEADER_TIMEOUT: Duration = Duration::from_millis(2);
/// The name of each thread.
const NAME: &str = "pool-events";
/// The interval of attempts to start a follower.
const RETRY_INTERVAL: Duration = Duration::from_millis(100);
/// When a source whose turn panicked gets its next time.
const PANIC_INTERVAL: Duration = Duration::from_secs(1);

/// What the leader serves next.
struct ChosenTurn {
    turn: u64,
    kind: TurnKind,
    key: u64,
    source: Arc<dyn EventSource>,
}

/// Starts a thread, which is counted as a follower already.
pub(super) fn spawn(shared: &Arc<Shared>) -> std::io::Result<()> {
    let its = Arc::clone(shared);
    let start = || std::thread::Builder::new().name(NAME.to_owned()).spawn(move || run(&its)).map(drop);
    #[cfg(test)]
    let start = || match shared.refuses_threads.load(std::sync::atomic::Ordering::SeqCst) {
        true => Err(std::io::ErrorKind::OutOfMemory.into()),
        false => start(),
    };
    let started = start();
    let mut state = shared.lock();
    if started.is_err() {
        state.followers -= 1;
    }
    let is_news = std::mem::replace(&mut state.lacks_threads, started.is_err()) != started.is_err();
    drop(state);
    if let Err(error) = &started
        && is_news
    {
        tracing::warn!(%error, "cannot start a thread: calls of pools wait");
    }
    started
}

fn run(shared: &Arc<Shared>) {
    shared.wait_for_leadership(shared.lock());
    loop {
        let ChosenTurn { turn, kind, key, source } = shared.next_turn();
        let request = Turn { threads: shared, key, received: Cell::new(false) };
        let done = catch_unwind(AssertUnwindSafe(|| match kind {
            TurnKind::Request => source.serve(&request),
            TurnKind::Due => source.due(),
            TurnKind::Over => {
                source.over();
                Next::End
            }
            TurnKind::Removed => Next::End,
        }));
        let next = done.unwrap_or_else(|_| {
            tracing::error!("bug: panic in a turn of a pool");
            Next::Continue((kind == TurnKind::Due).then(|| Instant::now() + PANIC_INTERVAL))
        });
        if kind == TurnKind::Request {
            request.received(None);
        }
        // The state has a reference until no turn is in progress: this is not the last one.
        drop(source);
        if !shared.finish(turn, kind, key, next) {
            return;
        }
    }
}

impl Shared {
    /// Waits until there is no leader, or the leader serves one turn for too long. The caller is
    /// counted as a follower.
    fn wait_for_leadership(&self, mut state: MutexGuard<'_, State>) {
        let mut seen = Leader::None;
        while state.leader != Leader::None {
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
        state.leader = Leader::Choosing;
    }

    /// As the leader, waits for the next turn. Starts a follower only then: the thread of the last
    /// turn may have become one meanwhile.
    fn next_turn(self: &Arc<Self>) -> ChosenTurn {
        // A follower could not be started: nothing that may block is served.
        let mut refused = false;
        loop {
            let mut state = self.lock();
            refused &= state.followers == 0;
            let now = Instant::now();
            if let Some((kind, key)) = state.choose(now, !refused) {
                if refused || state.followers > 0 {
                    return self.begin(&mut state, kind, key);
                }
                refused = !self.start_follower(state);
                continue;
            }
            let retry = refused.then(|| now + RETRY_INTERVAL);
            let until = state.next_due(now, !refused).into_iter().chain(retry).min();
            state.wait = until.map_or(Wait::Forever, Wait::Until);
            drop(state);
            let timeout = until.map(|until| timespec(until.saturating_duration_since(now)));
            let event = match refused {
                false => self.wait_for_event(timeout.as_ref()),
                true => self.wait_for_wake(timeout.as_ref()),
            };
            refused = false;
            let mut state = self.lock();
            state.wait = Wait::None;
            let Some((key, flags)) = event else { continue };
            match state.accept(key, flags, self.threads_max) {
                // It is reported again.
                Some((Ready::Request, true) | (Ready::Over, _)) if state.followers == 0 => {
                    refused = !self.start_follower(state);
                }
                Some((Ready::Request, true)) => return self.begin(&mut state, TurnKind::Request, key),
                // It is full: its other events are still reported.
                Some((Ready::Request, false)) => {
                    if let Some(source) = state.disarm(key) {
                        self.set_interest(key, &*source, EventFlags::empty());
                    }
                }
                Some((Ready::Over, _)) => {
                    let turn = self.begin(&mut state, TurnKind::Over, key);
                    self.remove(&mut state, key);
                    return turn;
                }
                Some((Ready::Nothing, _)) | None => {}
            }
        }
    }

    fn begin(&self, state: &mut State, kind: TurnKind, key: u64) -> ChosenTurn {
        let (turn, source) = state.begin(kind, key);
        if !state.monitored {
            self.changed.notify_one();
        }
        ChosenTurn { turn, kind, key, source }
    }

    /// Starts a follower, which monitors this leader. False: it cannot be started.
    fn start_follower(self: &Arc<Self>, mut state: MutexGuard<'_, State>) -> bool {
        state.followers += 1;
        drop(state);
        spawn(self).is_ok()
    }

    fn wait_for_event(&self, timeout: Option<&Timespec>) -> Option<(u64, EventFlags)> {
        // One event: the kernel then puts its descriptor behind the others that are ready.
        let mut events = [epoll::Event { flags: EventFlags::empty(), data: EventData::new_u64(WAKE) }];
        match epoll::wait(&self.epoll, &mut events[..], timeout) {
            Ok(0) | Err(Errno::INTR) => None,
            Ok(_) if events[0].data.u64() == WAKE => {
                let _ = rustix::io::read(&self.wake, &mut [0; 8]);
                None
            }
            Ok(_) => Some((events[0].data.u64(), events[0].flags)),
            Err(error) => {
                tracing::error!(%error, "cannot wait for events of pools");
                std::thread::sleep(RETRY_INTERVAL);
                None
            }
        }
    }

    fn wait_for_wake(&self, timeout: Option<&Timespec>) -> Option<(u64, EventFlags)> {
        if poll(&mut [PollFd::new(&self.wake, PollFlags::IN)], timeout).is_ok() {
            let _ = rustix::io::read(&self.wake, &mut [0; 8]);
        }
        None
    }

    /// Records the end of a turn. True: this thread leads. False: it is not needed any more.
    fn finish(&self, turn: u64, kind: TurnKind, key: u64, next: Next) -> bool {
        let mut state = self.lock();
        if next == Next::End {
            self.remove(&mut state, key);
        }
        let postponed = state.end_turn(kind, key);
        if let Next::Continue(due) = next
            && let Some(due) = due.into_iter().chain(postponed).min()
        {
            self.schedule(&mut state, key, due);
        }
        self.arm_again(&mut state, key);
        if let Some(source) = state.take_removed(key) {
            // This closes its descriptors: a follower still monitors this thread.
            drop(state);
            let removed = catch_unwind(AssertUnwindSafe(|| source.removed()));
            if removed.is_err() {
                tracing::error!("bug: panic at the end of a pool's source");
            }
            state = self.lock();
            state.forget(key);
            self.removed.notify_all();
        }
        state.turns -= 1;
        if state.turns + 1 == self.threads_max {
            state.disarmed().into_iter().for_each(|key| self.arm_again(&mut state, key));
        }
        if state.leader == Leader::Serving(turn) {
            state.leader = Leader::Choosing;
            return true;
        }
        if state.followers > 0 {
            return false;
        }
        state.followers += 1;
        if state.lacks_threads {
            // The leader waits for a follower.
            self.wake();
        }
        self.wait_for_leadership(state);
        true
    }
}

fn timespec(duration: Duration) -> Timespec {
    Timespec { tv_sec: duration.as_secs().cast_signed(), tv_nsec: duration.subsec_nanos().into() }
}
