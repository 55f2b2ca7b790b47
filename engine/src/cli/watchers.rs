// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Watches that the daemon keeps: mounts that propagate into its namespace, and nodes of partitions
//! and stacked disks in /dev.
//!
//! Knows how to detect both. Does not know the names that the daemon gives to partitions.

use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Weak;
use std::time::Duration;

use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};
use rustix::io::Errno;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time::sleep;

use crate::frontend;
use crate::instance::Engine;
use crate::sys::{self, mntns};

/// Minimum interval between two scans.
const PAUSE: Duration = Duration::from_millis(200);
/// Size of the event buffer.
const EVENTS: usize = 4096;
/// Where the kernel creates disk nodes.
const DEV: &str = "/dev";

/// Detaches mounts of our disks whenever they propagate into this namespace.
pub(super) async fn detach_new_mounts() {
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
        let _ = tokio::task::spawn_blocking(detach_mounts).await;
        sleep(PAUSE).await;
    }
}

/// Detaches all mounts of our disks in this namespace.
pub(super) fn detach_mounts() {
    match mntns::detach_mounts(&frontend::disk_names()) {
        Ok((detached, failed)) => {
            for path in detached {
                tracing::debug!("detached the mount {} from this namespace", path.display());
            }
            for failure in failed {
                tracing::warn!("cannot detach a mount of a disk: {failure}");
            }
        }
        Err(error) => tracing::warn!("cannot read {}: {error}", mntns::MOUNTINFO),
    }
}

/// Updates names when the kernel adds or removes nodes of partitions or of disks stacked on ours.
pub(super) async fn follow_dev_nodes(engine: Weak<Engine>) {
    if let Err(error) = follow(&engine).await {
        tracing::warn!("cannot watch {DEV}: names of partitions are not updated: {error}");
    }
}

async fn follow(engine: &Weak<Engine>) -> std::io::Result<()> {
    let events = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
    inotify::add_watch(&events, DEV, WatchFlags::CREATE | WatchFlags::DELETE | WatchFlags::ONLYDIR)?;
    let events = sys::watch::watch(events, Interest::READABLE)?;
    // Changes before the watch have no event: scan once first.
    loop {
        let engine = engine.clone();
        let follow = move || engine.upgrade().inspect(|engine| engine.update_nodes()).is_some();
        if !tokio::task::spawn_blocking(follow).await.unwrap_or(false) {
            return Ok(());
        }
        // A table with many partitions causes many events.
        sleep(PAUSE / 10).await;
        while !has_block_event(&events)? {
            events.ready(Interest::READABLE).await?.clear_ready();
        }
    }
}

/// Drains all events. True if one concerns a partition or a stacked disk, or if events were lost.
fn has_block_event(events: &AsyncFd<OwnedFd>) -> Result<bool, Errno> {
    let mut buffer = [MaybeUninit::uninit(); EVENTS];
    let mut events = inotify::Reader::new(events.get_ref().as_fd(), &mut buffer);
    let mut some = false;
    loop {
        match events.next() {
            Ok(event) => {
                let name = event.file_name().map(|name| name.to_bytes()).unwrap_or_default();
                let disk = name.strip_prefix(b"ublkb").or_else(|| name.strip_prefix(b"loop"));
                let partition = disk.is_some_and(|rest| rest.contains(&b'p'));
                let stack = name.starts_with(b"dm-") || name.starts_with(b"md");
                some |= partition || stack || event.events().contains(ReadFlags::QUEUE_OVERFLOW);
            }
            Err(Errno::WOULDBLOCK) => return Ok(some),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error),
        }
    }
}
