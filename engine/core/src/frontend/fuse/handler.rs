// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The file system's operations: each is answered at once or becomes a call for a worker.
//!
//! Runs on the session threads. Nothing here waits, except for space in a full call queue. Nothing
//! here makes a system call that one of these threads would have to serve.
//!
//! The size of a file is that of its device and fixed. Operations that a disk does not have:
//!
//! | operation | answer |
//! |---|---|
//! | O_TRUNC, ftruncate to 0 | the content is dropped: the file reads as zeroes (cp skips holes and relies on it) and keeps its size. EBUSY if others have it open, since their cached pages would reappear |
//! | any other truncation | EPERM if shorter, ENOSPC if longer |
//! | a write past the end | the part that fits is written; ENOSPC: for a cached write from fsync, close and the next write after write-back |
//! | punching a hole, zeroing a range, allocating blocks | as the image supports it; allocating past the end: ENOSPC |
//! | other fallocate modes | EOPNOTSUPP |
//! | SEEK_HOLE, SEEK_DATA | as the image supports it |
//! | a direct transfer that is not a multiple of the block size | EINVAL |
//! | making, removing, renaming files | EPERM |
//!
//! The kernel caches writes and sends whole pages, cut off at the file's end, which is a multiple
//! of the block size. Any other request would fail rather than be rounded.

use std::cell::Cell;
use std::ffi::OsStr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::SystemTime;

use fuser::{
    BsdFileFlags, Errno, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, InitFlags,
    KernelConfig, LockOwner, OpenAccMode, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData,
    ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyIoctl, ReplyLseek, ReplyOpen, ReplyWrite, ReplyXattr,
    Request, TimeOrNow, WriteFlags,
};

use super::MAX_REQUEST;
use super::call_queue::{FuseCall, FuseReply};
use super::node::{FuseNode, NodeTable, TTL, bypasses_cache};
use super::space;
use crate::request::Op;

/// Maximum number of background requests of the kernel for all files of the file system: readahead,
/// write-back, asynchronous direct I/O.
const BACKGROUND: u16 = 512;

/// The callbacks of fuser.
pub(super) struct Handler {
    nodes: Arc<NodeTable>,
    /// Direct I/O may bypass the page cache entirely.
    bypass: bool,
}

thread_local! {
    /// Number of this session thread. Each thread serves one file system.
    static THREAD: Cell<Option<usize>> = const { Cell::new(None) };
}

impl Handler {
    pub(super) fn new(nodes: Arc<NodeTable>) -> Self {
        Self { nodes, bypass: false }
    }

    fn thread(&self) -> usize {
        THREAD.get().unwrap_or_else(|| {
            let number = self.nodes.threads.fetch_add(1, Ordering::Relaxed);
            THREAD.set(Some(number));
            number
        })
    }

    /// Sends a call to the worker of this thread.
    fn send(&self, node: &FuseNode, call: FuseCall) {
        node.set_untouched(false);
        node.call_queue(self.thread()).send(call);
    }
}

fn is_block_aligned(node: &FuseNode, offset: u64, len: u64) -> bool {
    let block = u64::from(node.block_size);
    offset.is_multiple_of(block) && len.is_multiple_of(block)
}

fn time(time: TimeOrNow) -> SystemTime {
    match time {
        TimeOrNow::SpecificTime(time) => time,
        TimeOrNow::Now => SystemTime::now(),
    }
}

impl Filesystem for Handler {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> std::io::Result<()> {
        // Without it, cached writes would have arbitrary lengths and offsets.
        let needed = InitFlags::FUSE_WRITEBACK_CACHE;
        config.add_capabilities(needed).map_err(|_| std::io::ErrorKind::Unsupported)?;
        for wanted in [
            InitFlags::FUSE_ASYNC_DIO,
            InitFlags::FUSE_PARALLEL_DIROPS,
            // Content changes only through this file system.
            InitFlags::FUSE_EXPLICIT_INVAL_DATA,
        ] {
            // Optional: without it the kernel is slower.
            let _ = config.add_capabilities(wanted);
        }
        // Kernels with this flag (Linux 6.6) keep the page cache coherent when it is bypassed.
        self.bypass = config.add_capabilities(InitFlags::FUSE_DIRECT_IO_ALLOW_MMAP).is_ok();
        // Larger requests would fail.
        config.set_max_write(MAX_REQUEST).map_err(|_| std::io::ErrorKind::Unsupported)?;
        // Only 0 is rejected.
        let _ = config.set_max_background(BACKGROUND);
        let _ = config.set_congestion_threshold(BACKGROUND / 4 * 3);
        Ok(())
    }

    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let found =
            name.to_str().filter(|_| parent == INodeNo::ROOT).and_then(|name| self.nodes.by_name(name));
        match found {
            Some(node) => reply.entry(&node.ttl(), &node.attr(), Generation(0)),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _: &Request, ino: INodeNo, handle: Option<FileHandle>, reply: ReplyAttr) {
        match self.nodes.get(ino) {
            // The kernel passes an open file before a write to it, and aborts the write on an
            // error.
            Some(node) if handle.is_some_and(|handle| node.take_overrun(handle)) => {
                reply.error(Errno::ENOSPC)
            }
            Some(node) => reply.attr(&node.ttl(), &node.attr()),
            None if ino == INodeNo::ROOT => reply.attr(&TTL, &self.nodes.root()),
            // The kernel repeats the lookup.
            None => reply.error(Errno::ESTALE),
        }
    }

