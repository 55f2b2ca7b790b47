// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Medians, confidence intervals and percentiles.
//!
//! Pure and deterministic: resampling uses a fixed seed.

/// Fewer values give no interval.
const ENOUGH: usize = 5;
const RESAMPLES: usize = 4000;
/// Share of the resamples below, and above, the 95 % interval.
const TAIL: f64 = 0.025;

/// The median; of an even number of values, the mean of the two in the middle.
pub fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    median_of_sorted(&sorted)
}

fn median_of_sorted(sorted: &[f64]) -> Option<f64> {
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => None,
        length if length % 2 == 1 => Some(sorted[middle]),
        _ => Some(f64::midpoint(sorted[middle - 1], sorted[middle])),
    }
}

/// 95 % confidence interval of the median, by the percentile bootstrap.
pub fn interval(values: &[f64]) -> Option<(f64, f64)> {
    if values.len() < ENOUGH {
        return None;
    }
    let mut random = fastrand::Rng::with_seed(1);
    let mut sample = vec![0.0; values.len()];
    let mut medians: Vec<f64> = (0..RESAMPLES)
        .filter_map(|_| {
            sample.fill_with(|| values[random.usize(..values.len())]);
            median(&sample)
        })
        .collect();
    medians.sort_by(f64::total_cmp);
    let tail = (RESAMPLES as f64 * TAIL) as usize;
    Some((*medians.get(tail)?, *medians.get(medians.len() - 1 - tail)?))
}

/// 95 % confidence interval of the quotient of two medians, `new` by `old`. The sides are not
/// paired, so each is resampled on its own.
pub fn quotient_interval(old: &[f64], new: &[f64]) -> Option<(f64, f64)> {
    if old.len().min(new.len()) < ENOUGH {
        return None;
    }
    let mut random = fastrand::Rng::with_seed(1);
    let mut middle = |values: &[f64]| {
        let sample: Vec<f64> = (0..values.len()).map(|_| values[random.usize(..values.len())]).collect();
        median(&sample)
    };
    let mut quotients: Vec<f64> =
        (0..RESAMPLES).filter_map(|_| Some(1.0 / middle(old)? * middle(new)?)).collect();
    if !quotients.iter().all(|quotient| quotient.is_finite()) {
        return None;
    }
    quotients.sort_by(f64::total_cmp);
    let tail = (RESAMPLES as f64 * TAIL) as usize;
    Some((*quotients.get(tail)?, *quotients.get(quotients.len() - 1 - tail)?))
}

/// The smallest value with at least `share` of the counts at or below it. `None` if fewer than ten
/// counts are above: that would be the maximum of a few values, not a percentile.
pub fn percentile(counts: &[(u64, u64)], share: f64) -> Option<u64> {
    const BEYOND: f64 = 10.0;
    let total: f64 = counts.iter().map(|(_, often)| *often as f64).sum();
    if total * (1.0 - share) < BEYOND * (1.0 - 1e-9) {
        return None;
    }
    let mut sorted = counts.to_vec();
    sorted.sort_unstable();
    let mut seen = 0.0;
    let reached = |(_, often): &&(u64, u64)| {
        seen += *often as f64;
        seen >= total * share
    };
    sorted.iter().find(reached).or(sorted.last()).map(|(value, _)| *value)
}

