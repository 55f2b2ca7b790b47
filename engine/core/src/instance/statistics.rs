// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Statistics of a device, from its queues or from the block layer.

use super::spec::{DeviceStats, LatencyBucket, LatencySummary};
use hdrhistogram::Histogram;

use crate::sys::block_stats::BlockStats;
use crate::worker::QueueStats;

/// Bounds of latencies in microseconds: 10 µs to 10 s.
const BOUNDS_US: [u64; 16] = [
    10, 25, 50, 100, 250, 500, 1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000, 250_000, 1_000_000,
    10_000_000,
];

/// Of a device that this program's workers serve.
pub(super) fn of_queues(queues: &[QueueStats], path: String, image: String) -> DeviceStats {
    let sum = |counter: fn(&QueueStats) -> u64| queues.iter().map(counter).sum();
    DeviceStats {
        path,
        image,
        at_ns: monotonic_ns(),
        reads: sum(|queue| queue.reads),
        read_bytes: sum(|queue| queue.read_bytes),
        writes: sum(|queue| queue.writes),
        written_bytes: sum(|queue| queue.written_bytes),
        flushes: sum(|queue| queue.flushes),
        syncs: sum(|queue| queue.syncs),
        discards: sum(|queue| queue.discards),
        errors: sum(|queue| queue.errors),
        resubmits: sum(|queue| queue.resubmits),
        punts: sum(|queue| queue.punts),
        fallbacks: sum(|queue| queue.fallbacks),
        requests: sum(|queue| queue.requests),
        batches: sum(|queue| queue.batches),
        held: sum(|queue| queue.held),
        in_flight: sum(|queue| queue.in_flight),
        latency: summarise(queues),
    }
}

/// Of a device that the kernel serves. The block layer counts neither failures nor what only
/// workers do, and measures no percentiles.
pub(super) fn of_block_layer(counts: BlockStats, path: String, image: String) -> DeviceStats {
    let BlockStats { reads, read_bytes, writes, written_bytes, in_flight, discards, flushes, .. } = counts;
    DeviceStats {
        path,
        image,
        at_ns: monotonic_ns(),
        reads,
        read_bytes,
        writes,
        written_bytes,
        flushes,
        discards,
        in_flight,
        ..DeviceStats::default()
    }
}

fn monotonic_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec.unsigned_abs() * 1_000_000_000 + now.tv_nsec.unsigned_abs()
}

fn summarise(queues: &[QueueStats]) -> LatencySummary {
    let mut histograms = queues.iter().filter_map(QueueStats::latency);
    let Some(mut all) = histograms.next().cloned() else { return LatencySummary::default() };
    for other in histograms {
        // All histograms have the same bounds, so this cannot fail.
        let _ = all.add(other);
    }
    LatencySummary {
        samples: all.len(),
        p50_ns: all.value_at_quantile(0.5),
        p90_ns: all.value_at_quantile(0.9),
        p99_ns: all.value_at_quantile(0.99),
        p999_ns: all.value_at_quantile(0.999),
        max_ns: all.max(),
        sum_ns: (all.mean() * all.len() as f64) as u64,
        buckets: buckets(&all),
    }
}

fn buckets(all: &Histogram<u32>) -> Vec<LatencyBucket> {
    let up_to = |us: &u64| LatencyBucket { up_to_ns: us * 1000, samples: all.count_between(0, us * 1000) };
    BOUNDS_US.iter().map(up_to).collect()
}
