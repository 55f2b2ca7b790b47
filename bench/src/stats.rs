//! What can be said of a few measurements: their median, and how far it may be off.
//!
//! Pure, and the same for the same numbers: resampling starts from a fixed seed.

/// Fewer values than this say nothing about how far their median may be off.
const ENOUGH: usize = 5;
const RESAMPLES: usize = 4000;
/// Shares of the resamples below and above the interval: 95 % lie within it.
const TAIL: f64 = 0.025;

/// The middle one, or the mean of the two in the middle.
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

/// Where the median lies with 95 % confidence, by the percentile bootstrap.
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
    fn it_covers_the_truth_about_as_often_as_it_says() {
        // Medians of samples from a uniform distribution over 0 … 1, whose median is 0.5.
        let mut random = fastrand::Rng::with_seed(7);
        let covered = (0..400)
            .filter(|_| {
                let values: Vec<f64> = (0..15).map(|_| random.f64()).collect();
                interval(&values).is_some_and(|(low, high)| low <= 0.5 && 0.5 <= high)
            })
            .count();
        assert!((360..=396).contains(&covered), "{covered} of 400");
    }

    proptest! {
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
