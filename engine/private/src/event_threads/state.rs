// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the threads share: their sources, the times of these, and the turns in progress.
//!
//! Knows which event may be served now. Does not wait, and calls no function of a source that may
//! block.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Instant;

use rustix::event::epoll::EventFlags;

use super::{EventSource, Ready};

/// The state of the leader.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub(super) enum Leader {
    /// There is no leader.
    #[default]
    None,
    /// It waits for an event.
    Choosing,
    /// It serves this turn.
    Serving(u64),
}

/// How long the leader waits.
#[derive(Clone, Copy, Default)]
pub(super) enum Wait {
    /// It does not wait. It checks the state before it does.
    #[default]
    None,
    Until(Instant),
    Forever,
}

impl Wait {
    pub(super) fn ends_after(self, at: Instant) -> bool {
        match self {
            Wait::None => false,
            Wait::Until(until) => until > at,
            Wait::Forever => true,
        }
    }
}

/// The kinds of turns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TurnKind {
    /// A request is received and served.
    Request,
    /// The time of the source has come.
    Due,
    /// The descriptor reports the end.
    Over,
    /// The source was removed when no turn of it was in progress.
    Removed,
}

struct Source {
    /// None while its last reference is dropped.
    source: Option<Arc<dyn EventSource>>,
    /// Turns in progress.
    turns: usize,
    /// Of these, requests.
    requests: usize,
    /// A thread receives a request.
    receiving: bool,
    /// The leader waits for its requests.
    armed: bool,
    /// Its entry in [`State::due`].
    due: Option<Instant>,
    /// A turn for its time is in progress.
    in_due: bool,
    /// A time that was set during that turn.
    postponed: Option<Instant>,
    removed: bool,
}

#[derive(Default)]
pub(super) struct State {
    sources: BTreeMap<u64, Source>,
    due: BTreeSet<(Instant, u64)>,
    /// Removed sources that had no turn in progress.
    ended: VecDeque<u64>,
    last_source: u64,
    last_turn: u64,
    /// The last turn was for a time: a request is next.
    requests_first: bool,
    /// Turns in progress.
    pub(super) turns: usize,
    pub(super) leader: Leader,
    pub(super) wait: Wait,
    /// Followers, with those that are being started.
    pub(super) followers: usize,
    /// A follower monitors the leader.
    pub(super) monitored: bool,
    /// The last attempt to start a thread failed.
    pub(super) lacks_threads: bool,
}

impl State {
    pub(super) fn insert(&mut self, source: Arc<dyn EventSource>) -> u64 {
        self.last_source += 1;
        let source = Source {
            source: Some(source),
            turns: 0,
            requests: 0,
            receiving: false,
            armed: true,
            due: None,
            in_due: false,
            postponed: None,
            removed: false,
        };
        self.sources.insert(self.last_source, source);
        self.last_source
    }

    pub(super) fn contains(&self, key: u64) -> bool {
        self.sources.contains_key(&key)
    }

    pub(super) fn forget(&mut self, key: u64) {
        self.sources.remove(&key);
    }

    /// Sets the time of a source, unless an earlier one is set. True: it is set.
    pub(super) fn schedule(&mut self, key: u64, at: Instant) -> bool {
        let Some(source) = self.sources.get_mut(&key).filter(|source| !source.removed) else { return false };
        if source.in_due {
            source.postponed = source.postponed.into_iter().chain([at]).min();
            return false;
        }
        if source.due.is_some_and(|due| due <= at) {
            return false;
        }
        if let Some(due) = source.due.replace(at) {
            self.due.remove(&(due, key));
        }
        self.due.insert((at, key));
        true
    }

    /// Marks a source as removed. Returns it; none: it was removed before.
    pub(super) fn remove(&mut self, key: u64) -> Option<Arc<dyn EventSource>> {
        let source = self.sources.get_mut(&key).filter(|source| !source.removed)?;
        source.removed = true;
        if let Some(due) = source.due.take() {
            self.due.remove(&(due, key));
        }
        if source.turns == 0 {
            self.ended.push_back(key);
        }
        source.source.clone()
    }

    /// Whether a thread must take up a removed source.
    pub(super) fn has_ended(&self) -> bool {
        !self.ended.is_empty()
    }

