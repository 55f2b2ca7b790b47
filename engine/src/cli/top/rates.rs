// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Rates of devices between two readings.
//!
//! A device has rates only if both readings have comparable counts: not if it is new, or if a count
//! is lower than before, because then another device has its name.

use std::collections::HashMap;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::Serialize;
use zlink::introspect::CustomType;

use super::reading::Reading;
use crate::cli::run::user_name;
use crate::error::Error;
use crate::instance::activity::{BlockTimes, DeviceActivity};
use crate::instance::spec::{DeviceState, DeviceStats, LatencySummary};

/// One interval: what 'loopengine top' shows.
#[derive(Clone, Debug, Default, PartialEq, Serialize, CustomType)]
#[serde(rename_all = "camelCase")]
#[zlink(rename_all = "camelCase")]
pub(crate) struct Interval {
    /// Its end, in milliseconds since 1970.
    pub(crate) at_unix_ms: u64,
    /// Its length in seconds; none: there is no earlier reading to compare with.
    pub(crate) seconds: Option<f64>,
    /// Why the daemon did not answer; none: it did.
    pub(crate) problem: Option<String>,
    /// Sums over the devices below, without latencies and utilisation.
    pub(crate) total: Rates,
    /// Devices that the user can see and that the options select.
    pub(crate) devices: Vec<DeviceRates>,
}

/// A device in an interval.
#[derive(Clone, Debug, Default, PartialEq, Serialize, CustomType)]
#[serde(rename_all = "camelCase")]
#[zlink(rename_all = "camelCase")]
pub(crate) struct DeviceRates {
    /// Its instance or pool, and its number: OWNER/loopN.
    pub(crate) name: String,
    /// N of loopN.
    pub(crate) number: u32,
    /// True for a device of a private pool.
    pub(crate) private: bool,
    /// User id that it belongs to.
    pub(crate) uid: u32,
    /// Name of that user, or the number.
    pub(crate) user: String,
    /// Name of its disk in the kernel; empty: it is a FUSE file.
    pub(crate) disk: String,
    /// Path of its image; empty: not known.
    pub(crate) image: String,
    /// State; none: not known, for devices of private pools.
    pub(crate) state: Option<DeviceState>,
    /// Rates; none: the device is new, or did not answer in both readings.
    pub(crate) rates: Option<Rates>,
}

/// Averages over an interval.
#[derive(Clone, Debug, Default, PartialEq, Serialize, CustomType)]
#[serde(rename_all = "camelCase")]
#[zlink(rename_all = "camelCase")]
pub(crate) struct Rates {
    /// Reads completed.
    pub(crate) reads_per_second: f64,
    /// Bytes read.
    pub(crate) read_bytes_per_second: f64,
    /// Writes completed.
    pub(crate) writes_per_second: f64,
    /// Bytes written.
    pub(crate) write_bytes_per_second: f64,
    /// Flushes completed.
    pub(crate) flushes_per_second: f64,
    /// Discards and write-zeroes completed.
    pub(crate) discards_per_second: f64,
    /// Average latency of reads and writes, in nanoseconds: of all, as the block layer measures it, or
    /// of one in 32 over FUSE. None: nothing was measured.
    pub(crate) average_ns: Option<u64>,
    /// 99 % of reads and writes were faster, in nanoseconds: an estimate from the histogram of one in
    /// 32, from arrival to completion in the daemon. None: the daemon does not serve the device, or
    /// nothing was measured.
    pub(crate) p99_ns: Option<u64>,
    /// Average number of requests in flight; none: over FUSE.
    pub(crate) queue_depth: Option<f64>,
    /// Share of the time with at least one request in flight; none: over FUSE.
    pub(crate) utilisation_percent: Option<f64>,
    /// Requests in flight at the end of the interval.
    pub(crate) in_flight: u64,
    /// Failed requests; none: not counted, if the daemon does not serve the device.
    pub(crate) errors: Option<u64>,
}

impl Rates {
    /// Operations of all kinds.
    pub(super) fn operations(&self) -> f64 {
        self.reads_per_second + self.writes_per_second + self.flushes_per_second + self.discards_per_second
    }

