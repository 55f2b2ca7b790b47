// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The files of one file system: attributes, open handles, and the call queues of each.
//!
//! Inode numbers are never reused: a handle of a removed file cannot reach a new file of the same
//! name.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock, Weak};
use std::time::{Duration, SystemTime};

use fuser::{Errno, FileAttr, FileHandle, FileType, INodeNo, Notifier};

use super::buffer_pool::BufferPool;
use super::call_queue::CallQueue;
use crate::error::{Error, Kind, Result};
use crate::image::{Geometry, Image};
use crate::sys;

/// Attribute and entry timeout: we notify the kernel of every change.
pub(super) const TTL: Duration = Duration::from_secs(3600);

/// The kernel releases a closed file a little later.
pub(super) const RELEASE_TIMEOUT: Duration = Duration::from_secs(1);
pub(super) const POLL_INTERVAL: Duration = Duration::from_millis(2);

/// Result of an attempt to start zeroing a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ZeroingStart {
    Started,
    /// Another handle is still open.
    NotYet,
    /// It is in use.
    Busy,
}

/// The mutable state of a file.
#[derive(Debug)]
pub(super) struct NodeState {
    /// Open handles (not descriptors, which may share one).
    pub(super) opens: u32,
    /// Those of them that use the page cache.
    pub(super) cached: u32,
    /// Those of these that can write; true: an ENOSPC is still to be reported.
    pub(super) writers: BTreeMap<u64, bool>,
    /// It cannot be opened any more.
    pub(super) closed: bool,
    /// It is being zeroed and cannot be opened meanwhile: old content would be cached.
    pub(super) zeroing: bool,
    pub(super) mode: u16,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) accessed: SystemTime,
    pub(super) modified: SystemTime,
}

/// One file.
#[derive(Debug)]
pub(super) struct FuseNode {
    pub(super) ino: u64,
    pub(super) name: String,
    pub(super) block_size: u32,
    pub(super) read_only: bool,
    call_queues: Box<[Arc<CallQueue>]>,
    size: AtomicU64,
    /// Opened for writing and not accessed since: nothing is cached if that was its only handle.
    untouched: AtomicBool,
    /// State of the size correction in the kernel: [`FuseNode::IDLE`] and so on.
    correcting: AtomicU8,
    /// For SEEK_HOLE; it ends with the device.
    pub(super) image: Weak<Image>,
    state: Mutex<NodeState>,
}

impl FuseNode {
    const IDLE: u8 = 0;
    const RUNNING: u8 = 1;
    const AGAIN: u8 = 2;