    fn setattr(
        &self,
        _: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        accessed: Option<TimeOrNow>,
        modified: Option<TimeOrNow>,
        _: Option<SystemTime>,
        handle: Option<FileHandle>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let Some(node) = self.nodes.get(ino) else {
            return reply.error(if ino == INodeNo::ROOT { Errno::EPERM } else { Errno::ESTALE });
        };
        {
            let mut state = node.state();
            if let Some(mode) = mode {
                let writable = if node.read_only { 0 } else { 0o222 };
                state.mode = mode as u16 & (0o555 | writable);
            }
            state.uid = uid.unwrap_or(state.uid);
            state.gid = gid.unwrap_or(state.gid);
            state.accessed = accessed.map_or(state.accessed, time);
            state.modified = modified.map_or(state.modified, time);
        }
        let now = node.size();
        match size {
            None => reply.attr(&node.ttl(), &node.attr()),
            Some(size) if size == now => reply.attr(&node.ttl(), &node.attr()),
            Some(size) if size > now => reply.error(Errno::ENOSPC),
            // Opening with O_TRUNC: a truncation without a handle, by the process that opens it.
            Some(0) if !node.read_only => {
                let nodes = handle.is_some().then(|| self.nodes.clone());
                space::zero_file(node, nodes, self.thread(), reply)
            }
            // Cached pages beyond the new end could reappear.
            Some(_) => reply.error(Errno::EPERM),
        }
    }

    fn open(&self, _: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let Some(node) = self.nodes.get(ino) else { return reply.error(Errno::ESTALE) };
        let writes = flags.acc_mode() != OpenAccMode::O_RDONLY;
        if writes && node.read_only {
            return reply.error(Errno::EROFS);
        }
        // Direct writes that bypass the cache run in parallel; otherwise they are serialized.
        let direct = self.bypass && flags.0 & libc::O_DIRECT != 0;
        match self.nodes.open(&node, writes, direct) {
            Ok(handle) => {
                // Never FOPEN_KEEP_CACHE: an opener must see earlier writes that bypassed the cache.
                let mut answer = FopenFlags::empty();
                let bypass = FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES;
                answer.set(bypass, bypasses_cache(handle));
                reply.opened(handle, answer);
            }
            Err(error) => reply.error(error),
        }
    }

    fn release(
        &self,
        _: &Request,
        ino: INodeNo,
        handle: FileHandle,
        _: OpenFlags,
        _: Option<LockOwner>,
        _: bool,
        reply: ReplyEmpty,
    ) {
        if let Some(node) = self.nodes.get(ino) {
            node.release(handle);
        }
        reply.ok();
    }

    fn read(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let Some(node) = self.nodes.get(ino) else { return reply.error(Errno::ENODEV) };
        let len = node.size().saturating_sub(offset).min(size.into());
        if len == 0 {
            return reply.data(&[]);
        }
        if !is_block_aligned(&node, offset, len) {
            return reply.error(Errno::EINVAL);
        }
        if len > u64::from(MAX_REQUEST) {
            return reply.error(Errno::EIO);
        }
        let answer = FuseReply::Data(reply);
        self.send(&node, FuseCall { op: Op::Read, offset, len, buffer: None, answer });
    }

    fn write(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        write_flags: WriteFlags,
        flags: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let Some(node) = self.nodes.get(ino) else { return reply.error(Errno::ENODEV) };
        let len = node.size().saturating_sub(offset).min(data.len() as u64);
        let fits = len == data.len() as u64;
        let cached = write_flags.contains(WriteFlags::FUSE_WRITE_CACHE);
        if !fits {
            if cached {
                node.record_overrun();
            }
            self.nodes.correct_size(&node);
        }
        if len == 0 {
            return if fits { reply.written(0) } else { reply.error(Errno::ENOSPC) };
        }
        if !is_block_aligned(&node, offset, len) {
            return reply.error(Errno::EINVAL);
        }
        let Some(buffer) = self.nodes.buffers.take_filled(&data[..len as usize]) else {
            return reply.error(Errno::EIO);
        };
        // A direct writer gets a short count and retries the rest.
        let answer = FuseReply::Written(reply, (cached && !fits).then_some(Errno::ENOSPC));
        // For an asynchronous direct write the kernel sends these flags instead of an fsync.
        let op = Op::Write { fua: flags.0 & libc::O_DSYNC != 0 };
        self.send(&node, FuseCall { op, offset, len, buffer: Some(buffer), answer });
    }

