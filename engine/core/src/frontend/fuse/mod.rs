// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Files instead of block devices: the same engine behind a FUSE file system.
//!
//! ```text
//!  read(2), write(2), loop mount of DIR/loopN
//!        | page cache, /dev/fuse
//!        v
//!  session thread k   handler.rs: operation → a FuseCall, in an aligned buffer (buffer_pool.rs)
//!        | call_queue.rs: bounded queue + eventfd, written only when the worker sleeps
//!        v
//!  worker k           queue.rs: FuseCall → Request, Completion → FUSE reply
//! ```
//!
//! There is one file system per instance, mounted on the instance's directory, so that `DIR/loop0`
//! *is* the file. Knows FUSE and the crate `fuser`. Does not know instances, quotas, or of images
//! more than their geometry. Nothing of it outlives the daemon: its files fail with ENOTCONN then.
//!
//! The files are fixed in number and size, as disks are. Operations that a disk does not have are
//! rejected, or get the closest meaning that never loses data silently: see `handler.rs`.

mod buffer_pool;
mod call_queue;
mod device;
mod handler;
mod mount;
mod node;
mod queue;
mod space;

use std::path::Path;

pub use device::FuseDevice;
pub use mount::{FuseFileSystem, FuseMounts, clear_stale, mounted_below};
pub use queue::FuseQueue;

use super::timeout::with_timeout;
use crate::error::{Error, Kind, Result};

/// The kernel's FUSE device.
pub const NODE: &str = "/dev/fuse";

/// Largest read or write in bytes, as for ublk devices.
const MAX_REQUEST: u32 = 1 << 20;

/// Checks that this machine has FUSE.
pub fn check() -> Result<()> {
    if Path::new(NODE).exists() {
        return Ok(());
    }
    Err(Error::new(Kind::Unavailable, format!("FUSE is unavailable: {NODE} is missing"))
        .hint("run 'modprobe fuse'; a container needs the device passed in"))
}
