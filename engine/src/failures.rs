//! Failing I/O, for the log: counted by workers, said by a thread of its own.
//!
//! A worker counts without a lock and wakes the reporter at most once a second. The reporter says the first
//! failure of a kind at once, and how many there were since at most once a minute: for each device. Knows
//! names and errnos; does not know what failed, nor how it is answered.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

use crate::sys::printable;

/// Kinds of failure that are told apart, by errno; one more is all others.
const KINDS: [i32; 3] = [libc::ENOSPC, libc::EDQUOT, libc::EIO];
/// The image ends before its device does.
const SHORT: usize = KINDS.len();
const OTHER: usize = SHORT + 1;
/// A device says each kind once in so much time.
const QUIET: Duration = Duration::from_secs(60);
/// Between two rounds of the reporter, and lines in one: a tenant must not fill the log.
const PAUSE: Duration = Duration::from_secs(1);
const LINES: usize = 16;

/// What failed of one device, over all its queues.
#[derive(Debug)]
pub struct Failures {
    device: String,
    image: String,
    counts: [AtomicU64; OTHER + 1],
    /// The errno last counted as another.
    other: AtomicI32,
    /// When each kind was last said: the reporter's.
    said: Mutex<[Option<Instant>; OTHER + 1]>,
}

/// All devices that are reported on.
static DEVICES: Mutex<Vec<Weak<Failures>>> = Mutex::new(Vec::new());
/// There is something to say.
static PENDING: AtomicBool = AtomicBool::new(false);
static REPORTER: OnceLock<Option<Thread>> = OnceLock::new();

impl Failures {
    /// Reports on a device from now on, as long as anybody holds this.
    pub fn of(device: String, image: String) -> Arc<Failures> {
        let image = printable(&image);
        let (counts, other, said) = (Default::default(), AtomicI32::new(0), Mutex::default());
        let failures = Arc::new(Failures { device, image, counts, other, said });
        let mut devices = lock(&DEVICES);
        if devices.len() == devices.capacity() {
            devices.retain(|device| device.strong_count() > 0);
        }
        devices.push(Arc::downgrade(&failures));
        failures
    }

    /// The image, for messages.
    pub fn image(&self) -> &str {
        &self.image
    }

    /// Counts a request that failed. `short`: the image ends before the device does.
    #[cold]
    pub fn count(&self, errno: i32, short: bool) {
        let kind = match KINDS.iter().position(|known| *known == errno) {
            Some(_) if short && errno == libc::EIO => SHORT,
            Some(kind) => kind,
            // The block layer asks, and goes on without.
            None if errno == libc::EOPNOTSUPP => return,
            None => {
                self.other.store(errno, Ordering::Relaxed);
                OTHER
            }
        };
        if let Some(count) = self.counts.get(kind) {
            count.fetch_add(1, Ordering::Relaxed);
        }
        if !PENDING.load(Ordering::Relaxed) && !PENDING.swap(true, Ordering::AcqRel) {
            REPORTER.get().into_iter().flatten().for_each(Thread::unpark);
        }
    }

    /// What is to be said now, `lines` at the most; and when there is more to be said, if there is.
    fn take(&self, now: Instant, lines: usize) -> (Vec<String>, Option<Instant>) {
        let (mut said, mut text, mut due) = (lock(&self.said), Vec::new(), None::<Instant>);
        for (kind, (count, said)) in self.counts.iter().zip(said.iter_mut()).enumerate() {
            if count.load(Ordering::Relaxed) == 0 {
                continue;
            }
            let later = match *said {
                Some(before) if now < before + QUIET => before + QUIET,
                _ if text.len() >= lines => now + PAUSE,
                before => {
                    text.push(self.line(kind, count.swap(0, Ordering::Relaxed), before.is_some()));
                    *said = Some(now);
                    continue;
                }
            };
            due = Some(due.map_or(later, |due| due.min(later)));
        }
        (text, due)
    }

