// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Metrics as text: their names, units and labels.
//!
//! Knows what the daemon answers. Names and units follow the OpenMetrics specification; the crate
//! prometheus-client escapes labels, which contain paths of strangers.

use std::cell::RefCell;
use std::collections::HashMap;
use std::fmt::Error as FormatError;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{self, DescriptorEncoder, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::{Registry, Unit};

use super::Snapshot;
use crate::cli::run::user_name;
use crate::error::{Error, Kind, Result};
use crate::instance::spec::{DeviceInfo, DeviceState, DeviceStats, InstanceInfo};
use crate::private::{Limit, PoolInfo};

/// How metrics are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TextFormat {
    /// What Prometheus and its tools read since their beginning.
    Prometheus,
    /// What they read today, if they say so.
    OpenMetrics,
}

impl TextFormat {
    /// The best that a client with this header Accept reads.
    pub(super) fn accepted(accept: &str) -> TextFormat {
        match accept.contains("application/openmetrics-text") {
            true => TextFormat::OpenMetrics,
            false => TextFormat::Prometheus,
        }
    }

    /// Its type in HTTP.
    pub(super) fn content_type(self) -> &'static str {
        match self {
            TextFormat::Prometheus => "text/plain; version=0.0.4; charset=utf-8",
            TextFormat::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
        }
    }

    /// The metrics, with their types and help; none: the daemon does not answer.
    pub(super) fn render(self, snapshot: Option<&Snapshot>) -> Result<String> {
        let mut registry = Registry::with_prefix("loopengine");
        registry.register_collector(Box::new(Scrape(snapshot.map(Snapshot::metrics))));
        let mut text = String::new();
        let written = match self {
            TextFormat::Prometheus => encoding::prometheus_text::encode(&mut text, &registry),
            TextFormat::OpenMetrics => encoding::text::encode(&mut text, &registry),
        };
        written.map_err(|error| Error::new(Kind::Internal, format!("cannot write the metrics: {error}")))?;
        Ok(text)
    }
}

