//! The files of one file system: what each looks like, who has it open, which lanes lead to its
//! queues.
//!
//! Inode numbers are never used again: who has a file open that is gone can never reach the next
//! one of the same name.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock, Weak};
use std::time::{Duration, SystemTime};

use fuser::{FileAttr, FileHandle, FileType, INodeNo, Notifier};

use super::buffer::Buffers;
use super::lane::Lane;
use crate::error::{Error, Kind, Result};
use crate::image::{Geometry, Image};
use crate::sys;

/// How long the kernel may believe what it was told: we tell it of every change.
pub(super) const TTL: Duration = Duration::from_secs(3600);

/// A file that was closed just now is released by the kernel a little later.
pub(super) const SOON: Duration = Duration::from_secs(1);
pub(super) const PAUSE: Duration = Duration::from_millis(2);

/// Whether a file can be zeroed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Emptying {
    Begun,
    /// Another has it open still.
    NotYet,
    /// It is in use.
    Refused,
}

/// What of a file can change.
#[derive(Debug)]
pub(super) struct State {
    /// Open files (not descriptors: those that share one count once).
    pub(super) opens: u32,
    /// Those among them that use the page cache.
    pub(super) cached: u32,
    /// Those among these that can write; true: it is still to be told that a write did not fit.
    pub(super) writers: BTreeMap<u64, bool>,
    /// It can be opened no more.
    pub(super) closed: bool,
    /// It is being zeroed, and cannot be opened meanwhile: old content would be cached.
    pub(super) emptying: bool,
    pub(super) mode: u16,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) accessed: SystemTime,
    pub(super) modified: SystemTime,
}

/// One file.
#[derive(Debug)]
pub(super) struct Node {
    pub(super) ino: u64,
    pub(super) name: String,
    pub(super) block_size: u32,
    pub(super) read_only: bool,
    lanes: Box<[Arc<Lane>]>,
    size: AtomicU64,
    /// Opened for writing, and nobody has done anything since: nothing of it is cached, if that was
    /// its only user.
    fresh: AtomicBool,
    /// Whether its size in the kernel is being corrected: [`Node::IDLE`] and so on.
    correcting: AtomicU8,
    /// For its holes; it goes with the device.
    pub(super) image: Weak<Image>,
    state: Mutex<State>,
}

impl Node {
    const IDLE: u8 = 0;
    const RUNNING: u8 = 1;
    const AGAIN: u8 = 2;

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    pub(super) fn set_size(&self, size: u64) {
        self.size.store(size, Ordering::Release);
    }

    pub(super) fn set_fresh(&self, fresh: bool) {
        // Read by many at once, and nearly never changed.
        if self.fresh.load(Ordering::Acquire) != fresh {
            self.fresh.store(fresh, Ordering::Release);
        }
    }

    /// Lets nobody else open it while it is zeroed, if its only user has done nothing yet, or has what is
    /// cached `dropped`.
    pub(super) fn begin_emptying(&self, dropped: bool) -> Emptying {
        let mut state = self.state();
        if state.closed || state.emptying || !(dropped || self.fresh.load(Ordering::Acquire)) {
            return Emptying::Refused;
        }
        if state.opens > 1 {
            return Emptying::NotYet;
        }
        state.emptying = true;
        Emptying::Begun
    }

    /// A write through the page cache did not fit. Whose it was the kernel does not say: as with any
    /// error of a write that is cached, all who may have made it are told once.
    pub(super) fn note_overrun(&self) {
        self.state().writers.values_mut().for_each(|told| *told = true);
    }

    /// Whether this open file is to be told that a write did not fit. It is, with that.
    pub(super) fn take_overrun(&self, handle: FileHandle) -> bool {
        self.state().writers.get_mut(&handle.0).is_some_and(std::mem::take)
    }

    /// How long the kernel may believe its attributes. It asks for them before a cached write if they are
    /// not valid, and that is when a writer can be told something.
    pub(super) fn ttl(&self) -> Duration {
        if self.state().writers.values().any(|told| *told) { Duration::ZERO } else { TTL }
    }

    /// The lane of the session thread with this number.
    pub(super) fn lane(&self, thread: usize) -> &Lane {
        &self.lanes[thread % self.lanes.len()]
    }

    pub(super) fn attr(&self) -> FileAttr {
        let (size, state) = (self.size(), self.state());
        FileAttr {
            ino: INodeNo(self.ino),
            size,
            blocks: size / 512,
            atime: state.accessed,
            mtime: state.modified,
            ctime: state.modified,
            crtime: state.modified,
            kind: FileType::RegularFile,
            perm: state.mode,
            nlink: 1,
            uid: state.uid,
            gid: state.gid,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        }
    }
}

#[derive(Debug, Default)]
struct Table {
    by_ino: HashMap<u64, Arc<Node>>,
    by_name: BTreeMap<String, Arc<Node>>,
}

