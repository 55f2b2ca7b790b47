// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Colour, dash and marker of each target, the same in every plot of a result.
//!
//! Colours follow Okabe and Ito, which colour-blind readers can distinguish; some are darker, to be
//! visible on white and on black. loopengine has cool colours, other targets warm ones, the
//! reference the text colour, and the raw file grey. Further targets get dashes.

use crate::outcome::Outcome;

const OURS: [&str; 6] = ["#0072b2", "#43a5e0", "#009e73", "#6673d9", "#00a3ad", "#5e9e3a"];
const OTHERS: [&str; 6] = ["#d55e00", "#cc79a7", "#d68f00", "#948b00", "#c0453f", "#a0765a"];
const DASHES: [&str; 3] = ["", "6 3", "2 3"];

/// The file itself, without any driver.
pub(super) const RAW: &str = "raw file";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Style {
    pub(super) colour: &'static str,
    /// `stroke-dasharray`; empty for a solid line.
    pub(super) dash: &'static str,
    /// Index of the marker's shape.
    pub(super) marker: usize,
}

pub(super) struct Palette(Vec<(String, Style)>);

/// Whether loopengine serves this target.
pub(super) fn ours(target: &str) -> bool {
    target.contains("loopengine")
}

impl Palette {
    pub(super) fn new(outcome: &Outcome) -> Palette {
        let (mut cool, mut warm) = (0, 0);
        let mut style = |name: &str, index: usize| {
            let (colours, taken): (&[&'static str], &mut usize) = match name {
                name if outcome.jobs.iter().any(|job| job.reference == name) => {
                    return Style { colour: "currentColor", dash: "", marker: 0 };
                }
                RAW => return Style { colour: "#8a8f98", dash: "", marker: 1 },
                name if ours(name) => (&OURS, &mut cool),
                _ => (&OTHERS, &mut warm),
            };
            let number = *taken;
            *taken += 1;
            let dash = DASHES[(number / colours.len()).min(DASHES.len() - 1)];
            Style { colour: colours[number % colours.len()], dash, marker: index }
        };
        let names = outcome.targets.iter().map(|target| &target.name).enumerate();
        Palette(names.map(|(index, name)| (name.clone(), style(name, index))).collect())
    }

    pub(super) fn of(&self, target: &str) -> Style {
        let plain = Style { colour: "#8a8f98", dash: "", marker: 0 };
        self.0.iter().find(|(name, _)| name == target).map_or(plain, |(_, style)| *style)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::render::synthetic;

    #[test]
    fn every_measured_target_has_a_colour_of_its_own() {
        let outcome = synthetic::outcome(1);
        let palette = Palette::new(&outcome);
        let mut colours: Vec<&str> = Vec::new();
        for target in outcome.targets.iter().filter(|target| !target.name.starts_with("ext4")) {
            let colour = palette.of(&target.name).colour;
            assert!(!colours.contains(&colour), "{}", target.name);
            colours.push(colour);
        }
    }
}
