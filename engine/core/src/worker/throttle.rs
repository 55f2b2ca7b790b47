// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Limits on a device's requests and bytes per second: two token buckets, which the queues of the
//! device share.
//!
//! A bucket is stored as the time at which it will be full (the generic cell rate algorithm), so
//! that queues on several workers take tokens without a lock. A request is admitted while the bucket
//! is not overdrawn, and may overdraw it: long requests pass slow limits, and the average is exact.
//! Does not know queues, and holds no request.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::request::{Op, Request};

/// Size of a bucket: what may pass at once after a pause, as a time at the limit.
const BURST_NS: u64 = 50_000_000;
/// Nanoseconds in a second.
const SECOND_NS: u64 = 1_000_000_000;

/// Limits per second; 0: none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct IoLimits {
    /// Requests, without flushes.
    pub iops: u64,
    /// Bytes read and written.
    pub bytes: u64,
}

/// See the module.
#[derive(Debug, Default)]
pub struct Throttle {
    requests: Bucket,
    bytes: Bucket,
}

#[derive(Debug, Default)]
struct Bucket {
    per_second: AtomicU64,
    full_at_ns: AtomicU64,
}

impl Throttle {
    /// Full buckets with these limits.
    pub fn new(limits: IoLimits) -> Throttle {
        let throttle = Throttle::default();
        throttle.set(limits);
        throttle
    }

    /// Changes the limits. Queues notice within [`super::HOLD_MAX`].
    pub fn set(&self, limits: IoLimits) {
        self.requests.per_second.store(limits.iops, Relaxed);
        self.bytes.per_second.store(limits.bytes, Relaxed);
    }

    /// The present limits.
    pub fn limits(&self) -> IoLimits {
        IoLimits { iops: self.requests.per_second.load(Relaxed), bytes: self.bytes.per_second.load(Relaxed) }
    }

    /// Whether there is a limit.
    pub fn is_limited(&self) -> bool {
        self.limits() != IoLimits::default()
    }

    /// Admits a request at this time, or returns the nanoseconds until one can be admitted. Two
    /// queues may both be admitted by the last token; they then wait for both.
    pub fn admit(&self, request: &Request, now_ns: u64) -> Result<(), u64> {
        let (requests, bytes) = match request.op {
            // It changes nothing, and others wait for it.
            Op::Flush => return Ok(()),
            Op::Read | Op::Write { .. } => (1, u64::from(request.len)),
            _ => (1, 0),
        };
        match self.requests.wait_ns(now_ns).max(self.bytes.wait_ns(now_ns)) {
            0 => {
                self.requests.take(requests, now_ns);
                self.bytes.take(bytes, now_ns);
                Ok(())
            }
            wait_ns => Err(wait_ns),
        }
    }
}

impl Bucket {
    /// Nanoseconds until it has a token.
    fn wait_ns(&self, now_ns: u64) -> u64 {
        match self.per_second.load(Relaxed) {
            0 => 0,
            _ => self.full_at_ns.load(Relaxed).saturating_sub(now_ns.saturating_add(BURST_NS)),
        }
    }

    fn take(&self, tokens: u64, now_ns: u64) {
        let per_second = self.per_second.load(Relaxed);
        if per_second == 0 || tokens == 0 {
            return;
        }
        // At most 2^32 tokens: no overflow.
        let cost_ns = tokens * SECOND_NS / per_second;
        let full = |full_at_ns: u64| Some(full_at_ns.max(now_ns).saturating_add(cost_ns));
        // Ends: a failure means that another queue has taken tokens.
        let _ = self.full_at_ns.fetch_update(Relaxed, Relaxed, full);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    fn request(op: Op, len: u32) -> Request {
        Request { tag: 0, op, offset: 0, len }
    }

    /// Requests that are admitted in 5 s if one always waits.
    fn admitted(throttle: &Throttle, request: &Request, from_ns: u64) -> u64 {
        let (mut now, mut count) = (from_ns, 0);
        while now < from_ns + 5 * SECOND_NS {
            match throttle.admit(request, now) {
                Ok(()) => count += 1,
                Err(wait_ns) => now += wait_ns,
            }
        }
        count
    }

    #[test]
    fn admits_the_limit_on_average() {
        for iops in [1, 10, 333, 1000, 100_000] {
            let throttle = Throttle::new(IoLimits { iops, bytes: 0 });
            let count = admitted(&throttle, &request(Op::Read, 4096), SECOND_NS);
            let most = 5 * iops + iops / 20 + 1;
            assert!((5 * iops..=most).contains(&count), "{count} at {iops}");
            // Without a pause there is no second burst.
            let count = admitted(&throttle, &request(Op::Discard, 4096), 6 * SECOND_NS);
            assert!((5 * iops - 1..=5 * iops + 1).contains(&count), "{count} at {iops}");
        }
        let throttle = Throttle::new(IoLimits { iops: 0, bytes: 10 << 20 });
        let count = admitted(&throttle, &request(Op::Write { fua: false }, 1 << 20), SECOND_NS);
        assert!((50..=51).contains(&count), "{count}");
    }

    #[test]
    fn the_lower_limit_counts() {
        let throttle = Throttle::new(IoLimits { iops: 100, bytes: 1 << 20 });
        assert!((80..90).contains(&admitted(&throttle, &request(Op::Read, 64 << 10), SECOND_NS)));
        let throttle = Throttle::new(IoLimits { iops: 100, bytes: 1 << 30 });
        assert!((500..510).contains(&admitted(&throttle, &request(Op::Read, 64 << 10), SECOND_NS)));
    }

    #[test]
    fn a_large_request_passes_a_slow_limit() {
        let throttle = Throttle::new(IoLimits { iops: 0, bytes: 4096 });
        let (large, now) = (request(Op::Write { fua: true }, 1 << 20), SECOND_NS);
        assert_eq!(throttle.admit(&large, now), Ok(()));
        assert_eq!(throttle.admit(&large, now), Err(256 * SECOND_NS - BURST_NS));
        assert_eq!(throttle.admit(&request(Op::Flush, 0), now), Ok(()));
        throttle.set(IoLimits { iops: 5, bytes: 0 });
        assert_eq!(throttle.admit(&large, now), Ok(()), "the limit is gone");
        assert_eq!(throttle.admit(&large, now), Err(150 * MS));
        throttle.set(IoLimits::default());
        assert!(!throttle.is_limited() && throttle.admit(&large, now).is_ok());
    }
}
