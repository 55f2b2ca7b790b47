//! Files instead of block devices: the same engine behind a FUSE file system.
//!
//! ```text
//!  read(2), write(2), loop mount of DIR/loopN
//!        | page cache, /dev/fuse
//!        v
//!  session thread k   handler.rs: what is asked → a Call, in an aligned buffer (buffer.rs)
//!        | lane.rs: bounded queue + eventfd, rung only when the worker sleeps
//!        v
//!  worker k           queue.rs: Call → Request, Completion → the kernel's answer
//! ```
//!
//! One file system an instance, mounted on the instance's directory, so that `DIR/loop0` *is* the
//! file. Knows FUSE and the crate `fuser`; does not know instances, quotas or what an image is
//! beyond its geometry. Nothing of it outlives the daemon: its files fail with ENOTCONN then.
//!
//! The files are fixed in number and size, as disks are. What a file can be asked and a disk
//! cannot is refused, or means the nearest thing that loses nothing in silence: see `handler.rs`.

mod buffer;
mod device;
mod handler;
mod lane;
mod mount;
mod node;
mod queue;
mod space;

use std::path::Path;
use std::time::Duration;

use crossbeam::channel::bounded;

pub use device::Device;
pub use mount::{FileSystem, Mounts, clear_stale, mounted_below};
pub use queue::FuseQueue;

use crate::error::{Error, Kind, Result};

/// The kernel's side.
pub const NODE: &str = "/dev/fuse";

/// Bytes of the largest read or write: what ublk devices have, too.
const MAX_REQUEST: u32 = 1 << 20;
/// How long the kernel may take over a call that may have to wait for our own threads.
const CALL_LIMIT: Duration = Duration::from_secs(10);

/// Refuses a machine without FUSE.
pub fn check() -> Result<()> {
    if Path::new(NODE).exists() {
        return Ok(());
    }
    Err(Error::new(Kind::Unavailable, format!("FUSE is not there ({NODE} is missing)"))
        .hint("run 'modprobe fuse'; a container needs the device passed in"))
}

/// Makes a system call that is served by our own session threads and workers. Should these be
/// stuck, so is the call, but not the caller.
fn with_limit<T: Send + 'static>(what: &str, call: impl FnOnce() -> T + Send + 'static) -> Result<T> {
    let (done, is_done) = bounded(1);
    std::thread::Builder::new()
        .name("fuse call".to_owned())
        .spawn(move || {
            let _ = done.send(call());
        })
        .map_err(|error| Error::os(error, "cannot start a thread"))?;
    is_done
        .recv_timeout(CALL_LIMIT)
        .map_err(|_| Error::new(Kind::Deadline, format!("{what} took more than {} s", CALL_LIMIT.as_secs())))
}
