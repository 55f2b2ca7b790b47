// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The replies of the interface. Varlink requires named fields, so every reply is a struct of one.

use serde::{Deserialize, Serialize};
use zlink::introspect::Type;

use crate::counters::DaemonCounters;
use crate::instance::activity::DeviceActivity;
use crate::instance::spec::{DeviceInfo, DeviceStats, Features, InstanceInfo};

/// The features of this kernel.
#[derive(Clone, Debug, Serialize, Deserialize, Type)]
pub struct FeaturesReply {
    /// The features.
    pub features: Features,
}

/// One instance.
#[derive(Clone, Debug, Serialize, Deserialize, Type)]
pub struct InstanceReply {
    /// The present state of the instance.
    pub instance: InstanceInfo,
}

/// All instances.
#[derive(Clone, Debug, Serialize, Deserialize, Type)]
pub struct InstancesReply {
    /// By name.
    pub instances: Vec<InstanceInfo>,
}

/// One device.
#[derive(Clone, Debug, Serialize, Deserialize, Type)]
pub struct DeviceReply {
    /// The present state of the device.
    pub device: DeviceInfo,
}

/// Several devices.
#[derive(Clone, Debug, Serialize, Deserialize, Type)]
pub struct DevicesReply {
    /// By instance and number.
    pub devices: Vec<DeviceInfo>,
}

/// The detached devices.
#[derive(Clone, Debug, Serialize, Deserialize, Type)]
pub struct DetachReply {
    /// Their paths.
    pub detached: Vec<String>,
}

/// Statistics.
#[derive(Clone, Debug, Serialize, Deserialize, Type)]
pub struct StatsReply {
    /// By instance and number.
    pub stats: Vec<DeviceStats>,
}

/// What devices do.
#[derive(Clone, Debug, Serialize, Deserialize, Type)]
pub struct ActivityReply {
    /// By instance or pool, and number.
    pub devices: Vec<DeviceActivity>,
}

/// Counts of the daemon.
#[derive(Clone, Debug, Serialize, Deserialize, Type)]
pub struct CountersReply {
    /// Since its start.
    pub counters: DaemonCounters,
}
