// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Latency distributions: merges rounds, computes percentiles, converts to the form of a result.
//!
//! Two significant digits, the resolution of fio's bins. Knows nothing of fio.

use hdrhistogram::Histogram;

/// One hour; longer latencies count as this.
const LARGEST_NS: u64 = 3_600_000_000_000;
const DIGITS: u8 = 2;

/// Percentiles that a report shows.
pub const PERCENTILES: [f64; 6] = [50.0, 90.0, 95.0, 99.0, 99.9, 99.99];

/// An empty histogram.
pub fn empty() -> Histogram<u64> {
    Histogram::new_with_bounds(1, LARGEST_NS, DIGITS).expect("the bounds are constants")
}

/// Merges histograms; the order does not matter.
pub fn merge<'a>(histograms: impl IntoIterator<Item = &'a Histogram<u64>>) -> Histogram<u64> {
    let mut all = empty();
    for histogram in histograms {
        record(&mut all, counts(histogram));
    }
    all
}

/// Nanoseconds and counts, ascending, for `outcome::Latency`.
pub fn counts(histogram: &Histogram<u64>) -> Vec<(u64, u64)> {
    histogram.iter_recorded().map(|at| (at.value_iterated_to(), at.count_at_value())).collect()
}

/// The inverse of `counts`.
pub fn from_counts(counts: &[(u64, u64)]) -> Histogram<u64> {
    let mut histogram = empty();
    record(&mut histogram, counts.iter().copied());
    histogram
}

/// Latency in nanoseconds at each of `PERCENTILES`; none if nothing was recorded.
pub fn percentiles(histogram: &Histogram<u64>) -> Option<[u64; PERCENTILES.len()]> {
    (!histogram.is_empty()).then(|| PERCENTILES.map(|percentile| at(histogram, percentile)))
}

/// Latency at one percentile; 0 if nothing was recorded.
pub fn at(histogram: &Histogram<u64>, percentile: f64) -> u64 {
    histogram.value_at_percentile(percentile)
}

/// Adds values with their counts.
pub(super) fn record(histogram: &mut Histogram<u64>, counts: impl IntoIterator<Item = (u64, u64)>) {
    for (value_ns, count) in counts {
        histogram.saturating_record_n(value_ns, count);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Any distribution, including values above the maximum.
    fn any() -> impl Strategy<Value = Histogram<u64>> {
        let value_ns = prop_oneof![0..100_u64, 0..2 * LARGEST_NS];
        prop::collection::vec((value_ns, 0..1_000_000_u64), 0..40).prop_map(|seen| from_counts(&seen))
    }

    #[test]
    fn an_empty_histogram_has_no_percentiles() {
        assert_eq!((percentiles(&empty()), at(&empty(), 50.0)), (None, 0));
        assert_eq!(percentiles(&merge([&empty(), &empty()])), None);
        assert_eq!(percentiles(&from_counts(&[(7, 1)])), Some([7; 6]));
    }

    #[test]
    fn a_percentile_is_within_two_digits_of_the_value() {
        let thousand: Vec<(u64, u64)> = (1..=1000).map(|us| (us * 1000, 1)).collect();
        let [p50, p90, .., p9999] = percentiles(&from_counts(&thousand)).unwrap();
        for (found, truth) in [(p50, 500_000.0), (p90, 900_000.0), (p9999, 1_000_000.0)] {
            assert!((found as f64 / truth - 1.0).abs() < 0.01, "{found} for {truth}");
        }
    }

    proptest! {
        #[test]
        fn merging_keeps_every_value_whatever_the_order(
            mut parts in prop::collection::vec(any(), 0..6),
            by in 0..6_usize,
        ) {
            let all = merge(&parts);
            prop_assert_eq!(all.len(), parts.iter().map(Histogram::len).sum::<u64>());
            let middle = by % parts.len().max(1);
            parts.rotate_left(middle);
            prop_assert_eq!(&merge(&parts), &all);
            // Merging is associative.
            let nested = merge([&merge(&parts[..middle]), &merge(&parts[middle..])]);
            prop_assert_eq!(&nested, &all);
        }

        #[test]
        fn a_result_keeps_the_whole_distribution(histogram in any()) {
            let kept = counts(&histogram);
            prop_assert!(kept.is_sorted_by(|a, b| a.0 < b.0));
            prop_assert_eq!(&from_counts(&kept), &histogram);
        }

        #[test]
        fn percentiles_rise_and_lie_between_the_extremes(histogram in any()) {
            if let Some(found) = percentiles(&histogram) {
                prop_assert!(found.is_sorted());
                prop_assert!(histogram.min() <= found[0] && found[5] <= histogram.max());
            }
        }
    }
}
