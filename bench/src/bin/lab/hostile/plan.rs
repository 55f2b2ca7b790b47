// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The plan of a campaign: which kinds of hostile clients run together in a round, and their seeds.
//! It depends on the campaign's seed only. Knows nothing of what the kinds do.

use std::time::Duration;

use super::kinds::{KINDS, Kind};

/// Number of kinds at a time.
const TOGETHER: usize = 2;
/// Approximate length of a round.
const ROUND: Duration = Duration::from_secs(9);

/// Kinds that run at the same time, each with its own seed.
pub(super) struct Round(pub(super) Vec<(&'static Kind, u64)>);

/// The rounds of a campaign of `seconds`, and the length of each. Every kind runs once before any
/// runs again.
pub(super) fn rounds(seed: u64, seconds: u64, only: Option<&str>) -> (Vec<Round>, Duration) {
    let mut random = fastrand::Rng::with_seed(seed);
    let chosen: Vec<&'static Kind> =
        KINDS.iter().filter(|kind| only.is_none_or(|name| name == kind.name)).collect();
    let count = (seconds / ROUND.as_secs()).max(1);
    let mut deck = Vec::new();
    let rounds = (0..count).map(|_| {
        let mut round = Vec::new();
        while round.len() < TOGETHER.min(chosen.len()) {
            if deck.is_empty() {
                deck.clone_from(&chosen);
                random.shuffle(&mut deck);
            }
            round.extend(deck.pop().map(|kind| (kind, random.u64(..))));
        }
        Round(round)
    });
    (rounds.collect(), Duration::from_secs(seconds) / u32::try_from(count).unwrap_or(u32::MAX))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn names(seed: u64, seconds: u64, only: Option<&str>) -> Vec<(&'static str, u64)> {
        let (rounds, _) = rounds(seed, seconds, only);
        rounds.iter().flat_map(|round| round.0.iter().map(|(kind, seed)| (kind.name, *seed))).collect()
    }

    #[test]
    fn the_same_seed_gives_the_same_plan() {
        assert_eq!(names(7, 120, None), names(7, 120, None));
        assert_ne!(names(7, 120, None), names(8, 120, None));
    }

    #[test]
    fn two_minutes_suffice_for_every_kind() {
        let all: BTreeSet<_> = names(1, 120, None).into_iter().map(|(name, _)| name).collect();
        assert_eq!(all.len(), KINDS.len());
        assert!(names(1, 60, Some(KINDS[0].name)).iter().all(|(name, _)| *name == KINDS[0].name));
    }
}
