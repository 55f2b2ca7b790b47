// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Parser for numeric options, with readable range errors.

use std::fmt::Display;
use std::ops::{Bound, RangeBounds};
use std::str::FromStr;

/// A clap parser for numbers in `range`. `From<u32>` keeps untyped literals from being `i32`, which
/// clap rejects only at run time.
pub fn within<T: From<u32> + FromStr + PartialOrd + Display>(
    range: impl RangeBounds<T> + Clone,
) -> impl Fn(&str) -> Result<T, String> + Clone {
    move |text| {
        text.parse().ok().filter(|number| range.contains(number)).ok_or_else(|| {
            match (range.start_bound(), range.end_bound()) {
                (Bound::Included(min), Bound::Included(max)) => format!("give a number from {min} to {max}"),
                (Bound::Included(min), _) => format!("give a number of at least {min}"),
                _ => "give a number".to_owned(),
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_the_range() {
        assert_eq!(within(1..=8_u32)("8"), Ok(8));
        for text in ["0", "9", "-1", "", "x", "99999999999999999999"] {
            assert_eq!(within(1..=8_u32)(text), Err("give a number from 1 to 8".to_owned()), "{text}");
        }
        assert_eq!(within(1_u64..)("0"), Err("give a number of at least 1".to_owned()));
    }
}
