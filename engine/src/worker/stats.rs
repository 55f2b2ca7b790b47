//! Figures of one queue. Plain numbers: one thread counts, and hands out copies when asked.

use hdrhistogram::Histogram;

use crate::request::Op;

/// One request in so many is timed (and then goes unlinked, for a linked one is not seen to end).
const SAMPLE: u64 = 32;
/// The range of latencies that is told apart, in nanoseconds; slower ones count as the slowest.
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
    /// Discards and write-zeroes completed.
    pub discards: u64,
    /// Requests failed.
    pub errors: u64,
    /// Operations sent again after a short or interrupted one.
    pub resubmits: u64,
    /// Operations that leave the fast path for a helper thread of the kernel.
    pub punts: u64,
    /// Buffers registered by hand.
    pub fallbacks: u64,
    /// Requests that arrived.
    pub requests: u64,
    /// Rounds in which any arrived.
    pub batches: u64,
    /// Requests in flight when the copy was made.
    pub in_flight: u64,
    /// A read ended before the end of the device: the image is shorter than it was.
    pub degraded: bool,
    /// The driver refused something that it must not refuse.
    pub failed: bool,
    pub(super) latency: Option<Box<Histogram<u32>>>,
}

impl QueueStats {
    /// Counts an arrival; true when it is one to be timed.
    pub fn arrived(&mut self) -> bool {
        self.requests += 1;
        self.requests % SAMPLE == 1
    }

    /// Counts a request that has ended.
    pub fn completed(&mut self, op: Op, bytes: u32, result: i32) {
        if result < 0 {
            self.errors += 1;
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

    /// Takes back what was counted for a transfer that was expected to succeed.
    pub fn uncount(&mut self, op: Op, bytes: u32) {
        let (number, sum) = match op {
            Op::Write { .. } => (&mut self.writes, &mut self.written_bytes),
            _ => (&mut self.reads, &mut self.read_bytes),
        };
        *number -= 1;
        *sum -= u64::from(bytes);
    }

    /// Records a latency.
    pub fn timed(&mut self, latency_ns: u64) {
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