    pub(super) fn state(&self) -> MutexGuard<'_, NodeState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    pub(super) fn set_size(&self, size: u64) {
        self.size.store(size, Ordering::Release);
    }

    pub(super) fn set_untouched(&self, untouched: bool) {
        // Read often, changed rarely.
        if self.untouched.load(Ordering::Acquire) != untouched {
            self.untouched.store(untouched, Ordering::Release);
        }
    }

    /// Starts zeroing it, with opens refused meanwhile, if its only handle is untouched or its
    /// cache was `dropped`.
    pub(super) fn start_zeroing(&self, dropped: bool) -> ZeroingStart {
        let mut state = self.state();
        if state.closed || state.zeroing || !(dropped || self.untouched.load(Ordering::Acquire)) {
            return ZeroingStart::Busy;
        }
        if state.opens > 1 {
            return ZeroingStart::NotYet;
        }
        state.zeroing = true;
        ZeroingStart::Started
    }

    /// Closes a handle.
    pub(super) fn release(&self, handle: FileHandle) {
        let mut state = self.state();
        state.opens = state.opens.saturating_sub(1);
        state.cached = state.cached.saturating_sub(u32::from(!bypasses_cache(handle)));
        state.writers.remove(&handle.0);
    }

    /// Records a cached write past the end. The kernel does not report its writer: as with other
    /// write-back errors, every possible writer gets the error once.
    pub(super) fn record_overrun(&self) {
        self.state().writers.values_mut().for_each(|pending| *pending = true);
    }

    /// Whether this handle still has to report ENOSPC. Clears it.
    pub(super) fn take_overrun(&self, handle: FileHandle) -> bool {
        self.state().writers.get_mut(&handle.0).is_some_and(std::mem::take)
    }

    /// Attribute timeout. With an expired one, the kernel asks before a cached write, and the
    /// writer gets its error.
    pub(super) fn ttl(&self) -> Duration {
        if self.state().writers.values().any(|pending| *pending) { Duration::ZERO } else { TTL }
    }

    /// The call queue of the session thread with this number.
    pub(super) fn call_queue(&self, thread: usize) -> &CallQueue {
        &self.call_queues[thread % self.call_queues.len()]
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

/// Whether a handle bypasses the page cache: its number is odd then.
pub(super) fn bypasses_cache(handle: FileHandle) -> bool {
    !handle.0.is_multiple_of(2)
}

#[derive(Debug, Default)]
struct NodeMaps {
    by_ino: HashMap<u64, Arc<FuseNode>>,
    by_name: BTreeMap<String, Arc<FuseNode>>,
}

/// All files, and their shared state.
#[derive(Debug)]
pub(super) struct NodeTable {
    /// The mount point.
    pub(super) directory: PathBuf,
    pub(super) buffers: Arc<BufferPool>,
    pub(super) created: SystemTime,
    /// Number of session threads that have a number.
    pub(super) threads: AtomicUsize,
    /// For notifications to the kernel, once there is a session.
    pub(super) notifier: OnceLock<Notifier>,
    /// Has one more reference per thread that seeks holes.
    pub(super) seeks: Arc<()>,
    next_handle: AtomicU64,
    table: RwLock<NodeMaps>,
    next: AtomicU64,
}

impl NodeTable {
    pub(super) fn new(directory: PathBuf) -> Self {
        Self {
            directory,
            buffers: Arc::new(BufferPool::new()),
            created: SystemTime::now(),
            threads: AtomicUsize::new(0),
            notifier: OnceLock::new(),
            seeks: Arc::default(),
            next_handle: AtomicU64::new(0),
            table: RwLock::default(),
            next: AtomicU64::new(INodeNo::ROOT.0 + 1),
        }
    }

    /// Opens a file. A `direct` handle bypasses the page cache if no other handle uses it.
    pub(super) fn open(
        &self,
        node: &FuseNode,
        writes: bool,
        direct: bool,
    ) -> std::result::Result<FileHandle, Errno> {
        let mut state = node.state();
        if state.closed {
            return Err(Errno::ESTALE);
        }
        if state.zeroing {
            return Err(Errno::EBUSY);
        }
        state.opens += 1;
        if writes {
            node.set_untouched(true);
        }
        let bypass = direct && state.cached == 0;
        state.cached += u32::from(!bypass);
        let handle = FileHandle(self.next_handle.fetch_add(2, Ordering::Relaxed) | u64::from(bypass));
        if writes && !bypass {
            state.writers.insert(handle.0, false);
        }
        Ok(handle)
    }

    /// The attributes of the directory.
    pub(super) fn root(&self) -> FileAttr {
        let created = self.created;
        FileAttr {
            ino: INodeNo::ROOT,
            size: 0,
            blocks: 0,
            atime: created,
            mtime: created,
            ctime: created,
            crtime: created,
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

    /// Adds a file.
    pub(super) fn insert(
        &self,
        name: String,
        geometry: &Geometry,
        image: Weak<Image>,
        call_queues: Vec<Arc<CallQueue>>,
    ) -> Result<Arc<FuseNode>> {
        let Geometry { size, block_size, read_only, .. } = *geometry;
        if call_queues.is_empty() {
            return Err(Error::new(Kind::Internal, "a file without queues"));
        }
        let now = SystemTime::now();
        let state = NodeState {
            opens: 0,
            cached: 0,
            writers: BTreeMap::new(),
            closed: false,
            zeroing: false,
            mode: if read_only { 0o400 } else { 0o600 },
            uid: 0,
            gid: 0,
            accessed: now,
            modified: now,
        };
        let node = Arc::new(FuseNode {
            ino: self.next.fetch_add(1, Ordering::Relaxed),
            name: name.clone(),
            block_size,
            read_only,
            call_queues: call_queues.into(),
            size: AtomicU64::new(size),
            untouched: AtomicBool::new(false),
            correcting: AtomicU8::new(FuseNode::IDLE),
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

    /// Removes a file, also for its open handles.
    pub(super) fn remove(&self, node: &FuseNode) {
        let mut table = self.table.write().unwrap_or_else(PoisonError::into_inner);
        if table.by_ino.remove(&node.ino).is_some() {
            table.by_name.remove(&node.name);
        }
    }

    pub(super) fn get(&self, ino: INodeNo) -> Option<Arc<FuseNode>> {
        self.table.read().unwrap_or_else(PoisonError::into_inner).by_ino.get(&ino.0).cloned()
    }

    pub(super) fn by_name(&self, name: &str) -> Option<Arc<FuseNode>> {
        self.table.read().unwrap_or_else(PoisonError::into_inner).by_name.get(name).cloned()
    }

    /// Inode numbers and names.
    pub(super) fn list(&self) -> Vec<(u64, String)> {
        let table = self.table.read().unwrap_or_else(PoisonError::into_inner);
        table.by_name.iter().map(|(name, node)| (node.ino, name.clone())).collect()
    }

    /// A cached write may grow a file in the kernel before we see it. Truncates it back on another
    /// thread: session threads must not wait for the kernel here.
    pub(super) fn correct_size(&self, node: &Arc<FuseNode>) {
        if node.correcting.swap(FuseNode::AGAIN, Ordering::AcqRel) != FuseNode::IDLE {
            return;
        }
        let (correcting, path) = (node.clone(), self.directory.join(&node.name));
        let correct = move || {
            let node = correcting;
            loop {
                node.correcting.store(FuseNode::RUNNING, Ordering::Release);
                // Rejected after a resize by another thread, which has set the size itself.
                let _ = sys::truncate(&path, node.size());
                let (running, idle) = (FuseNode::RUNNING, FuseNode::IDLE);
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
            node.correcting.store(FuseNode::IDLE, Ordering::Release);
        }
    }
}