type Labels = Vec<(&'static str, String)>;

/// One metric, with a value for each set of labels.
#[derive(Debug)]
struct Metric {
    name: &'static str,
    help: &'static str,
    unit: Option<Unit>,
    values: Vec<(Labels, Value)>,
}

#[derive(Debug)]
enum Value {
    Counter(u64),
    Gauge(u64),
    Histogram { sum: f64, count: u64, buckets: Vec<(f64, u64)> },
}

/// The metrics; none: the daemon does not answer.
#[derive(Debug)]
struct Scrape(Option<Vec<Metric>>);

impl Collector for Scrape {
    fn encode(&self, mut encoder: DescriptorEncoder) -> std::result::Result<(), FormatError> {
        let up = Value::Gauge(self.0.is_some().into());
        one("up", "Whether the daemon answers", up).encode(&mut encoder)?;
        self.0.iter().flatten().try_for_each(|metric| metric.encode(&mut encoder))
    }
}

impl Metric {
    fn encode(&self, encoder: &mut DescriptorEncoder) -> std::result::Result<(), FormatError> {
        let Some((_, first)) = self.values.first() else { return Ok(()) };
        let kind = match first {
            Value::Counter(_) => MetricType::Counter,
            Value::Gauge(_) => MetricType::Gauge,
            Value::Histogram { .. } => MetricType::Histogram,
        };
        let mut encoder = encoder.encode_descriptor(self.name, self.help, self.unit.as_ref(), kind)?;
        for (labels, value) in &self.values {
            match labels.is_empty() {
                true => value.encode(&mut encoder)?,
                false => value.encode(&mut encoder.encode_family(labels)?)?,
            }
        }
        Ok(())
    }
}

impl Value {
    fn encode(&self, encoder: &mut MetricEncoder) -> std::result::Result<(), FormatError> {
        match self {
            Value::Counter(count) => encoder.encode_counter::<NoLabelSet, _, f64>(count, None),
            Value::Gauge(value) => encoder.encode_gauge(value),
            Value::Histogram { sum, count, buckets } => {
                encoder.encode_histogram::<NoLabelSet>(*sum, *count, buckets, None)
            }
        }
    }
}

fn one(name: &'static str, help: &'static str, value: Value) -> Metric {
    Metric { name, help, unit: None, values: vec![(Vec::new(), value)] }
}

impl Snapshot {
    fn metrics(&self) -> Vec<Metric> {
        let counters = &self.counters;
        let mut metrics = vec![
            Metric {
                name: "build_info",
                help: "Version of the program that answers",
                unit: None,
                values: vec![(vec![("version", env!("CARGO_PKG_VERSION").to_owned())], Value::Gauge(1))],
            },
            one("connections", "Connections that the daemon accepted", Value::Counter(counters.connections)),
            one(
                "intercepted_calls",
                "System calls answered for processes of private pools",
                Value::Counter(counters.intercepted_calls),
            ),
            one(
                "recovered_devices",
                "Devices of an earlier daemon that are served again",
                Value::Counter(counters.recovered_devices),
            ),
        ];
        self.of_instances(&mut metrics);
        self.of_devices(&mut metrics);
        self.of_pools(&mut metrics);
        metrics
    }

    fn of_instances(&self, metrics: &mut Vec<Metric>) {
        let mut gauge = |name, help, of: fn(&InstanceInfo) -> u32| {
            let labels = |name: &String| vec![("instance_name", name.clone())];
            let values = self.instances.iter();
            let values = values.map(|one| (labels(&one.name), Value::Gauge(of(one).into()))).collect();
            metrics.push(Metric { name, help, unit: None, values });
        };
        gauge("instance_devices", "Devices of an instance", |one| one.devices);
        gauge("instance_devices_limit", "Maximum number of devices of an instance", |one| one.max_devices);
        gauge("instance_workers", "Worker threads of an instance", |one| one.workers);
    }

    fn of_devices(&self, metrics: &mut Vec<Metric>) {
        let info = |device: &DeviceInfo| {
            let mut labels = device_labels(device);
            labels.extend([
                ("image", device.image.clone()),
                ("node", device.node.clone()),
                ("io_mode", device.io_mode.as_str().to_owned()),
            ]);
            (labels, Value::Gauge(1))
        };
        let state = |device: &DeviceInfo| {
            [("live", DeviceState::Live), ("degraded", DeviceState::Degraded), ("stuck", DeviceState::Stuck)]
                .map(|(name, state)| {
                    let mut labels = device_labels(device);
                    labels.push(("state", name.to_owned()));
                    (labels, Value::Gauge((device.state == state).into()))
                })
        };
        let size = |device: &DeviceInfo| (device_labels(device), Value::Gauge(device.size));
        let all = || self.devices.iter();
        metrics.extend([
            Metric { name: "device_info", help: "A device", unit: None, values: all().map(info).collect() },
            Metric {
                name: "device_state",
                help: "1 for the state that a device has",
                unit: None,
                values: all().flat_map(state).collect(),
            },
            Metric {
                name: "device_size",
                help: "Size of a device",
                unit: Some(Unit::Bytes),
                values: all().map(size).collect(),
            },
        ]);
        let mut each = |name, help, unit, value: fn(&DeviceStats) -> Value| {
            let values = self.stats.iter().filter_map(|stats| {
                let device = self.devices.iter().find(|device| device.path == stats.path)?;
                Some((device_labels(device), value(stats)))
            });
            metrics.push(Metric { name, help, unit, values: values.collect() });
        };
        let bytes = || Some(Unit::Bytes);
        each("device_reads", "Reads completed", None, |one| Value::Counter(one.reads));
        each("device_read", "Bytes read", bytes(), |one| Value::Counter(one.read_bytes));
        each("device_writes", "Writes completed", None, |one| Value::Counter(one.writes));
        each("device_written", "Bytes written", bytes(), |one| Value::Counter(one.written_bytes));
        each("device_flushes", "Flushes completed", None, |one| Value::Counter(one.flushes));
        each("device_syncs", "fdatasync calls for flushes", None, |one| Value::Counter(one.syncs));
        each("device_discards", "Discards and write-zeroes completed", None, |one| {
            Value::Counter(one.discards)
        });
        each("device_errors", "Requests that failed", None, |one| Value::Counter(one.errors));
        each("device_punts", "Operations on a thread of io_uring", None, |one| Value::Counter(one.punts));
        each("device_fallbacks", "Buffers that the daemon registered", None, |one| {
            Value::Counter(one.fallbacks)
        });
        each("device_requests", "Requests that arrived", None, |one| Value::Counter(one.requests));
        each("device_arrivals", "Wake-ups with at least one request", None, |one| {
            Value::Counter(one.batches)
        });
        each("device_held", "Requests that waited for limits", None, |one| Value::Counter(one.held));
        each("device_requests_in_flight", "Requests in flight", None, |one| Value::Gauge(one.in_flight));
        each(
            "device_sampled_latency",
            "Time in the daemon, of one read or write in 32",
            Some(Unit::Seconds),
            |one| {
                let latency = &one.latency;
                let end = (f64::INFINITY, latency.samples);
                let bounds =
                    latency.buckets.iter().map(|bucket| (bucket.up_to_ns as f64 / 1e9, bucket.samples));
                // The encoder wants what is in each bucket, and sums up itself.
                let mut before = 0;
                let own = |(bound, up_to): (f64, u64)| (bound, up_to - std::mem::replace(&mut before, up_to));
                Value::Histogram {
                    sum: latency.sum_ns as f64 / 1e9,
                    count: latency.samples,
                    buckets: bounds.chain([end]).map(own).collect(),
                }
            },
        );
    }

    fn of_pools(&self, metrics: &mut Vec<Metric>) {
        let users = Users::default();
        let mut gauge = |name, help, of: fn(&PoolInfo) -> u32| {
            let values = self.pools.iter().map(|pool| {
                let labels = vec![
                    ("pool", pool.name.clone()),
                    ("user", users.name(pool.uid)),
                    ("backend", pool.backend.clone().unwrap_or_default()),
                    ("container", pool.container.clone().unwrap_or_default()),
                ];
                (labels, Value::Gauge(of(pool).into()))
            });
            metrics.push(Metric { name, help, unit: None, values: values.collect() });
        };
        gauge("pool_devices", "Devices of a private pool", |pool| pool.devices);
        gauge("pool_bound_devices", "Devices of a private pool that have a file", |pool| pool.bound);
        gauge("pool_devices_limit", "Maximum number of devices of a private pool", |pool| pool.max);
        let mut of_users = |name, help, of: fn(&Limit) -> Option<u32>| {
            let values = self.limits.iter().filter_map(|limit| {
                let uid = limit.uid?;
                Some((vec![("user", users.name(uid))], Value::Gauge(of(limit)?.into())))
            });
            metrics.push(Metric { name, help, unit: None, values: values.collect() });
        };
        of_users("user_devices", "Private devices that count for a user", |limit| Some(limit.devices));
        of_users("user_devices_limit", "Maximum number of private devices of a user", |limit| {
            limit.max_devices
        });
    }
}

/// Names of users, looked up once.
#[derive(Default)]
struct Users(RefCell<HashMap<u32, String>>);

impl Users {
    fn name(&self, uid: u32) -> String {
        let look_up = || user_name(uid).unwrap_or_else(|| uid.to_string());
        self.0.borrow_mut().entry(uid).or_insert_with(look_up).clone()
    }
}

fn device_labels(device: &DeviceInfo) -> Labels {
    // Prometheus sets a label `instance` itself.
    vec![("instance_name", device.instance.clone()), ("device", format!("loop{}", device.number))]
}
