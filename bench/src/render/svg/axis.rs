// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Maps values to positions, and chooses the ticks of an axis.
//!
//! Knows no data and no SVG element.

/// Values and positions of both ends.
#[derive(Clone, Copy, Debug)]
pub(super) struct Axis {
    pub(super) values: (f64, f64),
    pub(super) places: (f64, f64),
    pub(super) log: bool,
}

impl Axis {
    /// A linear axis that begins at zero.
    pub(super) fn linear(most: f64, places: (f64, f64)) -> Axis {
        let most = if most.is_finite() && most > 0.0 { most } else { 1.0 };
        Axis { values: (0.0, most), places, log: false }
    }

    pub(super) fn log(values: (f64, f64), places: (f64, f64)) -> Axis {
        let fine = values.0.is_finite() && values.1.is_finite() && values.0 > 0.0 && values.1 > values.0;
        Axis { values: if fine { values } else { (1.0, 10.0) }, places, log: true }
    }

    /// Position of a value; values beyond an end are placed at that end.
    pub(super) fn place(&self, value: f64) -> f64 {
        let scale = |value: f64| if self.log { value.max(f64::MIN_POSITIVE).ln() } else { value };
        let (from, to) = (scale(self.values.0), scale(self.values.1));
        let share = ((scale(value) - from) / (to - from)).clamp(0.0, 1.0);
        self.places.0 + share * (self.places.1 - self.places.0)
    }

    /// About four round values; on a log axis 1, 2 and 5 times powers of ten.
    pub(super) fn ticks(&self) -> Vec<f64> {
        let (from, to) = self.values;
        if !self.log {
            let rough = (to - from) / 4.0;
            let power = 10f64.powf(rough.log10().floor());
            let nice = [1.0, 2.0, 2.5, 5.0, 10.0].map(|step| step * power);
            let step = nice.into_iter().find(|step| *step >= rough * 0.99).unwrap_or(rough);
            let number = ((to - from) / step * 1.0001).floor() as usize;
            return (0..=number).map(|index| from + index as f64 * step).collect();
        }
        let decades = (to / from).log10();
        let steps: &[f64] = if decades > 2.5 { &[1.0] } else { &[1.0, 2.0, 5.0] };
        let powers = (from.log10().floor() as i32)..=(to.log10().ceil() as i32);
        let all = powers.flat_map(|power| steps.iter().map(move |step| step * 10f64.powi(power)));
        all.filter(|value| (from * 0.9999..=to * 1.0001).contains(value)).collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn ticks_are_round() {
        assert_eq!(Axis::linear(77.0, (0.0, 1.0)).ticks(), [0.0, 20.0, 40.0, 60.0]);
        assert_eq!(Axis::log((5.0, 300.0), (0.0, 1.0)).ticks(), [5.0, 10.0, 20.0, 50.0, 100.0, 200.0]);
    }

    #[test]
    fn invalid_values_have_a_position() {
        for axis in [
            Axis::linear(f64::NAN, (10.0, 20.0)),
            Axis::linear(0.0, (10.0, 20.0)),
            Axis::log((0.0, 0.0), (10.0, 20.0)),
            Axis::log((f64::INFINITY, 3.0), (10.0, 20.0)),
        ] {
            assert!(!axis.ticks().is_empty() && axis.ticks().len() < 12);
            assert!((10.0..=20.0).contains(&axis.place(0.0)));
        }
    }

    proptest! {
        #[test]
        fn places_are_in_order_and_ticks_few(from in 1e-3f64..1e6, factor in 1.01f64..1e6, log: bool) {
            let to = from * factor;
            let axis = if log { Axis::log((from, to), (0.0, 100.0)) } else { Axis::linear(to, (0.0, 100.0)) };
            prop_assert!(axis.place(from) <= axis.place(to));
            prop_assert_eq!(axis.place(to), 100.0);
            prop_assert!(axis.ticks().len() < 12);
            prop_assert!(axis.ticks().windows(2).all(|pair| pair[0] < pair[1]));
        }
    }
}
