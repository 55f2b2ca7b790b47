// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Descriptions of instances, devices and their statistics, for every interface: the engine, the
//! control socket, `--json`.
//!
//! Pure data. Adding an optional field is compatible; renaming or removing one is not.

use serde::{Deserialize, Serialize};
use zlink::introspect::CustomType;

pub use crate::frontend::{BackendKind, IoMode};
pub use crate::worker::IoLimits;

/// Name of the instance that always exists.
pub const DEFAULT_INSTANCE: &str = "default";

/// The limits of an instance.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, CustomType)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[zlink(rename_all = "camelCase")]
pub struct InstanceSpec {
    /// 1 to 64 of `a-z A-Z 0-9 . _ -`, not starting with a dot or a dash.
    pub name: String,
    /// Maximum number of devices.
    pub max_devices: u32,
    /// Worker threads; 0: one for each CPU it may use, at least two.
    pub workers: u32,
    /// CPUs that the workers may run on, as in "0-3,8"; none: all.
    pub cpus: Option<String>,
    /// Backend of its disks; none: the default of the daemon.
    #[serde(default)]
    pub backend: Option<BackendKind>,
}

/// The present state of an instance.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, CustomType)]
#[serde(rename_all = "camelCase")]
#[zlink(rename_all = "camelCase")]
pub struct InstanceInfo {
    /// Its name.
    pub name: String,
    /// Maximum number of devices.
    pub max_devices: u32,
    /// Devices now.
    pub devices: u32,
    /// Backend of its disks.
    pub backend: BackendKind,
    /// Worker threads; 0: the kernel serves its devices.
    pub workers: u32,
    /// CPUs that the workers may run on; none: all.
    pub cpus: Option<String>,
    /// Directory of its device names.
    pub directory: String,
}

/// How to attach an image.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, CustomType)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[zlink(rename_all = "camelCase")]
pub struct AttachSpec {
    /// Instance that gets the device.
    pub instance: String,
    /// The image's path as the caller knows it: shown to users, and used to recover the device
    /// after a restart of the daemon. The file itself is passed as a file descriptor.
    pub path: String,
    /// Device number; none: the lowest free one.
    pub number: Option<u32>,
    /// Refuse writes.
    pub read_only: bool,
    /// First byte of the image that the device maps.
    pub offset: u64,
    /// Maximum size in bytes; 0: to the end of the image.
    pub size_limit: u64,
    /// Logical block size, 512 to 4096, with the backend loop to 65536; 0: the smallest that the
    /// image allows.
    pub block_size: u32,
    /// Use the page cache instead of direct I/O.
    pub buffered: bool,
    /// Queues; 0: one for each worker of the instance.
    pub queues: u32,
    /// Queue depth: requests in flight in each queue; 0: 128.
    pub depth: u32,
    /// I/O mode; none: the best that the kernel supports.
    pub io_mode: Option<IoMode>,
    /// Have the kernel scan for partitions; their names are beside the device's, as loop0p1.
    #[serde(default)]
    pub partscan: bool,
    /// Make every write durable before it completes; the device has no volatile cache. The image
    /// must be written completely.
    #[serde(default)]
    pub durable: bool,
    /// Maximum number of requests per second; 0: no limit. Flushes do not count.
    #[serde(default)]
    pub iops: u64,
    /// Maximum number of bytes read and written per second; 0: no limit.
    #[serde(default)]
    pub bytes_per_second: u64,
}

impl AttachSpec {
    /// The limits of its I/O.
    pub fn io_limits(&self) -> IoLimits {
        IoLimits { iops: self.iops, bytes: self.bytes_per_second }
    }
}

/// New limits of a device's I/O per second; none: unchanged, 0: no limit.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct IoLimitsSpec {
    /// The device.
    pub device: String,
    /// Requests, without flushes.
    pub iops: Option<u64>,
    /// Bytes read and written.
    pub bytes_per_second: Option<u64>,
}

