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
use std::time::Duration;

use crossbeam::channel::bounded;

pub use device::FuseDevice;
pub use mount::{FuseFileSystem, FuseMounts, clear_stale, mounted_below};
pub use queue::FuseQueue;

use crate::error::{Error, Kind, Result};

/// The kernel's FUSE device.
pub const NODE: &str = "/dev/fuse";

/// Largest read or write in bytes, as for ublk devices.
const MAX_REQUEST: u32 = 1 << 20;
/// Deadline of a system call that may depend on our own threads.
const CALL_TIMEOUT: Duration = Duration::from_secs(10);

/// Checks that this machine has FUSE.
pub fn check() -> Result<()> {
    if Path::new(NODE).exists() {
        return Ok(());
    }
    Err(Error::new(Kind::Unavailable, format!("FUSE is unavailable: {NODE} is missing"))
        .hint("run 'modprobe fuse'; a container needs the device passed in"))
}

/// Makes a system call that our own session threads and workers serve. If these hang, so does the
/// call, but not the caller.
fn with_timeout<T: Send + 'static>(what: &str, call: impl FnOnce() -> T + Send + 'static) -> Result<T> {
    let (done, is_done) = bounded(1);
    std::thread::Builder::new()
        .name("fuse call".to_owned())
        .spawn(move || {
            let _ = done.send(call());
        })
        .map_err(|error| Error::os(error, "cannot start a thread"))?;
    is_done.recv_timeout(CALL_TIMEOUT).map_err(|_| {
        Error::new(Kind::Deadline, format!("{what} took more than {} s", CALL_TIMEOUT.as_secs()))
    })
}