    /// A turn that needs no event of a descriptor. `any`: it may block.
    pub(super) fn choose(&mut self, now: Instant, any: bool) -> Option<(TurnKind, u64)> {
        if any && let Some(key) = self.ended.front() {
            return Some((TurnKind::Removed, *key));
        }
        let key = self.due_at(any).take_while(|(due, _)| *due <= now).map(|(_, key)| key).next()?;
        if any && std::mem::take(&mut self.requests_first) {
            return None;
        }
        self.requests_first = true;
        Some((TurnKind::Due, key))
    }

    /// When the leader must choose again: see [`State::choose`].
    pub(super) fn next_due(&self, now: Instant, any: bool) -> Option<Instant> {
        self.due_at(any).map(|(due, _)| due.max(now)).next()
    }

    fn due_at(&self, any: bool) -> impl Iterator<Item = (Instant, u64)> {
        let may_be_served = move |key: &u64| {
            let source = self.sources.get(key).and_then(|source| source.source.as_ref());
            any || source.is_some_and(|source| !source.due_may_block())
        };
        self.due.iter().copied().filter(move |(_, key)| may_be_served(key))
    }

    /// What an event means, and whether the source may serve a request. None: it is removed.
    pub(super) fn accept(&self, key: u64, events: EventFlags, threads_max: usize) -> Option<(Ready, bool)> {
        let source = self.sources.get(&key).filter(|source| !source.removed)?;
        let ready = source.source.as_ref()?.interpret(events);
        Some((ready, self.has_capacity(source, threads_max)))
    }

    fn has_capacity(&self, source: &Source, threads_max: usize) -> bool {
        let concurrency = source.source.as_ref().map_or(0, |source| source.concurrency());
        let limit = if self.turns >= threads_max { concurrency.min(1) } else { concurrency };
        !source.receiving && source.requests < limit
    }

    /// Its requests are not awaited any more. Returns the source if they were.
    pub(super) fn disarm(&mut self, key: u64) -> Option<Arc<dyn EventSource>> {
        let source = self.sources.get_mut(&key)?;
        std::mem::take(&mut source.armed).then(|| source.source.clone()).flatten()
    }

    /// Sources whose requests are not awaited.
    pub(super) fn disarmed(&self) -> Vec<u64> {
        self.sources.iter().filter(|(_, source)| !source.armed).map(|(key, _)| *key).collect()
    }

    /// Returns a source that has capacity again: its requests are awaited.
    pub(super) fn rearm(&mut self, key: u64, threads_max: usize) -> Option<Arc<dyn EventSource>> {
        let source = self.sources.get(&key)?;
        if source.armed || source.removed || !self.has_capacity(source, threads_max) {
            return None;
        }
        let source = self.sources.get_mut(&key)?;
        source.armed = true;
        source.source.clone()
    }

    /// The leader begins a turn of a source that is there.
    pub(super) fn begin(&mut self, kind: TurnKind, key: u64) -> (u64, Arc<dyn EventSource>) {
        self.last_turn += 1;
        self.turns += 1;
        self.leader = Leader::Serving(self.last_turn);
        let source = self.sources.get_mut(&key).expect("only existing sources have turns");
        source.turns += 1;
        match kind {
            TurnKind::Request => {
                source.requests += 1;
                source.receiving = true;
            }
            TurnKind::Due => {
                source.in_due = true;
                if let Some(due) = source.due.take() {
                    self.due.remove(&(due, key));
                }
            }
            TurnKind::Over => {}
            TurnKind::Removed => self.ended.retain(|ended| *ended != key),
        }
        (self.last_turn, source.source.clone().expect("it is dropped after its last turn"))
    }

    pub(super) fn received(&mut self, key: u64) {
        if let Some(source) = self.sources.get_mut(&key) {
            source.receiving = false;
        }
    }

    /// Returns a time that was set during a turn for the former one.
    pub(super) fn end_turn(&mut self, kind: TurnKind, key: u64) -> Option<Instant> {
        let source = self.sources.get_mut(&key)?;
        source.turns -= 1;
        match kind {
            TurnKind::Request => source.requests -= 1,
            TurnKind::Due => {
                source.in_due = false;
                return source.postponed.take();
            }
            TurnKind::Over | TurnKind::Removed => {}
        }
        None
    }

    /// The last reference of a removed source without a turn.
    pub(super) fn take_removed(&mut self, key: u64) -> Option<Arc<dyn EventSource>> {
        let source = self.sources.get_mut(&key).filter(|source| source.removed && source.turns == 0)?;
        source.source.take()
    }
}