    fn between(before: &DeviceActivity, now: &DeviceActivity) -> Option<Rates> {
        let (old, new) = (before.stats.as_ref()?, now.stats.as_ref()?);
        let ns = new.at_ns.checked_sub(old.at_ns).filter(|ns| *ns > 0 && before.disk == now.disk)?;
        let count = |count: fn(&DeviceStats) -> u64| count(new).checked_sub(count(old));
        let rate = |counted| Some(count(counted)? as f64 * 1e9 / ns as f64);
        let times = before.times.as_ref().zip(now.times.as_ref());
        let share = |sum: fn(&BlockTimes) -> u64| {
            let (old, new) = times?;
            Some(sum(new).checked_sub(sum(old))? as f64 * 1e6 / ns as f64)
        };
        Some(Rates {
            reads_per_second: rate(|stats| stats.reads)?,
            read_bytes_per_second: rate(|stats| stats.read_bytes)?,
            writes_per_second: rate(|stats| stats.writes)?,
            write_bytes_per_second: rate(|stats| stats.written_bytes)?,
            flushes_per_second: rate(|stats| stats.flushes)?,
            discards_per_second: rate(|stats| stats.discards)?,
            average_ns: match times {
                Some((old, new)) => average_of_block_layer(old, new),
                None => average_of_samples(&old.latency, &new.latency),
            },
            p99_ns: p99(&old.latency, &new.latency),
            queue_depth: share(|times| times.queued_ms),
            // The block layer counts in ticks of its clock, which may be ahead.
            utilisation_percent: share(|times| times.busy_ms).map(|share| (share * 100.0).min(100.0)),
            in_flight: new.in_flight,
            errors: if now.has_workers { Some(count(|stats| stats.errors)?) } else { None },
        })
    }

    fn sum<'a>(all: impl Iterator<Item = &'a Rates>) -> Rates {
        all.fold(Rates::default(), |sum, one| Rates {
            reads_per_second: sum.reads_per_second + one.reads_per_second,
            read_bytes_per_second: sum.read_bytes_per_second + one.read_bytes_per_second,
            writes_per_second: sum.writes_per_second + one.writes_per_second,
            write_bytes_per_second: sum.write_bytes_per_second + one.write_bytes_per_second,
            flushes_per_second: sum.flushes_per_second + one.flushes_per_second,
            discards_per_second: sum.discards_per_second + one.discards_per_second,
            in_flight: sum.in_flight.saturating_add(one.in_flight),
            errors: sum.errors.into_iter().chain(one.errors).reduce(u64::saturating_add),
            ..sum
        })
    }
}

fn average_of_block_layer(old: &BlockTimes, new: &BlockTimes) -> Option<u64> {
    let ms = new.transfer_ms.checked_sub(old.transfer_ms)?;
    ms.saturating_mul(1_000_000).checked_div(new.transfers.checked_sub(old.transfers)?)
}

fn average_of_samples(old: &LatencySummary, new: &LatencySummary) -> Option<u64> {
    new.sum_ns.checked_sub(old.sum_ns)?.checked_div(new.samples.checked_sub(old.samples)?)
}

/// Assumes that latencies are evenly spread in a bucket of the histogram.
fn p99(old: &LatencySummary, new: &LatencySummary) -> Option<u64> {
    let samples = new.samples.checked_sub(old.samples).filter(|samples| *samples > 0)?;
    let rank = samples as f64 * 0.99;
    let (mut low_ns, mut below) = (0, 0);
    for (index, bucket) in new.buckets.iter().enumerate() {
        // A device that has no samples has no buckets.
        let before = old.buckets.get(index).map_or(0, |bucket| bucket.samples);
        let up_to = bucket.samples.checked_sub(before)?;
        if up_to as f64 >= rank {
            let share = (rank - below as f64) / up_to.saturating_sub(below).max(1) as f64;
            return Some(low_ns + ((bucket.up_to_ns - low_ns) as f64 * share.clamp(0.0, 1.0)) as u64);
        }
        (low_ns, below) = (bucket.up_to_ns, up_to);
    }
    // Slower than the last bound.
    new.buckets.last().map(|bucket| bucket.up_to_ns)
}

/// Compares each reading with the one before.
#[derive(Debug, Default)]
pub(super) struct Comparison {
    before: Reading,
    users: HashMap<u32, String>,
}

