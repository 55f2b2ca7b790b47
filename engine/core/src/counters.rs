// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What this process has done since its start, for monitoring.
//!
//! One set for the process: connections and calls come in on threads that share nothing else.

use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};
use zlink::introspect::CustomType;

/// A number that only grows.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Counts one.
    pub fn count(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

/// Connections that the daemon accepted, on all sockets.
pub static CONNECTIONS: Counter = Counter(AtomicU64::new(0));
/// System calls that the daemon answered for processes of private pools.
pub static INTERCEPTED_CALLS: Counter = Counter(AtomicU64::new(0));
/// Devices of an earlier daemon that this one serves again.
pub static RECOVERED_DEVICES: Counter = Counter(AtomicU64::new(0));

/// Counts of the daemon since its start.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, CustomType)]
#[serde(rename_all = "camelCase")]
#[zlink(rename_all = "camelCase")]
pub struct DaemonCounters {
    /// Connections that it accepted, on all its sockets.
    pub connections: u64,
    /// System calls that it answered for processes of private pools.
    pub intercepted_calls: u64,
    /// Devices of an earlier daemon that it serves again.
    pub recovered_devices: u64,
}

impl DaemonCounters {
    /// The present counts of this process.
    pub fn now() -> DaemonCounters {
        let read = |counter: &Counter| counter.0.load(Ordering::Relaxed);
        DaemonCounters {
            connections: read(&CONNECTIONS),
            intercepted_calls: read(&INTERCEPTED_CALLS),
            recovered_devices: read(&RECOVERED_DEVICES),
        }
    }
}
