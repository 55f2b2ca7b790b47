// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Descriptors received from clients, and the threads that close them.
//!
//! close(2) can block on the server of a file: a FUSE server that never answers FLUSH, a TCP peer
//! of a socket with SO_LINGER. So a descriptor received over a socket is a [`Received`] until a
//! call consumes it. When dropped, a thread of its sender's [`Disposal`] closes it, and the
//! sender's connection counts until that thread has ended.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, Mode, OFlags, StatxFlags, openat, statat, statx};
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsmount, fsopen};
use tokio::sync::Notify;

use crate::accounts;

/// How long the daemon's shutdown waits before it aborts the FUSE connections of senders.
const ABORT_AFTER: Duration = Duration::from_secs(1);
/// How long it waits in total.
const SHUTDOWN_MAX: Duration = Duration::from_secs(4);
const SHUTDOWN_POLL: Duration = Duration::from_millis(20);

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Closes one sender's descriptors in order, with at most one thread, which ends when none is left.
#[derive(Clone, Debug)]
pub struct Disposal(Arc<DisposalInner>);

#[derive(Debug)]
struct DisposalInner {
    uid: u32,
    queue: Mutex<CloseQueue>,
    done: Notify,
    /// The sender's slot, held until everything is closed.
    _slot: Box<dyn std::fmt::Debug + Send + Sync>,
}

#[derive(Debug, Default)]
struct CloseQueue {
    waiting: Vec<OwnedFd>,
    running: bool,
}

/// Disposals whose thread failed to start; the next attempt retries them.
static POSTPONED: Mutex<Vec<Disposal>> = Mutex::new(Vec::new());

impl Disposal {
    /// A disposal for user `uid`; `slot` is dropped with it, once everything is closed.
    pub fn new(uid: u32, slot: impl std::fmt::Debug + Send + Sync + 'static) -> Disposal {
        let (queue, done) = (Mutex::default(), Notify::new());
        Disposal(Arc::new(DisposalInner { uid, queue, done, _slot: Box::new(slot) }))
    }

    /// Closes `file` on the thread. Never blocks.
    pub fn close(&self, file: OwnedFd) {
        lock(&self.0.queue).waiting.push(file);
        self.start();
        for postponed in std::mem::take(&mut *lock(&POSTPONED)) {
            postponed.start();
        }
    }

    /// Number of descriptors that are not closed yet.
    pub fn pending(&self) -> usize {
        let queue = lock(&self.0.queue);
        queue.waiting.len() + usize::from(queue.running)
    }

    /// Completes when everything is closed.
    pub async fn finished(&self) {
        loop {
            let done = self.0.done.notified();
            if self.pending() == 0 {
                return;
            }
            done.await;
        }
    }

    /// The user whose files these are.
    pub fn uid(&self) -> u32 {
        self.0.uid
    }

    fn start(&self) {
        let mut queue = lock(&self.0.queue);
        if queue.running || queue.waiting.is_empty() {
            return;
        }
        let this = self.clone();
        let started = std::thread::Builder::new().name("close".into()).spawn(move || this.run());
        queue.running = started.is_ok();
        drop(queue);
        if let Err(error) = started {
            tracing::warn!("cannot start a thread to close a file of user {}: {error}", self.0.uid);
            lock(&POSTPONED).push(self.clone());
        }
    }

    fn run(&self) {
        loop {
            let file = {
                let mut queue = lock(&self.0.queue);
                queue.running = !queue.waiting.is_empty();
                if !queue.running {
                    break;
                }
                queue.waiting.remove(0)
            };
            let _waiting = FileWait::on(&file, self.0.uid);
            drop(file);
        }
        self.0.done.notify_waiters();
    }
}

/// A descriptor that a client sent and no call has consumed.
#[derive(Debug)]
pub struct Received {
    file: Option<OwnedFd>,
    disposal: Disposal,
}

impl Received {
    /// Wraps `file`, received from the sender of `disposal`.
    pub fn new(file: OwnedFd, disposal: &Disposal) -> Received {
        Received { file: Some(file), disposal: disposal.clone() }
    }

    /// The number of the descriptor.
    pub fn number(&self) -> i32 {
        self.file.as_ref().map_or(-1, AsRawFd::as_raw_fd)
    }