impl Comparison {
    /// The interval that ends now. After a failure, the next reading has nothing to compare with.
    pub(super) fn next(&mut self, reading: Result<Reading, Error>) -> Interval {
        let (now, problem) = match reading {
            Ok(now) => (now, None),
            Err(error) => (Reading::default(), Some(error.to_string())),
        };
        let mut devices = Vec::new();
        for (private, before, now) in
            [(false, &self.before.devices, &now.devices), (true, &self.before.private, &now.private)]
        {
            let before: HashMap<_, _> = before.iter().map(|one| ((&one.owner, one.number), one)).collect();
            for one in now {
                let user = self.users.entry(one.uid);
                let user = user.or_insert_with(|| user_name(one.uid).unwrap_or_else(|| one.uid.to_string()));
                let rates =
                    before.get(&(&one.owner, one.number)).and_then(|before| Rates::between(before, one));
                devices.push(DeviceRates::new(one, private, user.clone(), rates));
            }
        }
        let length = now.at.zip(self.before.at).and_then(|(now, before)| now.duration_since(before).ok());
        let interval = Interval {
            at_unix_ms: unix_ms(now.at.unwrap_or_else(SystemTime::now)),
            seconds: length.as_ref().map(Duration::as_secs_f64),
            problem,
            total: Rates::default(),
            devices,
        };
        self.before = now;
        interval
    }
}

impl Interval {
    /// Sums up what is left of the devices.
    pub(super) fn sum_up(&mut self) {
        self.total = Rates::sum(self.devices.iter().filter_map(|device| device.rates.as_ref()));
    }
}

impl DeviceRates {
    fn new(activity: &DeviceActivity, private: bool, user: String, rates: Option<Rates>) -> DeviceRates {
        DeviceRates {
            name: format!("{}/loop{}", activity.owner, activity.number),
            number: activity.number,
            private,
            uid: activity.uid,
            user,
            disk: activity.disk.clone(),
            image: activity.stats.as_ref().map(|stats| stats.image.clone()).unwrap_or_default(),
            state: activity.state,
            rates,
        }
    }

    /// Whether it did nothing and is healthy. One without rates may have done something.
    pub(super) fn is_idle(&self) -> bool {
        let healthy = self.state.is_none_or(|state| state == DeviceState::Live);
        let quiet = |rates: &Rates| {
            rates.operations() == 0.0 && rates.in_flight == 0 && rates.errors.unwrap_or(0) == 0
        };
        healthy && self.rates.as_ref().is_some_and(quiet)
    }
}

