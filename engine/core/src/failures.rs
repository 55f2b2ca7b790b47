// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Logs failing I/O: workers count failures, a reporter thread logs them.
//!
//! A worker counts without a lock and wakes the reporter at most once a second. The reporter logs
//! the first failure of each kind immediately, and further ones as a count at most once a minute,
//! per device. Knows names and errnos; does not know the requests.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

use crate::sys::printable;

/// Errnos that are counted separately; one more kind counts all others.
const KINDS: [i32; 3] = [libc::ENOSPC, libc::EDQUOT, libc::EIO];
/// The image ends before its device does.
const SHORT_IMAGE: usize = KINDS.len();
const OTHER: usize = SHORT_IMAGE + 1;
/// Minimum interval between messages of one kind per device.
const REPORT_INTERVAL: Duration = Duration::from_secs(60);
/// Pause between two rounds of the reporter, and maximum lines per round: a tenant must not fill
/// the log.
const ROUND_INTERVAL: Duration = Duration::from_secs(1);
const LINES_MAX: usize = 16;

/// The failures of one device, over all its queues.
#[derive(Debug)]
pub struct Failures {
    device: String,
    image: String,
    counts: [AtomicU64; OTHER + 1],
    /// The last errno counted as other.
    other: AtomicI32,
    /// When each kind was last logged, for the reporter.
    last_reported: Mutex<[Option<Instant>; OTHER + 1]>,
}

/// All devices that are reported on.
static DEVICES: Mutex<Vec<Weak<Failures>>> = Mutex::new(Vec::new());
/// There are failures to report.
static PENDING: AtomicBool = AtomicBool::new(false);
static REPORTER: OnceLock<Option<Thread>> = OnceLock::new();

impl Failures {
    /// Registers a device for as long as the returned value lives.
    pub fn of(device: String, image: String) -> Arc<Failures> {
        let image = printable(&image);
        let (counts, other, last_reported) = (Default::default(), AtomicI32::new(0), Mutex::default());
        let failures = Arc::new(Failures { device, image, counts, other, last_reported });
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

    /// Counts a failed request. `short`: the image ends before the device does.
    #[cold]
    pub fn count(&self, errno: i32, short: bool) {
        let kind = match KINDS.iter().position(|known| *known == errno) {
            Some(_) if short && errno == libc::EIO => SHORT_IMAGE,
            Some(kind) => kind,
            // The block layer probes features with it and falls back.
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

    /// The messages to log now, at most `lines`; and the time of the next ones, if any.
    fn take(&self, now: Instant, lines: usize) -> (Vec<String>, Option<Instant>) {
        let (mut last_reported, mut text, mut due) = (lock(&self.last_reported), Vec::new(), None::<Instant>);
        for (kind, (count, last_reported)) in self.counts.iter().zip(last_reported.iter_mut()).enumerate() {
            if count.load(Ordering::Relaxed) == 0 {
                continue;
            }
            let later = match *last_reported {
                Some(before) if now < before + REPORT_INTERVAL => before + REPORT_INTERVAL,
                _ if text.len() >= lines => now + ROUND_INTERVAL,
                before => {
                    text.push(self.line(kind, count.swap(0, Ordering::Relaxed), before.is_some()));
                    *last_reported = Some(now);
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
            SHORT_IMAGE => {
                format!("{}: the image is shorter than the device", io::Error::from_raw_os_error(libc::EIO))
            }
            _ => io::Error::from_raw_os_error(errno).to_string(),
        };
        let requests = if count == 1 { "request" } else { "requests" };
        let more = if again { " more" } else { "" };
        let next = match kind {
            SHORT_IMAGE => "; extend the image, or resize the device to it",
            _ if matches!(errno, libc::ENOSPC | libc::EDQUOT) => {
                "; free space on the file system of the image"
            }
            _ => "",
        };
        format!("{}: {count}{more} {requests} failed on {}: {error}{next}", self.device, self.image)
    }
}

/// Starts the reporter, unless it runs. Call it before any worker starts: a worker must not start
/// it.
pub fn start_reporter() {
    REPORTER.get_or_init(|| {
        let started = thread::Builder::new().name("failures".into()).spawn(report);
        let started = started
            .inspect_err(|error| tracing::warn!("cannot start the thread that logs I/O errors: {error}"));
        started.ok().map(|handle| handle.thread().clone())
    });
}

fn report() {
    let mut due = None;
    loop {
        // A spurious wake-up is harmless.
        match due {
            _ if PENDING.load(Ordering::Acquire) => {}
            None => thread::park(),
            Some(due) => thread::park_timeout(Instant::saturating_duration_since(&due, Instant::now())),
        }
        PENDING.store(false, Ordering::Release);
        due = report_all(Instant::now());
        thread::sleep(ROUND_INTERVAL);
    }
}

fn report_all(now: Instant) -> Option<Instant> {
    let devices: Vec<_> = lock(&DEVICES).iter().filter_map(Weak::upgrade).collect();
    let (mut lines, mut due) = (LINES_MAX, None::<Instant>);
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
    fn reports_the_first_of_a_kind_immediately_and_the_rest_once_a_minute() {
        let device = Failures::of("default/loop0".into(), "/img".into());
        let start = Instant::now();
        assert_eq!(device.take(start, LINES_MAX), (vec![], None));
        (0..3).for_each(|_| device.count(libc::ENOSPC, false));
        device.count(libc::EOPNOTSUPP, false);
        device.count(libc::EIO, true);
        let (text, due) = device.take(start, LINES_MAX);
        assert_eq!(due, None);
        assert!(text[0].starts_with("default/loop0: 3 requests failed on /img: No space left"), "{text:?}");
        assert!(text[1].contains("1 request failed") && text[1].contains("shorter"), "{text:?}");
        assert_eq!(text.len(), 2);
        (0..7).for_each(|_| device.count(libc::ENOSPC, false));
        assert_eq!(
            device.take(start + REPORT_INTERVAL / 2, LINES_MAX),
            (vec![], Some(start + REPORT_INTERVAL))
        );
        // Another kind need not wait.
        device.count(libc::EDQUOT, false);
        assert_eq!(device.take(start + REPORT_INTERVAL / 2, LINES_MAX).0.len(), 1);
        let (text, due) = device.take(start + REPORT_INTERVAL, LINES_MAX);
        assert!(text[0].contains("7 more requests failed"), "{text:?}");
        assert_eq!((text.len(), due), (1, None));
    }

    #[test]
    fn reports_excess_messages_in_the_next_round() {
        let device = Failures::of("p/loop1".into(), "/img".into());
        let now = Instant::now();
        [libc::ENOSPC, libc::EDQUOT, libc::EIO].iter().for_each(|errno| device.count(*errno, false));
        device.count(libc::EPERM, false);
        let (text, due) = device.take(now, 3);
        assert_eq!((text.len(), due), (3, Some(now + ROUND_INTERVAL)));
        let (text, due) = device.take(now + ROUND_INTERVAL, 3);
        assert!(text[0].contains("os error 1)") && text.len() == 1 && due.is_none(), "{text:?}");
    }
}
