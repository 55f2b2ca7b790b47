// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `loopengine top`: what devices do, in intervals.
//!
//! `reading` asks the daemon, `rates` compares two readings, `view` makes a table, `screen` shows it
//! in a terminal and reads keys. This module prints tables and JSON elsewhere.

mod rates;
mod reading;
mod screen;
mod view;

use std::io::{self, IsTerminal};
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::time::{Instant, sleep_until};

#[cfg(test)]
pub(crate) use rates::{DeviceRates, Interval, Rates};
#[cfg(test)]
pub(crate) use screen::KEYS;

use super::{daemon, number, out};
use crate::error::{Error, Result};
use rates::Comparison;
use reading::Reading;
use view::{Column, View};

/// Show rates and latencies of devices, live.
///
/// Shows the rates of each interval: for root, of all devices of instances and of private pools; for
/// a plain user, of that user's pools. In a terminal it reads keys; h lists them. Elsewhere, or with
/// '--batch', it prints one table per interval. The first interval begins at the start of the command.
///
/// IO/S counts reads, writes, flushes (F/S) and discards (D/S). AVG_MS is the average latency as the
/// block layer measures it, with the time in its queue; over FUSE, that of one request in 32, in the
/// daemon. P99_MS is an estimate from a histogram of one request in 32, in the daemon. UTIL% is the
/// time with at least one request in flight; as in iostat(1), a device at 100 % may do more in
/// parallel. AQU-SZ is the average number of requests in flight, INFLIGHT the number at the end.
/// ERRORS counts failed requests in the interval. A new device has no rates in its first interval.
///
/// '-' marks values that are not measured: UTIL% and AQU-SZ over FUSE; P99_MS and ERRORS of devices over the
/// kernel's loop driver; P99_MS, ERRORS and STATE of devices of private pools, which the block layer
/// counts over either backend.
#[derive(Debug, clap::Args)]
pub(super) struct TopArgs {
    /// Length of an interval, at least 0.1.
    #[arg(short, long, value_name = "SECONDS", default_value = "2", value_parser = seconds)]
    delay: Duration,

    /// End after N intervals.
    #[arg(short = 'n', long, value_name = "N", value_parser = number::within(1_u64..))]
    iterations: Option<u64>,

    /// Sort by this column: numbers from the highest, text from the lowest.
    #[arg(short = 'o', long, value_name = "COLUMN", default_value = "io/s", ignore_case = true)]
    sort: Column,

    /// Reverse the order.
    #[arg(short, long)]
    reverse: bool,

    /// Show only devices with this text in name, user, image or state.
    #[arg(short, long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    filter: String,

    /// Hide devices without I/O in the interval.
    #[arg(short = 'i', long)]
    hide_idle: bool,

    /// Print tables, also to a terminal.
    #[arg(short, long)]
    batch: bool,

    /// Print JSON, one object per line and interval. See loopengine-json(7).
    #[arg(long)]
    json: bool,
}

impl TopArgs {
    pub(super) fn run(self, run_dir: &Path) -> Result<()> {
        let TopArgs { delay, iterations, sort, reverse, filter, hide_idle, .. } = self;
        let view = View { sort, reverse, filter, hide_idle };
        let source = Source { run_dir: run_dir.to_owned(), delay };
        let dumb = std::env::var_os("TERM").is_none_or(|term| term.is_empty() || term == "dumb");
        daemon::runtime()?.block_on(async {
            // A daemon that does not answer now is an error; later, it may come back.
            let mut comparison = Comparison::default();
            let first = comparison.next(Ok(Reading::take(run_dir).await?));
            if self.batch || self.json || dumb || !io::stdout().is_terminal() {
                print(&view, self.json, &source, comparison, iterations).await
            } else {
                screen::show(view, &source, comparison, first, iterations).await
            }
        })
    }
}

fn seconds(text: &str) -> std::result::Result<Duration, String> {
    let seconds = text.parse().ok().filter(|seconds| (0.1..=86_400.0).contains(seconds));
    seconds
        .map(Duration::from_secs_f64)
        .ok_or_else(|| "give a number of seconds from 0.1 to 86400".to_owned())
}

/// Where readings come from.
#[derive(Debug)]
struct Source {
    run_dir: PathBuf,
    delay: Duration,
}

impl Source {
    /// The reading that is due at `at`.
    async fn reading(&self, at: Instant) -> Result<Reading> {
        sleep_until(at).await;
        Reading::take(&self.run_dir).await
    }

    /// When the one after the reading of `at` is due. An interval that was missed is left out.
    fn after(&self, at: Instant) -> Instant {
        let (now, next) = (Instant::now(), at + self.delay);
        if next > now { next } else { now + self.delay }
    }
}

/// Prints intervals until the reader closes the pipe. Fails if the daemon did not answer in the last
/// interval.
async fn print(
    view: &View,
    json: bool,
    source: &Source,
    mut comparison: Comparison,
    iterations: Option<u64>,
) -> Result<()> {
    let mut at = Instant::now() + source.delay;
    let mut failure = None;
    for round in 0..iterations.unwrap_or(u64::MAX) {
        let reading = source.reading(at).await;
        at = source.after(at);
        failure = reading.as_ref().err().map(|error| Error::new(error.kind(), error.to_string()));
        let all = comparison.next(reading);
        let shown = view.select(&all);
        let read = if json {
            out::json_line(&shown)?
        } else {
            let mut lines = Vec::from(view.summary(&all, &shown));
            lines.extend(view.table(&shown));
            let gap = if round > 0 { "\n" } else { "" };
            out::print(&format!("{gap}{}\n", lines.join("\n")))?
        };
        if !read {
            return Ok(());
        }
    }
    failure.map_or(Ok(()), Err)
}