    /// Passes it to a call, on a thread that nobody else waits for. None: it was taken before.
    pub fn take(mut self) -> Option<OwnedFd> {
        self.file.take()
    }
}

impl Drop for Received {
    fn drop(&mut self) {
        if let Some(file) = self.file.take() {
            self.disposal.close(file);
        }
    }
}

/// While this lives, a thread of this process may block on a file of user `uid`.
#[derive(Debug)]
pub struct FileWait(u64);

#[derive(Clone, Copy, Debug)]
struct WaitRecord {
    uid: u32,
    /// Minor of the file system's device number, once it is known.
    minor: Option<u32>,
}

static WAITS: Mutex<(u64, BTreeMap<u64, WaitRecord>)> = Mutex::new((0, BTreeMap::new()));

impl FileWait {
    /// Call it on the thread that may block.
    pub fn on(file: impl AsFd, uid: u32) -> FileWait {
        let id = {
            let mut waits = lock(&WAITS);
            waits.0 += 1;
            let id = waits.0;
            waits.1.insert(id, WaitRecord { uid, minor: None });
            id
        };
        let this = FileWait(id);
        // An empty mask requests nothing from the file system.
        let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
        if let Ok(stat) = statx(file, c"", flags, StatxFlags::empty())
            && stat.stx_dev_major == 0
            && let Some(wait) = lock(&WAITS).1.get_mut(&id)
        {
            wait.minor = Some(stat.stx_dev_minor);
        }
        this
    }
}

impl Drop for FileWait {
    fn drop(&mut self) {
        lock(&WAITS).1.remove(&self.0);
    }
}

/// Lets the daemon end although clients' files block threads. Only a reply or an abort ends the
/// kernel's wait for a FUSE server; SIGKILL does not. So this aborts connections whose owner sent a
/// file of theirs; it leaves others, and logs them.
pub fn end() {
    let started = Instant::now();
    loop {
        let waits: Vec<WaitRecord> = lock(&WAITS).1.values().copied().collect();
        if waits.is_empty() {
            return;
        }
        if started.elapsed() > SHUTDOWN_MAX {
            for WaitRecord { uid, .. } in waits {
                tracing::warn!("a thread still waits for a file that user {uid} sent");
            }
            return;
        }
        if started.elapsed() > ABORT_AFTER {
            for wait in waits {
                if let WaitRecord { uid, minor: Some(minor) } = wait
                    && abort(minor, uid).is_ok()
                {
                    tracing::warn!("aborted FUSE connection {minor} of user {uid}: it does not answer");
                }
            }
        }
        std::thread::sleep(SHUTDOWN_POLL);
    }
}

/// Aborts the FUSE connection with this number, if this user owns it.
fn abort(minor: u32, uid: u32) -> rustix::io::Result<()> {
    // Does not rely on the usual mount point, which may be missing.
    let context = fsopen("fusectl", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_create(&context)?;
    let flags = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV;
    let connections = fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, flags)?;
    let name = minor.to_string();
    let owner = statat(&connections, &name, AtFlags::SYMLINK_NOFOLLOW)?.st_uid;
    if accounts::of(owner) != accounts::of(uid) {
        return Err(rustix::io::Errno::PERM);
    }
    let switch =
        openat(&connections, format!("{name}/abort"), OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?;
    rustix::io::write(&switch, b"1").map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn a_dropped_descriptor_is_closed_by_a_thread_and_counts_until_then() {
        let (mut reader, writer) = std::io::pipe().unwrap();
        let slot = Arc::new(());
        let disposal = Disposal::new(1000, Arc::clone(&slot));
        drop(Received::new(writer.into(), &disposal));
        drop(disposal);
        assert_eq!(reader.read(&mut [0]).unwrap(), 0);
        let until = Instant::now() + Duration::from_secs(5);
        while Arc::strong_count(&slot) > 1 {
            assert!(Instant::now() < until, "the slot stays taken");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn a_consumed_descriptor_stays_open() {
        let (mut reader, writer) = std::io::pipe().unwrap();
        let disposal = Disposal::new(1000, ());
        let file = Received::new(writer.into(), &disposal).take().unwrap();
        rustix::io::write(&file, b"x").unwrap();
        assert_eq!(reader.read(&mut [0]).unwrap(), 1);
        assert_eq!(disposal.pending(), 0);
    }
}
