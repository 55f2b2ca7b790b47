// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Threads with sources over pipes.

use std::io::{PipeReader, PipeWriter, Write};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::mpsc::{Receiver, Sender, channel};

use super::state::{Leader, TurnKind};
use super::*;

const LONG: Duration = Duration::from_secs(10);
const LEAP: Duration = Duration::from_nanos(1);

/// One byte in its pipe is one request. It waits at its gate.
struct Piped {
    requests: PipeReader,
    concurrency: usize,
    gate: Gate,
    served: Sender<&'static str>,
    name: &'static str,
    running: AtomicUsize,
    most: AtomicUsize,
    is_gone: Arc<AtomicBool>,
    panics: bool,
}

#[derive(Clone, Default)]
struct Gate(Arc<(Mutex<bool>, Condvar)>);

impl Gate {
    fn shut(&self, shut: bool) {
        *self.0.0.lock().unwrap() = shut;
        self.0.1.notify_all();
    }

    fn pass(&self) {
        drop(self.0.1.wait_while(self.0.0.lock().unwrap(), |shut| *shut).unwrap());
    }
}

impl EventSource for Piped {
    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        Some(self.requests.as_fd())
    }

    fn concurrency(&self) -> usize {
        self.concurrency
    }

    fn interpret(&self, events: EventFlags) -> Ready {
        match events {
            events if events.contains(EventFlags::IN) => Ready::Request,
            events if events.contains(EventFlags::HUP) => Ready::Over,
            _ => Ready::Nothing,
        }
    }

    fn serve(&self, turn: &Turn<'_>) -> Next {
        if rustix::io::read(&self.requests, &mut [0]) != Ok(1) {
            return Next::Continue(None);
        }
        turn.received(None);
        self.most.fetch_max(self.running.fetch_add(1, SeqCst) + 1, SeqCst);
        self.gate.pass();
        self.running.fetch_sub(1, SeqCst);
        self.served.send(self.name).unwrap();
        assert!(!self.panics, "as expected");
        Next::Continue(None)
    }

    fn over(&self) {
        self.served.send("over").unwrap();
    }

    fn removed(self: Arc<Self>) {
        let is_gone = self.is_gone.clone();
        is_gone.store(Arc::into_inner(self).is_some(), SeqCst);
    }
}

struct Bed {
    threads: EventThreads,
    served: Receiver<&'static str>,
    tell: Sender<&'static str>,
}

struct Client {
    requests: PipeWriter,
    gate: Gate,
    source: Arc<Piped>,
    handle: SourceHandle,
    is_gone: Arc<AtomicBool>,
}

impl Bed {
    fn new(threads_max: usize) -> Bed {
        let (tell, served) = channel();
        Bed { threads: EventThreads::start(threads_max).unwrap(), served, tell }
    }

    fn client(&self, name: &'static str, concurrency: usize) -> Client {
        self.client_that(name, concurrency, false)
    }

    fn client_that(&self, name: &'static str, concurrency: usize, panics: bool) -> Client {
        let (reader, requests) = std::io::pipe().unwrap();
        rustix::io::ioctl_fionbio(&reader, true).unwrap();
        let (gate, is_gone) = (Gate::default(), Arc::<AtomicBool>::default());
        let source = Arc::new(Piped {
            requests: reader,
            concurrency,
            gate: gate.clone(),
            served: self.tell.clone(),
            name,
            running: AtomicUsize::default(),
            most: AtomicUsize::default(),
            is_gone: is_gone.clone(),
            panics,
        });
        let handle = self.threads.add(source.clone()).unwrap();
        Client { requests, gate, source, handle, is_gone }
    }

    fn next(&self) -> &'static str {
        self.served.recv_timeout(LONG).expect("a turn ends")
    }

    /// Threads that serve, lead or follow.
    fn threads(&self) -> usize {
        let state = self.threads.0.lock();
        state.turns + state.followers + usize::from(!matches!(state.leader, Leader::Serving(_)))
    }
}

impl Client {
    fn request(&mut self, count: usize) {
        self.requests.write_all(&vec![0; count]).unwrap();
    }

    fn wait_for(&self, running: usize) {
        wait_for(|| self.source.running.load(SeqCst) == running);
    }
}

