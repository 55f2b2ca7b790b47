//! What the daemon follows while it serves: mounts that come into its namespace, and nodes of partitions and of disks upon
//! its own.
//!
//! Knows how to hear of both. Does not know what names they have.

use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Weak;
use std::time::Duration;

use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};
use rustix::io::Errno;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time::sleep;

use crate::instance::Engine;
use crate::sys::{self, mntns};

/// How often either is looked at, at the most.
const PAUSE: Duration = Duration::from_millis(200);
/// Bytes of events that are taken at a time.
const EVENTS: usize = 4096;
/// Where the kernel makes nodes of disks.
const DEV: &str = "/dev";

/// Mounts made elsewhere come into this namespace too; those of ublk disks are left at once.
pub(super) async fn leave_mounts() {
    let table = std::fs::File::open(mntns::MOUNTINFO)
        .and_then(|file| sys::watch::watch(file.into(), Interest::PRIORITY));
    let table = match table {
        Ok(table) => table,
        Err(error) => return tracing::warn!("cannot watch {}: {error}", mntns::MOUNTINFO),
    };
    loop {
        match table.ready(Interest::PRIORITY).await {
            Ok(mut ready) => ready.clear_ready(),
            Err(error) => return tracing::warn!("cannot watch {}: {error}", mntns::MOUNTINFO),
        }
        let _ = tokio::task::spawn_blocking(leave_own_disks).await;
        sleep(PAUSE).await;
    }
}

/// The same once.
pub(super) fn leave_own_disks() {
    match mntns::detach_ublk_mounts() {
        Ok((detached, failed)) => {
            for path in detached {
                tracing::debug!("left the mount {} in this namespace", path.display());
            }
            for failure in failed {
                tracing::warn!("cannot leave a mount of a ublk disk: {failure}");
            }
        }
        Err(error) => tracing::warn!("cannot read {}: {error}", mntns::MOUNTINFO),
    }
}

/// The kernel makes and removes nodes of partitions when anybody has a table read again, and of disks that lie upon
/// others; names follow.
pub(super) async fn update_nodes(engine: Weak<Engine>) {
    if let Err(error) = follow(&engine).await {
        tracing::warn!("cannot watch {DEV}, so that names of partitions do not follow: {error}");
    }
}

async fn follow(engine: &Weak<Engine>) -> std::io::Result<()> {
    let events = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
    inotify::add_watch(&events, DEV, WatchFlags::CREATE | WatchFlags::DELETE | WatchFlags::ONLYDIR)?;
    let events = sys::watch::watch(events, Interest::READABLE)?;
    // What changed before the watch was set has no event: the first look is at once.
    loop {
        let engine = engine.clone();
        let follow = move || engine.upgrade().inspect(|engine| engine.update_nodes()).is_some();
        if !tokio::task::spawn_blocking(follow).await.unwrap_or(false) {
            return Ok(());
        }
        // A table of many partitions is many events.
        sleep(PAUSE / 10).await;
        while !ours_among(&events)? {
            events.ready(Interest::READABLE).await?.clear_ready();
        }
    }
}

/// Takes all events; whether some were of partitions or of disks upon others, or were lost.
fn ours_among(events: &AsyncFd<OwnedFd>) -> Result<bool, Errno> {
    let mut buffer = [MaybeUninit::uninit(); EVENTS];
    let mut events = inotify::Reader::new(events.get_ref().as_fd(), &mut buffer);
    let mut some = false;
    loop {
        match events.next() {
            Ok(event) => {
                let name = event.file_name().map(|name| name.to_bytes()).unwrap_or_default();
                let partition = name.strip_prefix(b"ublkb").is_some_and(|rest| rest.contains(&b'p'));
                let stack = name.starts_with(b"dm-") || name.starts_with(b"md");
                some |= partition || stack || event.events().contains(ReadFlags::QUEUE_OVERFLOW);
            }
            Err(Errno::WOULDBLOCK) => return Ok(some),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error),
        }
    }
}
