// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `loopengine stats`: statistics of devices, once or every second.

use std::io::{self, IsTerminal};
use std::path::Path;
use std::time::Duration;

use crate::error::{Error, Kind, Result};
use crate::instance::Selector;
use crate::instance::spec::DeviceStats;

use super::table::Table;
use super::{complete, daemon, detach, number, out, size};

const SECOND: Duration = Duration::from_secs(1);

/// Show statistics of devices.
///
/// Prints counts since the device was attached; with '--watch', rates of the last second. Latencies
/// are sampled from reads and writes since the device was attached, from arrival to completion in
/// the daemon. BATCH is the average number of requests per arrival. PUNTS are operations that the
/// kernel moves to a helper thread. FALLBACKS are requests whose buffer the daemon registers with a
/// separate command.
#[derive(Debug, clap::Args)]
pub(super) struct StatsArgs {
    /// Show only this device [default: all].
    #[arg(add = complete::devices())]
    device: Option<String>,

    /// Show only the devices of this instance.
    #[arg(short, long, value_name = "NAME", conflicts_with = "device", add = complete::instances())]
    instance: Option<String>,

    /// Print rates every second until interrupted.
    #[arg(short, long)]
    watch: bool,

    /// With '--watch': stop after N intervals.
    #[arg(long, value_name = "N", requires = "watch", value_parser = number::within(1_u64..))]
    count: Option<u64>,

    /// Print JSON; with '--watch', one line of counts per second. See loopengine-json(7).
    #[arg(long)]
    json: bool,
}

impl StatsArgs {
    pub(super) fn run(self, run_dir: &Path) -> Result<()> {
        let which = match (&self.device, &self.instance) {
            (Some(device), _) => detach::device(device.clone()),
            (None, Some(instance)) => Selector::Instance(instance.clone()),
            (None, None) => Selector::All,
        };
        if self.watch {
            return self.watch(run_dir, &which);
        }
        let stats = daemon::ask(run_dir, async |client| client.stats(&which).await)?;
        let shown = if self.json { out::json(&stats) } else { out::print(&totals(&stats).render()) };
        shown.map(drop)
    }

    fn watch(&self, run_dir: &Path, which: &Selector) -> Result<()> {
        let screen = io::stdout().is_terminal();
        daemon::ask(run_dir, async |client| {
            let mut before = client.stats(which).await?;
            let mut tick = tokio::time::interval(SECOND);
            tick.tick().await;
            for round in 0..self.count.unwrap_or(u64::MAX) {
                tick.tick().await;
                let now = client.stats(which).await?;
                if matches!(which, Selector::Device(_)) && now.is_empty() {
                    return Err(Error::new(Kind::NotFound, "the device is gone"));
                }
                let read = if self.json {
                    out::json_line(&now)?
                } else {
                    let text = rates(&before, &now).render();
                    out::print(&frame(&text, screen, round))?
                };
                if !read {
                    break;
                }
                before = now;
            }
            Ok(())
        })
    }
}

/// Redraws a terminal; elsewhere, prints the heading only once.
fn frame(text: &str, screen: bool, round: u64) -> String {
    if screen {
        return format!("\x1b[H\x1b[2J{text}");
    }
    match text.split_once('\n') {
        Some((_, rows)) if round > 0 => rows.to_owned(),
        _ => text.to_owned(),
    }
}

fn totals(stats: &[DeviceStats]) -> Table {
    let heads = [
        "DEVICE",
        "READS",
        "READ",
        "WRITES",
        "WRITTEN",
        "FLUSHES",
        "DISCARDS",
        "ERRORS",
        "P50",
        "P99",
        "P99.9",
        "BATCH",
        "PUNTS",
        "FALLBACKS",
        "INFLIGHT",
    ];
    let mut table = Table::new(&heads, RIGHT);
    for device in stats {
        table.row(vec![
            device.path.clone(),
            device.reads.to_string(),
            size::show(device.read_bytes),
            device.writes.to_string(),
            size::show(device.written_bytes),
            device.flushes.to_string(),
            device.discards.to_string(),
            device.errors.to_string(),
            time(device.latency.p50_ns),
            time(device.latency.p99_ns),
            time(device.latency.p999_ns),
            ratio(device.requests, device.batches),
            device.punts.to_string(),
            device.fallbacks.to_string(),
            device.in_flight.to_string(),
        ]);
    }
    table
}