/// How a device is resized. It shrinks only on request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ResizeSpec {
    /// The device.
    pub device: String,
    /// New size of the device and its image in bytes; none: the image's present size.
    pub size: Option<u64>,
    /// It may shrink.
    pub shrink: bool,
    /// Even while it is in use.
    pub force: bool,
}

/// How a stuck device is recovered with an image that the administrator gives.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, CustomType)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
#[zlink(rename_all = "camelCase")]
pub struct RecoverSpec {
    /// The device: a path that leads to it, or NAME/loopN.
    pub device: String,
    /// The image's path as the caller knows it. The file itself is passed as a file descriptor.
    pub path: String,
    /// First byte of the image that the device maps; none: as it was attached, or 0 if that is not
    /// known.
    pub offset: Option<u64>,
    /// Bytes that a later resize may give it; none: as it was attached, or any if that is not
    /// known.
    pub size_limit: Option<u64>,
    /// Use the page cache instead of direct I/O; none: as it was attached, or not if that is not
    /// known.
    pub buffered: Option<bool>,
}

/// The state of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, CustomType)]
#[serde(rename_all = "kebab-case")]
#[zlink(rename_all = "lowercase")]
pub enum DeviceState {
    /// It is served.
    Live,
    /// It is served, but its image has shrunk: reads past its end fail.
    Degraded,
    /// It is not served, and its users wait. Its image or its state file was not found after a
    /// restart, or the kernel or a worker did not answer in time. `reason` says which.
    Stuck,
}

/// The present state of a device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, CustomType)]
#[serde(rename_all = "camelCase")]
#[zlink(rename_all = "camelCase")]
pub struct DeviceInfo {
    /// Instance that owns it.
    pub instance: String,
    /// Its number within the instance.
    pub number: u32,
    /// The path users open, e.g. `/run/loopengine/default/loop0`.
    pub path: String,
    /// Node of the disk, e.g. `/dev/ublkb3`; for a FUSE file, the same as `path`.
    pub node: String,
    /// The image's path as the caller gave it; empty: not known, see `reason`.
    pub image: String,
    /// State.
    pub state: DeviceState,
    /// Why it is not live; none: it is.
    #[serde(default)]
    pub reason: Option<String>,
    /// Bytes.
    #[serde(rename = "sizeBytes")]
    #[zlink(rename = "sizeBytes")]
    pub size: u64,
    /// First byte of the image that the device maps.
    #[serde(rename = "offsetBytes")]
    #[zlink(rename = "offsetBytes")]
    pub offset: u64,
    /// Maximum size in bytes; 0: to the end of the image.
    #[serde(rename = "sizeLimitBytes")]
    #[zlink(rename = "sizeLimitBytes")]
    pub size_limit: u64,
    /// Logical block size in bytes.
    #[serde(rename = "blockSizeBytes")]
    #[zlink(rename = "blockSizeBytes")]
    pub block_size: u32,
    /// Writes are refused.
    pub read_only: bool,
    /// It goes through the page cache.
    pub buffered: bool,
    /// Every write is durable when it completes.
    #[serde(default)]
    pub durable: bool,
    /// Maximum number of requests per second; 0: no limit.
    #[serde(default)]
    pub iops: u64,
    /// Maximum number of bytes read and written per second; 0: no limit.
    #[serde(default)]
    pub bytes_per_second: u64,
    /// Queues.
    pub queues: u32,
    /// Queue depth.
    pub depth: u32,
    /// I/O mode.
    pub io_mode: IoMode,
    /// Other users of the image in this daemon: devices of instances, loop devices of pools.
    #[serde(default)]
    pub shared_with: Vec<String>,
    /// When it was attached, in seconds since 1970; none: not known.
    #[serde(default)]
    pub since_unix_seconds: Option<u64>,
    /// Device number of the file system that the image is on; of a block device, its own. 0: not
    /// known.
    #[serde(default)]
    pub image_device: u64,
    /// The image's inode number; 0: it is a block device, or not known.
    #[serde(default)]
    pub image_inode: u64,
}

