// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Statistics of one queue. Plain numbers: one thread counts and returns copies on request.

use hdrhistogram::Histogram;

use crate::image::Image;
use crate::request::Op;

/// One request of this many is timed. It is not linked, since a linked one produces no completion.
const SAMPLE: u64 = 32;
/// Range of the latency histogram in nanoseconds; slower requests count as the maximum.
const LATENCY_NS: (u64, u64) = (1_000, 60_000_000_000);

/// Counters of a queue since it was added, and the latencies of a sample.
#[derive(Clone, Debug, Default)]
pub struct QueueStats {
    /// Reads completed.
    pub reads: u64,
    /// Bytes read.
    pub read_bytes: u64,
    /// Writes completed.
    pub writes: u64,
    /// Bytes written.
    pub written_bytes: u64,
    /// Flushes completed.
    pub flushes: u64,
    /// fdatasyncs that ended: none for a flush after durable writes, one for several flushes.
    pub syncs: u64,
    /// Discards and write-zeroes completed.
    pub discards: u64,
    /// Failed requests.
    pub errors: u64,
    /// Operations resubmitted after a short or interrupted one.
    pub resubmits: u64,
    /// Operations that the kernel hands to an io-wq thread.
    pub punts: u64,
    /// Requests whose buffer the worker had to register (fallback).
    pub fallbacks: u64,
    /// Requests that arrived.
    pub requests: u64,
    /// Rounds with at least one arrival.
    pub batches: u64,
    /// Requests that waited for the limits of the device.
    pub held: u64,
    /// Requests in flight at the time of the copy.
    pub in_flight: u64,
    /// A read hit the end of the image: the image has shrunk.
    pub degraded: bool,
    /// The driver refused a command that it must accept.
    pub failed: bool,
    pub(super) latency: Option<Box<Histogram<u32>>>,
}

impl QueueStats {
    /// Counts an arrival. Returns true for a request to be timed.
    pub fn arrived(&mut self) -> bool {
        self.requests += 1;
        self.requests % SAMPLE == 1
    }

    /// Counts a completed request.
    pub fn completed(&mut self, op: Op, bytes: u32, result: i32, image: &Image) {
        if result < 0 {
            self.errors += 1;
            // After the first short read, further failed reads count as the same fault.
            image.count_failure(-result, self.degraded && op == Op::Read);
            return;
        }
        match op {
            Op::Read => {
                self.reads += 1;
                self.read_bytes += u64::from(bytes);
            }
            Op::Write { .. } => {
                self.writes += 1;
                self.written_bytes += u64::from(bytes);
            }
            Op::Flush => self.flushes += 1,
            Op::Discard | Op::WriteZeroes { .. } => self.discards += 1,
            Op::Reserve | Op::Unknown(_) => {}
        }
    }

    /// Undoes `completed` for a linked transfer that failed.
    pub fn undo_completed(&mut self, op: Op, bytes: u32) {
        let (number, sum) = match op {
            Op::Write { .. } => (&mut self.writes, &mut self.written_bytes),
            _ => (&mut self.reads, &mut self.read_bytes),
        };
        *number -= 1;
        *sum -= u64::from(bytes);
    }

    /// Records a latency.
    pub fn record_latency(&mut self, latency_ns: u64) {
        let histogram = self.latency.get_or_insert_with(|| {
            let (low, high) = LATENCY_NS;
            Box::new(Histogram::new_with_bounds(low, high, 2).expect("constant bounds are valid"))
        });
        histogram.saturating_record(latency_ns);
    }

    /// The latencies recorded so far.
    pub fn latency(&self) -> Option<&Histogram<u32>> {
        self.latency.as_deref()
    }
}
