// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Where an operation costs time.

use crate::outcome::{Cost, Mode};
use crate::units::{count, time};

/// Cost of one operation by layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(in crate::render) struct Parts {
    pub(in crate::render) submitter: f64,
    pub(in crate::render) engine: f64,
    /// Everything else: drivers, the file system, idle time.
    pub(in crate::render) below: f64,
}

impl Parts {
    pub(in crate::render) fn layers(&self) -> [f64; 3] {
        [self.submitter, self.engine, self.below]
    }

    pub(in crate::render) fn sum(&self) -> f64 {
        self.layers().iter().sum()
    }
}

/// `None` where the layers are incomplete: the cost of a driver without a serving process is only
/// known from the cost of the whole system.
pub(in crate::render) fn parts(cost: &Cost) -> Option<Parts> {
    let positive =
        |value: Option<f64>| value.filter(|value| value.is_finite() && *value > 0.0).unwrap_or(0.0);
    cost.submitter_ns?;
    cost.system_ns.or(cost.engine_ns)?;
    let (submitter, engine) = (positive(cost.submitter_ns), positive(cost.engine_ns));
    Some(Parts { submitter, engine, below: (positive(cost.system_ns) - submitter - engine).max(0.0) })
}

/// The rest of the whole system's cost.
pub(in crate::render) fn below(cost: &Cost) -> Option<f64> {
    Some((cost.system_ns? - cost.submitter_ns? - cost.engine_ns.unwrap_or(0.0)).max(0.0))
}

/// Unit of a cost.
pub(in crate::render) fn unit(mode: Mode) -> &'static str {
    if mode == Mode::Icount { "instructions" } else { "CPU time" }
}

/// Formats a cost: instructions in `icount`, CPU time elsewhere.
pub(in crate::render) fn writer(mode: Mode) -> fn(f64) -> String {
    if mode == Mode::Icount { count } else { time }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rest_is_the_lowest_segment() {
        let cost =
            Cost { submitter_ns: Some(3.0), engine_ns: Some(5.0), system_ns: Some(10.0), ..Cost::default() };
        assert_eq!(
            (below(&cost), parts(&cost).map(|parts| parts.layers())),
            (Some(2.0), Some([3.0, 5.0, 2.0]))
        );
        let cost = Cost { system_ns: None, ..cost };
        assert_eq!((below(&cost), parts(&cost).map(|parts| parts.sum())), (None, Some(8.0)));
        let cost = Cost { submitter_ns: Some(20.0), system_ns: Some(f64::NAN), ..cost };
        assert_eq!(parts(&cost).map(|parts| parts.below), Some(0.0));
        assert_eq!(parts(&Cost { engine_ns: None, system_ns: None, ..cost }), None);
        assert_eq!(parts(&Cost::default()), None);
    }
}