/// Statistics of one device since it was attached, over all its queues.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, CustomType)]
#[serde(rename_all = "camelCase")]
#[zlink(rename_all = "camelCase")]
pub struct DeviceStats {
    /// The path users open.
    pub path: String,
    /// The image.
    pub image: String,
    /// Time of the sample, in nanoseconds of the monotonic clock: subtract two for rates.
    pub at_ns: u64,
    /// Reads completed.
    pub reads: u64,
    /// Bytes read.
    pub read_bytes: u64,
    /// Writes completed.
    pub writes: u64,
    /// Bytes written.
    #[serde(rename = "writeBytes")]
    #[zlink(rename = "writeBytes")]
    pub written_bytes: u64,
    /// Flushes completed.
    pub flushes: u64,
    /// fdatasync calls for them: none where everything was durable already, one for several flushes.
    #[serde(default)]
    pub syncs: u64,
    /// Discards and write-zeroes completed.
    pub discards: u64,
    /// Failed requests.
    pub errors: u64,
    /// Operations resubmitted after a short or interrupted one.
    pub resubmits: u64,
    /// Operations that the kernel hands to an io-wq thread (fsync, fallocate, EAGAIN).
    pub punts: u64,
    /// Requests whose buffer the worker had to register (fallback).
    pub fallbacks: u64,
    /// Requests that arrived, and arrivals (wake-ups with at least one): their quotient is the
    /// batch size.
    pub requests: u64,
    /// See `requests`.
    pub batches: u64,
    /// Requests that waited for the limits of the device.
    #[serde(default)]
    pub held: u64,
    /// Requests in flight now, those that wait included.
    pub in_flight: u64,
    /// Latency from arrival to completion in the daemon, of sampled reads and writes.
    pub latency: LatencySummary,
}

/// Percentiles of a latency, in nanoseconds.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, CustomType)]
#[serde(rename_all = "camelCase")]
#[zlink(rename_all = "camelCase")]
pub struct LatencySummary {
    /// Requests that were measured.
    pub samples: u64,
    /// Half were faster than this.
    pub p50_ns: u64,
    /// 90 % were faster.
    pub p90_ns: u64,
    /// 99 % were faster.
    pub p99_ns: u64,
    /// 99.9 % were faster.
    pub p999_ns: u64,
    /// The slowest.
    pub max_ns: u64,
    /// The sum of all, up to the precision of the measurement (1 %).
    #[serde(default)]
    pub sum_ns: u64,
    /// Requests up to each of some bounds, the smallest first; none without samples.
    #[serde(default)]
    pub buckets: Vec<LatencyBucket>,
}

/// Requests up to a latency.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, CustomType)]
#[serde(rename_all = "camelCase")]
#[zlink(rename_all = "camelCase")]
pub struct LatencyBucket {
    /// The latency, in nanoseconds.
    pub up_to_ns: u64,
    /// Requests that took as long or less.
    pub samples: u64,
}

/// The features of this kernel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, CustomType)]
#[serde(rename_all = "camelCase")]
#[zlink(rename_all = "camelCase")]
pub struct Features {
    /// Kernel release, e.g. `7.3.4+deb13-amd64`.
    pub kernel: String,
    /// Backends available on this machine, the preferred one first.
    pub backends: Vec<BackendKind>,
    /// Names of the ublk driver's feature flags, as in ublk_cmd.h, without the prefix `UBLK_F_`;
    /// none without the driver, as below.
    pub flags: Vec<String>,
    /// Supported I/O modes of block devices, best first.
    pub io_modes: Vec<IoMode>,
    /// Block devices outlive the daemon and can be recovered.
    pub recovery: bool,
    /// Block devices can be resized (files always can).
    pub resize: bool,
    /// Why `serve` refuses block devices on this kernel, whose ublk driver is known to crash.
    #[serde(default)]
    pub driver_fault: Option<String>,
}