    fn fsync(&self, _: &Request, ino: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        let Some(node) = self.nodes.get(ino) else { return reply.error(Errno::ENODEV) };
        let answer = FuseReply::Done(reply);
        self.send(&node, FuseCall { op: Op::Flush, offset: 0, len: 0, buffer: None, answer });
    }

    fn fallocate(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        len: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let Some(node) = self.nodes.get(ino) else { return reply.error(Errno::ENODEV) };
        match space::fallocate(node.size(), offset, len, mode) {
            Err(error) => reply.error(error),
            Ok((_, 0)) => reply.ok(),
            Ok((op, len)) => {
                self.send(&node, FuseCall { op, offset, len, buffer: None, answer: FuseReply::Done(reply) })
            }
        }
    }

    /// Called at every close. The cache is written back by now; durability is the job of fsync.
    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }

    fn readdir(&self, _: &Request, ino: INodeNo, _: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        if ino != INodeNo::ROOT {
            return reply.error(Errno::ENOTDIR);
        }
        let dots = [".", ".."].map(|name| (INodeNo::ROOT, FileType::Directory, name.to_owned()));
        let files =
            self.nodes.list().into_iter().map(|(ino, name)| (INodeNo(ino), FileType::RegularFile, name));
        let from = usize::try_from(offset).unwrap_or(usize::MAX);
        for (at, (ino, kind, name)) in dots.into_iter().chain(files).enumerate().skip(from) {
            if reply.add(ino, at as u64 + 1, kind, name) {
                break;
            }
        }
        reply.ok();
    }

    fn fsyncdir(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        reply.ok();
    }

    fn mknod(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, _: u32, _: u32, reply: ReplyEntry) {
        reply.error(Errno::EPERM);
    }

    fn mkdir(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, _: u32, reply: ReplyEntry) {
        reply.error(Errno::EPERM);
    }

    fn create(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, _: u32, _: i32, reply: ReplyCreate) {
        reply.error(Errno::EPERM);
    }

    fn unlink(&self, _: &Request, _: INodeNo, _: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::EPERM);
    }

    fn rmdir(&self, _: &Request, _: INodeNo, _: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::EPERM);
    }

    fn symlink(&self, _: &Request, _: INodeNo, _: &OsStr, _: &std::path::Path, reply: ReplyEntry) {
        reply.error(Errno::EPERM);
    }

    fn link(&self, _: &Request, _: INodeNo, _: INodeNo, _: &OsStr, reply: ReplyEntry) {
        reply.error(Errno::EPERM);
    }

    fn rename(
        &self,
        _: &Request,
        _: INodeNo,
        _: &OsStr,
        _: INodeNo,
        _: &OsStr,
        _: RenameFlags,
        reply: ReplyEmpty,
    ) {
        reply.error(Errno::EPERM);
    }

    // After ENOSYS the kernel never asks again.

    fn getxattr(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, reply: ReplyXattr) {
        reply.error(Errno::ENOSYS);
    }

    fn listxattr(&self, _: &Request, _: INodeNo, _: u32, reply: ReplyXattr) {
        reply.error(Errno::ENOSYS);
    }

    fn setxattr(&self, _: &Request, _: INodeNo, _: &OsStr, _: &[u8], _: i32, _: u32, reply: ReplyEmpty) {
        reply.error(Errno::ENOSYS);
    }

    fn removexattr(&self, _: &Request, _: INodeNo, _: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::ENOSYS);
    }

    fn lseek(&self, _: &Request, ino: INodeNo, _: FileHandle, from: i64, whence: i32, reply: ReplyLseek) {
        match self.nodes.get(ino) {
            Some(node) => space::seek(&self.nodes, node, from, whence, reply),
            None => reply.error(Errno::ENODEV),
        }
    }

    fn copy_file_range(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        _: u64,
        _: INodeNo,
        _: FileHandle,
        _: u64,
        _: u64,
        _: fuser::CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        reply.error(Errno::ENOSYS);
    }

    fn ioctl(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        _: fuser::IoctlFlags,
        _: u32,
        _: &[u8],
        _: u32,
        reply: ReplyIoctl,
    ) {
        // Programs that look for a disk ask repeatedly; ENOSYS would disable all ioctls.
        reply.error(Errno::ENOTTY);
    }

    fn poll(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        _: fuser::PollNotifier,
        _: fuser::PollEvents,
        _: fuser::PollFlags,
        reply: fuser::ReplyPoll,
    ) {
        reply.error(Errno::ENOSYS);
    }
}
