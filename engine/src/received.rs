//! Descriptors that strangers send, and the threads that close them.
//!
//! close(2) can wait for whoever serves the file: a FUSE server that never answers FLUSH, a TCP peer of
//! a socket with SO_LINGER. So a descriptor that came over a socket is a [`Received`] until a call
//! consumes it: dropped, it is closed by a thread of its sender's [`Disposal`], and that sender's
//! connection counts until the thread has ended. Knows nothing of sockets and calls.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, Mode, OFlags, StatxFlags, openat, statat, statx};
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsmount, fsopen};
use tokio::sync::Notify;

use crate::accounts;

/// How long the daemon's end waits for files before it aborts the FUSE connections of their senders.
const END_PATIENCE: Duration = Duration::from_secs(1);
/// How long it waits in all.
const END_MAX: Duration = Duration::from_secs(4);
const END_POLL: Duration = Duration::from_millis(20);

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Closes what one sender sent, in order, with at most one thread, which ends when nothing is left.
#[derive(Clone, Debug)]
pub struct Disposal(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    uid: u32,
    queue: Mutex<Queue>,
    done: Notify,
    /// What the sender holds until everything is closed.
    _slot: Box<dyn std::fmt::Debug + Send + Sync>,
}

#[derive(Debug, Default)]
struct Queue {
    waiting: Vec<OwnedFd>,
    running: bool,
}

/// Disposals for which no thread could be started; the next attempt takes them along.
static POSTPONED: Mutex<Vec<Disposal>> = Mutex::new(Vec::new());

impl Disposal {
    /// One for what user `uid` sends; `slot` is dropped when it is gone and everything is closed.
    pub fn new(uid: u32, slot: impl std::fmt::Debug + Send + Sync + 'static) -> Disposal {
        let (queue, done) = (Mutex::default(), Notify::new());
        Disposal(Arc::new(Shared { uid, queue, done, _slot: Box::new(slot) }))
    }

    /// Has `file` closed. Never waits.
    pub fn close(&self, file: OwnedFd) {
        lock(&self.0.queue).waiting.push(file);
        self.start();
        for postponed in std::mem::take(&mut *lock(&POSTPONED)) {
            postponed.start();
        }
    }

    /// How many are not closed yet.
    pub fn pending(&self) -> usize {
        let queue = lock(&self.0.queue);
        queue.waiting.len() + usize::from(queue.running)
    }

    /// Ends when everything is closed.
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
            let _waiting = Waiting::on(&file, self.0.uid);
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
    /// `file` came from whom `disposal` is of.
    pub fn new(file: OwnedFd, disposal: &Disposal) -> Received {
        Received { file: Some(file), disposal: disposal.clone() }
    }

    /// The number of the descriptor.
    pub fn number(&self) -> i32 {
        self.file.as_ref().map_or(-1, AsRawFd::as_raw_fd)
    }

    /// Gives it to a call, on a thread that nobody else waits for. None: it was taken before.
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

/// A thread of this process may wait for a file of user `uid` until this is dropped.
#[derive(Debug)]
pub struct Waiting(u64);

#[derive(Clone, Copy, Debug)]
struct Wait {
    uid: u32,
    /// Minor of the file system's device number, once it is known.
    minor: Option<u32>,
}

static WAITS: Mutex<(u64, BTreeMap<u64, Wait>)> = Mutex::new((0, BTreeMap::new()));

impl Waiting {
    /// Call it on the thread that is going to wait.
    pub fn on(file: impl AsFd, uid: u32) -> Waiting {
        let id = {
            let mut waits = lock(&WAITS);
            waits.0 += 1;
            let id = waits.0;
            waits.1.insert(id, Wait { uid, minor: None });
            id
        };
        let this = Waiting(id);
        // An empty mask asks for nothing that a file system would have to answer.
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

impl Drop for Waiting {
    fn drop(&mut self) {
        lock(&WAITS).1.remove(&self.0);
    }
}

/// Lets the daemon end although files of strangers keep threads waiting. In the kernel nothing but an
/// answer or an abort ends the wait for a FUSE server, SIGKILL neither. So connections whose owner has
/// sent a file of them himself are aborted; others' are left, and named.
pub fn end() {
    let started = Instant::now();
    loop {
        let waits: Vec<Wait> = lock(&WAITS).1.values().copied().collect();
        if waits.is_empty() {
            return;
        }
        if started.elapsed() > END_MAX {
            for Wait { uid, .. } in waits {
                tracing::warn!("a thread still waits for a file that user {uid} sent");
            }
            return;
        }
        if started.elapsed() > END_PATIENCE {
            for wait in waits {
                if let Wait { uid, minor: Some(minor) } = wait
                    && abort(minor, uid).is_ok()
                {
                    tracing::warn!("aborted FUSE connection {minor} of user {uid}: it does not answer");
                }
            }
        }
        std::thread::sleep(END_POLL);
    }
}

/// Aborts the FUSE connection with this number, if it is this user's.
fn abort(minor: u32, uid: u32) -> rustix::io::Result<()> {
    // Not where it is usually mounted: it need not be.
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
    fn a_dropped_descriptor_is_closed_elsewhere_and_counts_until_then() {
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
