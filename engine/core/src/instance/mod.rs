// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Instances: an engine owns instances, an instance owns devices and workers, a device owns its
//! image.
//!
//! Every call may block as long as its deadlines allow (seconds at worst): asynchronous callers use
//! a blocking thread. Knows nothing of sockets and command lines.

pub mod activity;
mod attached;
pub mod claims;
mod companion;
mod cpus;
mod engine;
mod in_use;
#[expect(clippy::module_inception, reason = "the type Instance lives in the file of its name")]
pub mod instance;
mod links;
mod names;
mod pool_resources;
pub mod pool_workers;
mod recover_device;
mod recovery;
pub mod served;
pub mod spec;
mod state;
mod statistics;
pub mod stop;
mod table;
mod write_back;

pub use companion::Companion;
pub use engine::{Engine, EngineConfig, Selector, Tuning};
pub use names::check_instance_name;
pub use pool_resources::PoolResources;

/// Maximum number of devices of one instance.
pub const MAX_DEVICES: u32 = 4096;
/// Highest device number, as for the kernel's loop devices: minor numbers have 20 bits.
pub const NUMBER_MAX: u32 = (1 << 20) - 1;
/// Maximum number of instances of one daemon.
pub const MAX_INSTANCES: usize = 1024;