    fn line(&self, kind: usize, count: u64, again: bool) -> String {
        let errno = KINDS.get(kind).copied().unwrap_or_else(|| self.other.load(Ordering::Relaxed));
        let error = match kind {
            SHORT => {
                format!("{}: the image is shorter than the device", io::Error::from_raw_os_error(libc::EIO))
            }
            _ => io::Error::from_raw_os_error(errno).to_string(),
        };
        let requests = if count == 1 { "request" } else { "requests" };
        let more = if again { " more" } else { "" };
        let next = match kind {
            SHORT => "; extend the image, or resize the device to it",
            _ if matches!(errno, libc::ENOSPC | libc::EDQUOT) => {
                "; make room on the file system of the image"
            }
            _ => "",
        };
        format!("{}: {count}{more} {requests} failed on {}: {error}{next}", self.device, self.image)
    }
}

/// Starts the reporter, unless it runs. Before any worker does: a worker must not start it.
pub fn start_reporter() {
    REPORTER.get_or_init(|| {
        let started = thread::Builder::new().name("failures".into()).spawn(report);
        let started = started.inspect_err(|error| tracing::warn!("failing I/O is not logged: {error}"));
        started.ok().map(|handle| handle.thread().clone())
    });
}

fn report() {
    let mut due = None;
    loop {
        // A wake-up without a reason does no harm.
        match due {
            _ if PENDING.load(Ordering::Acquire) => {}
            None => thread::park(),
            Some(due) => thread::park_timeout(Instant::saturating_duration_since(&due, Instant::now())),
        }
        PENDING.store(false, Ordering::Release);
        due = say(Instant::now());
        thread::sleep(PAUSE);
    }
}

fn say(now: Instant) -> Option<Instant> {
    let devices: Vec<_> = lock(&DEVICES).iter().filter_map(Weak::upgrade).collect();
    let (mut lines, mut due) = (LINES, None::<Instant>);
    for device in devices {
        let (text, later) = device.take(now, lines);
        lines -= text.len();
        text.iter().for_each(|line| tracing::warn!("{line}"));
        due = due.into_iter().chain(later).min();
    }
    due
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn says_the_first_of_a_kind_at_once_and_the_rest_once_a_minute() {
        let device = Failures::of("default/loop0".into(), "/img".into());
        let start = Instant::now();
        assert_eq!(device.take(start, LINES), (vec![], None));
        (0..3).for_each(|_| device.count(libc::ENOSPC, false));
        device.count(libc::EOPNOTSUPP, false);
        device.count(libc::EIO, true);
        let (text, due) = device.take(start, LINES);
        assert_eq!(due, None);
        assert!(text[0].starts_with("default/loop0: 3 requests failed on /img: No space left"), "{text:?}");
        assert!(text[1].contains("1 request failed") && text[1].contains("shorter"), "{text:?}");
        assert_eq!(text.len(), 2);
        (0..7).for_each(|_| device.count(libc::ENOSPC, false));
        assert_eq!(device.take(start + QUIET / 2, LINES), (vec![], Some(start + QUIET)));
        // Another kind need not wait.
        device.count(libc::EDQUOT, false);
        assert_eq!(device.take(start + QUIET / 2, LINES).0.len(), 1);
        let (text, due) = device.take(start + QUIET, LINES);
        assert!(text[0].contains("7 more requests failed"), "{text:?}");
        assert_eq!((text.len(), due), (1, None));
    }

    #[test]
    fn what_is_too_much_for_one_round_is_said_in_the_next() {
        let device = Failures::of("p/loop1".into(), "/img".into());
        let now = Instant::now();
        [libc::ENOSPC, libc::EDQUOT, libc::EIO].iter().for_each(|errno| device.count(*errno, false));
        device.count(libc::EPERM, false);
        let (text, due) = device.take(now, 3);
        assert_eq!((text.len(), due), (3, Some(now + PAUSE)));
        let (text, due) = device.take(now + PAUSE, 3);
        assert!(text[0].contains("os error 1)") && text.len() == 1 && due.is_none(), "{text:?}");
    }
}