fn wait_for(condition: impl Fn() -> bool) {
    let until = Instant::now() + LONG;
    while !condition() {
        assert!(Instant::now() < until, "waited in vain");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_hanging_request_does_not_delay_others() {
    let bed = Bed::new(100);
    let mut hung: Vec<Client> = (0..20).map(|_| bed.client("hung", 4)).collect();
    for client in &mut hung {
        client.gate.shut(true);
        client.request(4);
    }
    hung.iter().for_each(|client| client.wait_for(4));
    let mut other = bed.client("other", 4);
    let from = Instant::now();
    for _ in 0..100 {
        other.request(1);
        assert_eq!(bed.next(), "other");
    }
    assert!(from.elapsed() < Duration::from_secs(2), "{:?}", from.elapsed());
    hung.iter().for_each(|client| client.gate.shut(false));
    (0..80).for_each(|_| assert_eq!(bed.next(), "hung"));
}

#[test]
fn idle_threads_are_two_for_any_number_of_sources() {
    let bed = Bed::new(1000);
    let mut clients: Vec<Client> = (0..200).map(|_| bed.client("", 4)).collect();
    for client in &mut clients {
        client.gate.shut(true);
        client.request(1);
    }
    clients.iter().for_each(|client| client.wait_for(1));
    assert!((200..=202).contains(&bed.threads()), "{}", bed.threads());
    clients.iter().for_each(|client| client.gate.shut(false));
    (0..200).for_each(|_| _ = bed.next());
    wait_for(|| bed.threads() == 2);
}

#[test]
fn a_flood_does_not_starve_others() {
    let bed = Bed::new(100);
    let mut flood = bed.client("flood", 1);
    flood.gate.shut(true);
    flood.request(1000);
    flood.wait_for(1);
    let mut other = bed.client("other", 1);
    other.request(5);
    flood.gate.shut(false);
    let order: Vec<&str> = (0..1005).map(|_| bed.next()).collect();
    let last = order.iter().rposition(|name| *name == "other").unwrap();
    assert!(last < 50, "the last of five requests was number {last}");
}

#[test]
fn a_source_serves_no_more_than_its_concurrency() {
    let bed = Bed::new(100);
    let mut client = bed.client("", 3);
    client.gate.shut(true);
    client.request(50);
    client.wait_for(3);
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(client.source.running.load(SeqCst), 3);
    client.gate.shut(false);
    (0..50).for_each(|_| _ = bed.next());
    assert!(client.source.most.load(SeqCst) <= 3);
}

#[test]
fn at_the_limit_of_threads_each_source_serves_one_request() {
    let bed = Bed::new(8);
    let mut hung: Vec<Client> = (0..4).map(|_| bed.client("hung", 4)).collect();
    for client in &mut hung {
        client.gate.shut(true);
        client.request(4);
    }
    let running = || hung.iter().map(|client| client.source.running.load(SeqCst)).sum::<usize>();
    wait_for(|| running() >= 8);
    std::thread::sleep(Duration::from_millis(50));
    assert!((8..=11).contains(&running()), "{}", running());
    let mut other = bed.client("other", 4);
    other.request(3);
    (0..3).for_each(|_| assert_eq!(bed.next(), "other"));
    hung[1..].iter().for_each(|client| client.gate.shut(false));
    (0..12).for_each(|_| assert_eq!(bed.next(), "hung"));
    // Below the limit, one that still hangs is served more.
    hung[0].wait_for(4);
    hung[0].gate.shut(false);
    (0..4).for_each(|_| assert_eq!(bed.next(), "hung"));
}

#[test]
fn the_end_is_noticed_while_requests_hang() {
    let bed = Bed::new(100);
    let mut client = bed.client("hung", 2);
    client.gate.shut(true);
    client.request(2);
    client.wait_for(2);
    let Client { requests, gate, source, handle, is_gone } = client;
    drop((source, requests));
    assert_eq!(bed.next(), "over");
    assert!(!handle.wait_until_removed(Duration::from_millis(20)));
    assert!(!is_gone.load(SeqCst));
    gate.shut(false);
    assert!(handle.wait_until_removed(LONG));
    assert!(is_gone.load(SeqCst), "the last reference goes before the end is reported");
}

#[test]
fn a_removed_source_gets_no_request() {
    let bed = Bed::new(100);
    let mut client = bed.client("removed", 2);
    client.gate.shut(true);
    client.request(1);
    client.wait_for(1);
    client.handle.remove();
    client.handle.remove();
    client.request(2);
    assert!(!client.handle.wait_until_removed(Duration::from_millis(20)), "a request is served");
    client.gate.shut(false);
    assert!(client.handle.wait_until_removed(LONG));
    assert_eq!(bed.next(), "removed");
    assert!(bed.served.try_recv().is_err());
}

#[test]
fn a_panic_ends_its_turn_only() {
    let bed = Bed::new(100);
    let mut client = bed.client_that("panics", 1, true);
    client.request(3);
    (0..3).for_each(|_| assert_eq!(bed.next(), "panics"));
    let mut other = bed.client("other", 1);
    other.request(1);
    assert_eq!(bed.next(), "other");
}

/// Reports each of its times, and then hangs at its gate.
struct Timed {
    gate: Gate,
    times: Sender<Instant>,
    interval: Option<Duration>,
}

impl EventSource for Timed {
    fn due(&self) -> Next {
        self.times.send(Instant::now()).unwrap();
        self.gate.pass();
        Next::Continue(self.interval.map(|interval| Instant::now() + interval))
    }
}

fn timed(bed: &Bed, interval: Option<Duration>) -> (Gate, Receiver<Instant>, SourceHandle) {
    let (times, seen) = channel();
    let gate = Gate::default();
    let source = Timed { gate: gate.clone(), times, interval };
    (gate, seen, bed.threads.add(Arc::new(source)).unwrap())
}

#[test]
fn a_time_that_hangs_does_not_delay_others() {
    let bed = Bed::new(1);
    let hung: Vec<_> = (0..20).map(|_| timed(&bed, None)).collect();
    for (gate, _, handle) in &hung {
        gate.shut(true);
        handle.schedule(Instant::now());
    }
    hung.iter().for_each(|(_, seen, _)| _ = seen.recv_timeout(LONG).unwrap());
    let (_, seen, handle) = timed(&bed, Some(Duration::from_millis(10)));
    handle.schedule(Instant::now());
    let times: Vec<Instant> = (0..20).map(|_| seen.recv_timeout(LONG).unwrap()).collect();
    assert!(times[19] - times[0] >= Duration::from_millis(190));
    assert!(times[19] - times[0] < Duration::from_secs(2), "{:?}", times[19] - times[0]);
    hung.iter().for_each(|(gate, ..)| gate.shut(false));
}

#[test]
fn a_time_set_during_its_turn_comes_afterwards() {
    let bed = Bed::new(100);
    let (gate, seen, handle) = timed(&bed, None);
    gate.shut(true);
    handle.schedule(Instant::now());
    seen.recv_timeout(LONG).unwrap();
    handle.schedule(Instant::now() + LONG);
    handle.schedule(Instant::now());
    assert!(seen.recv_timeout(Duration::from_millis(50)).is_err(), "one turn at a time");
    gate.shut(false);
    seen.recv_timeout(LONG).unwrap();
    assert!(seen.recv_timeout(Duration::from_millis(50)).is_err(), "it came once");
}

#[test]
fn an_earlier_time_replaces_a_later_one() {
    let bed = Bed::new(100);
    let (_, seen, handle) = timed(&bed, None);
    handle.schedule(Instant::now() + Duration::from_secs(60));
    std::thread::sleep(Duration::from_millis(20));
    handle.schedule(Instant::now());
    seen.recv_timeout(LONG).unwrap();
    handle.remove();
    assert!(handle.wait_until_removed(LONG));
    handle.schedule(Instant::now());
    assert!(seen.recv_timeout(LONG).is_err(), "removed sources have no times");
}

#[test]
fn requests_and_times_alternate() {
    let (mut state, now) = (State::default(), Instant::now());
    let source = || Arc::new(Deadline(channel().0));
    let keys = [state.insert(source()), state.insert(source())];
    keys.iter().for_each(|key| assert!(state.schedule(*key, now)));
    assert_eq!(state.choose(now, true), Some((TurnKind::Due, keys[0])));
    drop(state.begin(TurnKind::Due, keys[0]));
    state.end_turn(TurnKind::Due, keys[0]);
    state.schedule(keys[0], now + LEAP);
    // A request, if there is one.
    assert_eq!(state.choose(now, true), None);
    assert_eq!(state.next_due(now, true), Some(now), "the leader does not sleep");
    assert_eq!(state.choose(now, true), Some((TurnKind::Due, keys[1])));
}

/// Its times do not block.
struct Deadline(Sender<Instant>);

impl EventSource for Deadline {
    fn due_may_block(&self) -> bool {
        false
    }

    fn due(&self) -> Next {
        self.0.send(Instant::now()).unwrap();
        Next::Continue(None)
    }
}

#[test]
fn deadlines_are_kept_when_no_thread_can_be_started() {
    let bed = Bed::new(100);
    let (mut hung, mut other) = (bed.client("hung", 1), bed.client("other", 1));
    let (times, seen) = channel();
    let deadline = bed.threads.add(Arc::new(Deadline(times))).unwrap();
    let (_, polled, poll) = timed(&bed, None);
    wait_for(|| {
        let state = bed.threads.0.lock();
        state.leader == Leader::Choosing && state.followers == 1
    });
    bed.threads.0.refuses_threads.store(true, SeqCst);
    hung.gate.shut(true);
    hung.request(1);
    hung.wait_for(1);
    other.request(1);
    wait_for(|| bed.threads.0.lock().lacks_threads);
    poll.schedule(Instant::now());
    deadline.schedule(Instant::now());
    seen.recv_timeout(LONG).unwrap();
    assert!(bed.served.recv_timeout(Duration::from_millis(50)).is_err(), "it could block the last thread");
    assert!(polled.try_recv().is_err());
    hung.gate.shut(false);
    assert_eq!(bed.next(), "hung");
    assert_eq!(bed.next(), "other");
    polled.recv_timeout(LONG).unwrap();
}