/// Median and 99th percentile by rank: of fewer than a hundred values the largest.
pub fn median_and_p99(values: &[u64]) -> Option<(f64, f64)> {
    let mut sorted: Vec<f64> = values.iter().map(|value| *value as f64).collect();
    sorted.sort_by(f64::total_cmp);
    let rank = (sorted.len() as f64 * 0.99).ceil() as usize;
    Some((median_of_sorted(&sorted)?, *sorted.get(rank.max(1) - 1)?))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn medians() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[3.0, 1.0]), Some(2.0));
        assert_eq!(median(&[9.0, 1.0, 2.0]), Some(2.0));
    }

    #[test]
    fn few_values_have_no_interval_and_equal_ones_no_width() {
        assert_eq!(interval(&[1.0, 2.0, 3.0, 4.0]), None);
        assert_eq!(interval(&[2.0; 5]), Some((2.0, 2.0)));
    }

    #[test]
    fn an_interval_covers_the_true_median_at_its_confidence_level() {
        // Samples of a uniform distribution over 0 … 1, whose median is 0.5.
        let mut random = fastrand::Rng::with_seed(7);
        let covered = (0..400)
            .filter(|_| {
                let values: Vec<f64> = (0..15).map(|_| random.f64()).collect();
                interval(&values).is_some_and(|(low, high)| low <= 0.5 && 0.5 <= high)
            })
            .count();
        assert!((360..=396).contains(&covered), "{covered} of 400");
    }

    #[test]
    fn a_percentile_needs_ten_beyond_it() {
        let counts = [(10, 90), (20, 9), (30, 1)];
        assert_eq!(percentile(&counts, 0.5), Some(10));
        assert_eq!(percentile(&counts, 0.9), Some(10));
        assert_eq!(percentile(&counts, 0.91), None);
        assert_eq!(percentile(&[(30, 10), (10, 900), (20, 90)], 0.99), Some(20));
        assert_eq!(percentile(&[], 0.5), None);
    }

    #[test]
    fn ranks() {
        assert_eq!(median_and_p99(&[]), None);
        assert_eq!(median_and_p99(&[3, 1, 2]), Some((2.0, 3.0)));
        assert_eq!(median_and_p99(&(1..=200).collect::<Vec<_>>()), Some((100.5, 198.0)));
    }

    #[test]
    fn a_quotient_of_equal_samples_covers_one_at_its_confidence_level() {
        let mut random = fastrand::Rng::with_seed(9);
        let mut side = || -> Vec<f64> { (0..15).map(|_| 1.0 + random.f64()).collect() };
        let spans = (0..300)
            .filter(|_| {
                quotient_interval(&side(), &side()).is_some_and(|(low, high)| low <= 1.0 && 1.0 <= high)
            })
            .count();
        assert!((270..=299).contains(&spans), "{spans} of 300");
    }

    proptest! {
        // A case computes sixteen thousand medians.
        #![proptest_config(ProptestConfig::with_cases(24))]

        #[test]
        fn a_quotient_lies_in_its_interval_and_inverts(
            old in prop::collection::vec(0.01f64..100.0, 5..15),
            new in prop::collection::vec(0.01f64..100.0, 5..15)
        ) {
            let (low, high) = quotient_interval(&old, &new).unwrap();
            let middle = median(&new).unwrap() / median(&old).unwrap();
            prop_assert!(low <= middle * 1.000001 && middle <= high * 1.000001);
            // Doubling all new values doubles the quotient.
            let twice: Vec<f64> = new.iter().map(|value| value * 2.0).collect();
            prop_assert_eq!(quotient_interval(&old, &twice), Some((low * 2.0, high * 2.0)));
        }
    }

    proptest! {
        #[test]
        fn percentiles_are_monotonic_sample_values(
            counts in prop::collection::vec((1u64..1_000_000, 0u64..5000), 1..60)
        ) {
            let found: Vec<u64> =
                [0.5, 0.9, 0.99, 0.999].iter().map_while(|share| percentile(&counts, *share)).collect();
            prop_assert!(found.windows(2).all(|pair| pair[0] <= pair[1]));
            prop_assert!(found.iter().all(|value| counts.iter().any(|(seen, often)| seen == value && *often > 0)));
        }

        #[test]
        fn an_interval_holds_the_median_and_lies_within_the_values(
            values in prop::collection::vec(0.01f64..100.0, 5..20)
        ) {
            let (low, high) = interval(&values).unwrap();
            let middle = median(&values).unwrap();
            let least = values.iter().copied().fold(f64::INFINITY, f64::min);
            let most = values.iter().copied().fold(0.0, f64::max);
            prop_assert!(least <= low && low <= middle && middle <= high && high <= most);
        }
    }
}