/// All files, and what they share.
#[derive(Debug)]
pub(super) struct Nodes {
    /// Where they appear.
    pub(super) directory: PathBuf,
    pub(super) buffers: Arc<Buffers>,
    pub(super) made: SystemTime,
    /// Session threads that have asked for their number.
    pub(super) threads: AtomicUsize,
    /// To the kernel, once there is a session.
    pub(super) notifier: OnceLock<Notifier>,
    /// One more reference for each thread that looks for holes.
    pub(super) seeks: Arc<()>,
    next_handle: AtomicU64,
    table: RwLock<Table>,
    next: AtomicU64,
}

impl Nodes {
    pub(super) fn new(directory: PathBuf) -> Self {
        Self {
            directory,
            buffers: Arc::new(Buffers::new()),
            made: SystemTime::now(),
            threads: AtomicUsize::new(0),
            notifier: OnceLock::new(),
            seeks: Arc::default(),
            next_handle: AtomicU64::new(0),
            table: RwLock::default(),
            next: AtomicU64::new(INodeNo::ROOT.0 + 1),
        }
    }

    /// A number for an open file: even if it uses the page cache, odd if not.
    pub(super) fn new_handle(&self, bypass: bool) -> FileHandle {
        FileHandle(self.next_handle.fetch_add(2, Ordering::Relaxed) | u64::from(bypass))
    }

    /// The attributes of the directory.
    pub(super) fn root(&self) -> FileAttr {
        let made = self.made;
        FileAttr {
            ino: INodeNo::ROOT,
            size: 0,
            blocks: 0,
            atime: made,
            mtime: made,
            ctime: made,
            crtime: made,
            kind: FileType::Directory,
            perm: 0o755,
            nlink: 2,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        }
    }

    /// A new file appears.
    pub(super) fn insert(
        &self,
        name: String,
        geometry: &Geometry,
        image: Weak<Image>,
        lanes: Vec<Arc<Lane>>,
    ) -> Result<Arc<Node>> {
        let Geometry { size, block_size, read_only, .. } = *geometry;
        if lanes.is_empty() {
            return Err(Error::new(Kind::Internal, "a file without queues"));
        }
        let now = SystemTime::now();
        let state = State {
            opens: 0,
            cached: 0,
            writers: BTreeMap::new(),
            closed: false,
            emptying: false,
            mode: if read_only { 0o400 } else { 0o600 },
            uid: 0,
            gid: 0,
            accessed: now,
            modified: now,
        };
        let node = Arc::new(Node {
            ino: self.next.fetch_add(1, Ordering::Relaxed),
            name: name.clone(),
            block_size,
            read_only,
            lanes: lanes.into(),
            size: AtomicU64::new(size),
            fresh: AtomicBool::new(false),
            correcting: AtomicU8::new(Node::IDLE),
            image,
            state: Mutex::new(state),
        });
        let mut table = self.table.write().unwrap_or_else(PoisonError::into_inner);
        if table.by_name.contains_key(&name) {
            return Err(Error::new(Kind::Internal, format!("the file {name} exists")));
        }
        table.by_ino.insert(node.ino, node.clone());
        table.by_name.insert(name, node.clone());
        Ok(node)
    }

    /// A file is gone, for those who have it open as well.
    pub(super) fn remove(&self, node: &Node) {
        let mut table = self.table.write().unwrap_or_else(PoisonError::into_inner);
        if table.by_ino.remove(&node.ino).is_some() {
            table.by_name.remove(&node.name);
        }
    }

    pub(super) fn get(&self, ino: INodeNo) -> Option<Arc<Node>> {
        self.table.read().unwrap_or_else(PoisonError::into_inner).by_ino.get(&ino.0).cloned()
    }

    pub(super) fn named(&self, name: &str) -> Option<Arc<Node>> {
        self.table.read().unwrap_or_else(PoisonError::into_inner).by_name.get(name).cloned()
    }

    /// Inode numbers and names.
    pub(super) fn list(&self) -> Vec<(u64, String)> {
        let table = self.table.read().unwrap_or_else(PoisonError::into_inner);
        table.by_name.iter().map(|(name, node)| (node.ino, name.clone())).collect()
    }

    /// The kernel lets a cached write grow a file before we hear of it. Has it see the true size
    /// again, behind the back of whoever wrote: our own threads must not wait for the kernel here.
    pub(super) fn correct_size(&self, node: &Arc<Node>) {
        if node.correcting.swap(Node::AGAIN, Ordering::AcqRel) != Node::IDLE {
            return;
        }
        let (correcting, path) = (node.clone(), self.directory.join(&node.name));
        let correct = move || {
            let node = correcting;
            loop {
                node.correcting.store(Node::RUNNING, Ordering::Release);
                // After a resize by another thread this is refused, and nothing is lost: that one told
                // the kernel the size.
                let _ = sys::truncate(&path, node.size());
                let (running, idle) = (Node::RUNNING, Node::IDLE);
                if node
                    .correcting
                    .compare_exchange(running, idle, Ordering::AcqRel, Ordering::Acquire)
                    .is_ok()
                {
                    return;
                }
            }
        };
        if std::thread::Builder::new().name("fuse size".to_owned()).spawn(correct).is_err() {
            node.correcting.store(Node::IDLE, Ordering::Release);
        }
    }
}
