//! What the methods of the interface answer. Varlink wants named fields, so every answer is a
//! struct of one.

use serde::{Deserialize, Serialize};
use zlink::introspect::Type;

use crate::instance::spec::{DeviceInfo, DeviceStats, Features, InstanceInfo};

/// What this kernel grants.
#[derive(Clone, Debug, Serialize, Deserialize, Type)]
pub struct Granted {
    /// What it grants.
    pub features: Features,
}

/// One instance.
#[derive(Clone, Debug, Serialize, Deserialize, Type)]
pub struct Instance {
    /// The instance as it is now.
    pub instance: InstanceInfo,
}

/// All instances.
#[derive(Clone, Debug, Serialize, Deserialize, Type)]
pub struct Instances {
    /// By name.
    pub instances: Vec<InstanceInfo>,
}

/// One device.
#[derive(Clone, Debug, Serialize, Deserialize, Type)]
pub struct Device {
    /// The device as it is now.
    pub device: DeviceInfo,
}

/// Several devices.
#[derive(Clone, Debug, Serialize, Deserialize, Type)]
pub struct Devices {
    /// By instance and number.
    pub devices: Vec<DeviceInfo>,
}

/// What was detached.
#[derive(Clone, Debug, Serialize, Deserialize, Type)]
pub struct Detached {
    /// Paths that are gone.
    pub detached: Vec<String>,
}

/// Figures.
#[derive(Clone, Debug, Serialize, Deserialize, Type)]
pub struct Stats {
    /// By instance and number.
    pub stats: Vec<DeviceStats>,
}