fn rates(before: &[DeviceStats], now: &[DeviceStats]) -> Table {
    let heads = [
        "DEVICE",
        "READ/S",
        "READ",
        "WRITE/S",
        "WRITTEN",
        "FLUSH/S",
        "ERRORS",
        "P50",
        "P99",
        "P99.9",
        "BATCH",
        "PUNT/S",
        "FALLBACK/S",
        "INFLIGHT",
    ];
    let mut table = Table::new(&heads, RIGHT);
    for device in now {
        // A new device counts from zero. A device that was attached again has lower counts:
        // `saturating_sub` then yields zero.
        let old = before.iter().find(|old| old.path == device.path);
        let since = |count: fn(&DeviceStats) -> u64| count(device).saturating_sub(old.map_or(0, count));
        let seconds = match old.map(|old| device.at_ns.saturating_sub(old.at_ns)) {
            Some(ns) if ns > 0 => ns as f64 / 1e9,
            _ => 1.0,
        };
        let rate = |count| since(count) as f64 / seconds;
        table.row(vec![
            device.path.clone(),
            format!("{:.0}", rate(|d| d.reads)),
            size::show_f64(rate(|d| d.read_bytes)) + "/s",
            format!("{:.0}", rate(|d| d.writes)),
            size::show_f64(rate(|d| d.written_bytes)) + "/s",
            format!("{:.0}", rate(|d| d.flushes)),
            device.errors.to_string(),
            time(device.latency.p50_ns),
            time(device.latency.p99_ns),
            time(device.latency.p999_ns),
            ratio(since(|d| d.requests), since(|d| d.batches)),
            format!("{:.0}", rate(|d| d.punts)),
            format!("{:.0}", rate(|d| d.fallbacks)),
            device.in_flight.to_string(),
        ]);
    }
    table
}

/// All columns except the first are right-aligned numbers.
const RIGHT: &[bool] =
    &[false, true, true, true, true, true, true, true, true, true, true, true, true, true, true];

fn ratio(requests: u64, batches: u64) -> String {
    match batches {
        0 => "-".to_owned(),
        batches => format!("{:.1}", requests as f64 / batches as f64),
    }
}

/// A duration in human-readable form.
fn time(ns: u64) -> String {
    match ns {
        0 => "-".to_owned(),
        1..=999 => format!("{ns}ns"),
        1_000..=999_999 => format!("{:.1}us", ns as f64 / 1e3),
        1_000_000..=999_999_999 => format!("{:.1}ms", ns as f64 / 1e6),
        _ => format!("{:.1}s", ns as f64 / 1e9),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(at_ns: u64, reads: u64) -> DeviceStats {
        DeviceStats {
            path: "/run/loopengine/default/loop0".into(),
            image: "/a.img".into(),
            at_ns,
            reads,
            read_bytes: reads * 4096,
            requests: reads,
            batches: reads / 4,
            ..DeviceStats::default()
        }
    }

    #[test]
    fn computes_rates_from_two_readings() {
        let (before, now) = (device(1_000_000_000, 1000), device(3_000_000_000, 9000));
        let text = rates(&[before], &[now]).render();
        let row = text.lines().nth(1).unwrap();
        let cells: Vec<&str> = row.split_whitespace().collect();
        assert_eq!(&cells[1..3], ["4000", "15.6M/s"]);
        assert_eq!(cells[10], "4.0");
    }

    #[test]
    fn a_reattached_device_has_zero_rates() {
        let text = rates(&[device(2_000, 500)], &[device(1_000, 5)]).render();
        assert!(text.lines().nth(1).unwrap().split_whitespace().nth(1) == Some("0"), "{text}");
        rates(&[], &[device(5, 5)]).render();
    }

    #[test]
    fn prints_the_heading_once() {
        assert_eq!(frame("HEAD\nrow\n", false, 0), "HEAD\nrow\n");
        assert_eq!(frame("HEAD\nrow\n", false, 1), "row\n");
        assert!(frame("HEAD\nrow\n", true, 1).ends_with("HEAD\nrow\n"));
    }

    #[test]
    fn formats_durations() {
        assert_eq!(time(0), "-");
        assert_eq!(time(999), "999ns");
        assert_eq!(time(12_340), "12.3us");
        assert_eq!(time(1_500_000_000), "1.5s");
    }
}
