// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Progress of a run and the time left: a bar on a terminal, lines elsewhere.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

/// Progress of a run.
pub struct Progress {
    bar: Option<ProgressBar>,
    start: Instant,
    /// Steps of an earlier run, which took no time of this one.
    before: usize,
    done: usize,
    of: usize,
}

impl Progress {
    /// A run of `of` steps, of which an earlier run did `before`.
    pub fn new(of: usize, before: usize) -> Progress {
        let bar =
            std::io::stderr().is_terminal().then(|| ProgressBar::new(of as u64).with_position(before as u64));
        if let Some(bar) = &bar {
            let style = ProgressStyle::with_template("{bar:30} {pos}/{len}  {msg}");
            bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        }
        let progress = Progress { bar, start: Instant::now(), before, done: before, of };
        if before > 0 {
            progress.say(&format!("{before} of {of} were measured before"));
        }
        progress
    }

    /// Shows the current step.
    pub fn doing(&self, what: &str) {
        if let Some(bar) = &self.bar {
            bar.set_message(format!("{what}{}", self.left()));
        }
    }

    /// Counts a finished step.
    pub fn step(&mut self, what: &str) {
        self.done += 1;
        match &self.bar {
            Some(bar) => bar.inc(1),
            None => {
                let spent = self.start.elapsed().as_secs();
                println!("{:>4} of {}  {what}  ({spent} s{})", self.done, self.of, self.left());
            }
        }
    }

    /// Prints a line that stays on the screen.
    pub fn say(&self, line: &str) {
        match &self.bar {
            Some(bar) => bar.println(line),
            None => println!("{line}"),
        }
    }

    fn left(&self) -> String {
        let left = left(self.start.elapsed(), self.done - self.before, self.of.saturating_sub(self.done));
        left.map(|left| format!(", about {} left", rough(left))).unwrap_or_default()
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// Estimated time of the remaining steps, if they take as long as the `done` ones.
fn left(spent: Duration, done: usize, left: usize) -> Option<Duration> {
    (done > 0 && left > 0).then(|| spent.mul_f64(left as f64 / done as f64))
}

fn rough(time: Duration) -> String {
    match time.as_secs() {
        seconds @ 0..120 => format!("{} s", seconds.max(1)),
        seconds @ 120..7200 => format!("{} min", seconds.div_ceil(60)),
        seconds => format!("{} h", seconds.div_ceil(3600)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_done_before_do_not_shorten_the_time_left() {
        let start = Instant::now().checked_sub(Duration::from_secs(60)).unwrap();
        let progress = Progress { bar: None, start, before: 90, done: 92, of: 100 };
        assert_eq!(progress.left(), ", about 4 min left");
        assert_eq!(left(Duration::from_secs(60), 0, 10), None);
        assert_eq!(left(Duration::from_secs(60), 10, 0), None);
    }

    #[test]
    fn times_are_rough() {
        let seconds = [0, 119, 121, 7200].map(Duration::from_secs);
        assert_eq!(seconds.map(rough), ["1 s", "119 s", "3 min", "2 h"]);
    }
}