fn unix_ms(at: SystemTime) -> u64 {
    at.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;
    use crate::instance::spec::LatencyBucket;

    const SECOND: u64 = 1_000_000_000;

    /// loopN that has done `reads` reads of 4 KiB up to a second.
    fn device(number: u32, second: u64, reads: u64) -> DeviceActivity {
        let latency = LatencySummary {
            samples: reads,
            sum_ns: reads * 30_000,
            buckets: [(10_000, reads / 2), (50_000, reads)]
                .map(|(up_to_ns, samples)| LatencyBucket { up_to_ns, samples })
                .into(),
            ..LatencySummary::default()
        };
        let stats = DeviceStats {
            at_ns: second * SECOND,
            reads,
            read_bytes: reads * 4096,
            errors: reads / 100,
            in_flight: 2,
            latency,
            ..DeviceStats::default()
        };
        let has_workers = true;
        DeviceActivity {
            owner: "a".into(),
            number,
            has_workers,
            stats: Some(stats),
            ..DeviceActivity::default()
        }
    }

    fn reading(second: u64, devices: Vec<DeviceActivity>) -> Result<Reading, Error> {
        let at = Some(UNIX_EPOCH + Duration::from_secs(second));
        Ok(Reading { at, devices, private: Vec::new() })
    }

    #[test]
    fn computes_rates_from_two_readings() {
        let rates = Rates::between(&device(0, 1, 1000), &device(0, 3, 9000)).unwrap();
        assert_eq!((rates.reads_per_second, rates.read_bytes_per_second), (4000.0, 4000.0 * 4096.0));
        assert_eq!((rates.writes_per_second, rates.operations()), (0.0, 4000.0));
        assert_eq!((rates.average_ns, rates.errors, rates.in_flight), (Some(30_000), Some(80), 2));
        // 98 % of the way from half of the samples to all.
        assert_eq!(rates.p99_ns, Some(49_200));
        assert_eq!((rates.utilisation_percent, rates.queue_depth), (None, None));
    }

    #[test]
    fn takes_times_from_the_block_layer() {
        let with = |second, transfers, busy_ms, queued_ms| {
            let times = Some(BlockTimes { transfers, transfer_ms: transfers * 3, busy_ms, queued_ms });
            DeviceActivity { times, has_workers: false, ..device(0, second, 0) }
        };
        let rates = Rates::between(&with(0, 10, 100, 200), &with(2, 30, 1100, 8200)).unwrap();
        assert_eq!((rates.average_ns, rates.p99_ns, rates.errors), (Some(3_000_000), None, None));
        assert_eq!((rates.utilisation_percent, rates.queue_depth), (Some(50.0), Some(4.0)));
        let rates = Rates::between(&with(0, 10, 0, 0), &with(1, 10, 1010, 0)).unwrap();
        assert_eq!((rates.average_ns, rates.utilisation_percent), (None, Some(100.0)));
    }

    #[test]
    fn has_no_rates_without_comparable_counts() {
        let (old, new) = (device(0, 1, 1000), device(0, 2, 2000));
        assert_eq!(Rates::between(&old, &DeviceActivity { stats: None, ..new.clone() }), None);
        assert_eq!(Rates::between(&DeviceActivity { stats: None, ..old.clone() }, &new), None);
        assert_eq!(Rates::between(&old, &device(0, 2, 999)), None, "attached again");
        assert_eq!(Rates::between(&old, &device(0, 1, 2000)), None, "no time has passed");
        assert_eq!(Rates::between(&old, &device(0, 0, 2000)), None, "the clock went back");
        assert_eq!(Rates::between(&old, &DeviceActivity { disk: "ublkb1".into(), ..new.clone() }), None);
        assert!(Rates::between(&old, &new).is_some());
    }

    #[test]
    fn estimates_percentiles_without_earlier_and_beyond_all_buckets() {
        let old = DeviceActivity { stats: Some(DeviceStats::default()), ..device(0, 0, 0) };
        assert_eq!(Rates::between(&old, &device(0, 1, 100)).unwrap().p99_ns, Some(49_200));
        let mut slow = device(0, 1, 100);
        slow.stats.as_mut().unwrap().latency.buckets[1].samples = 98;
        assert_eq!(Rates::between(&old, &slow).unwrap().p99_ns, Some(50_000));
        assert_eq!(Rates::between(&old, &device(0, 1, 0)).unwrap().p99_ns, None, "no samples");
    }

    #[test]
    fn devices_come_and_go() {
        let mut comparison = Comparison::default();
        let first = comparison.next(reading(1, vec![device(0, 1, 0), device(1, 1, 0)]));
        assert!(first.seconds.is_none() && first.devices.iter().all(|device| device.rates.is_none()));
        let mut second = comparison.next(reading(3, vec![device(1, 3, 100), device(2, 3, 5000)]));
        let names = |interval: &Interval| -> Vec<_> {
            let devices = interval.devices.iter();
            devices.map(|device| (device.name.clone(), device.rates.is_some())).collect()
        };
        assert_eq!(names(&second), [("a/loop1".to_owned(), true), ("a/loop2".to_owned(), false)]);
        second.sum_up();
        assert_eq!((second.seconds, second.total.reads_per_second), (Some(2.0), 50.0));
        assert_eq!((second.total.errors, second.total.in_flight), (Some(1), 2));
        // A pool of the same name has other devices.
        let pool = Reading { private: vec![device(1, 4, 200)], ..reading(4, Vec::new()).unwrap() };
        assert_eq!(names(&comparison.next(Ok(pool))), [("a/loop1".to_owned(), false)]);
    }

    #[test]
    fn a_failure_ends_the_comparison() {
        let mut comparison = Comparison::default();
        comparison.next(reading(1, vec![device(0, 1, 0)]));
        let failed = comparison.next(Err(Error::new(Kind::Unavailable, "it is gone")));
        assert_eq!((failed.problem.as_deref(), failed.devices.len()), (Some("it is gone"), 0));
        let back = comparison.next(reading(3, vec![device(0, 3, 100)]));
        assert!(back.problem.is_none() && back.devices[0].rates.is_none());
        assert!(comparison.next(reading(4, vec![device(0, 4, 200)])).devices[0].rates.is_some());
    }

    #[test]
    fn only_a_healthy_device_that_did_nothing_is_idle() {
        let idle = DeviceRates { rates: Some(Rates::default()), ..DeviceRates::default() };
        assert!(idle.is_idle());
        assert!(!DeviceRates { state: Some(DeviceState::Stuck), ..idle.clone() }.is_idle());
        assert!(!DeviceRates { rates: None, ..idle.clone() }.is_idle());
        for rates in [
            Rates { flushes_per_second: 0.1, ..Rates::default() },
            Rates { in_flight: 1, ..Rates::default() },
            Rates { errors: Some(1), ..Rates::default() },
        ] {
            assert!(!DeviceRates { rates: Some(rates), ..idle.clone() }.is_idle());
        }
    }
}
