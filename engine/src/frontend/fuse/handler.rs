//! What the kernel asks of the file system, answered at once or made into a call for a worker.
//!
//! Runs on the session threads. Nothing here waits but for room in a full lane, and nothing here
//! asks the kernel anything that one of these threads would have to answer.
//!
//! A file is as large as its device and stays so. What is more than a disk can do:
//!
//! | asked for | answer |
//! |---|---|
//! | O_TRUNC, ftruncate to 0 | the content is given up: the file reads as zeroes (cp skips holes and relies on it), and is as long as before. EBUSY if others have it open, for their cached pages would come back |
//! | truncation to another size in any other way | EPERM if shorter, ENOSPC if longer |
//! | a write past the end | what fits is written; ENOSPC: of a cached write, to fsync, close and the next write after the kernel has written back |
//! | punching a hole, zeroing a range, reserving blocks | as the image can; reserving past the end: ENOSPC |
//! | anything else of fallocate | EOPNOTSUPP |
//! | SEEK_HOLE, SEEK_DATA | as the image has them; without them where it has not |
//! | a direct transfer that is no multiple of the block size | EINVAL |
//! | making, removing, renaming files | EPERM |
//!
//! The kernel caches writes and sends whole pages, cut off at the file's end, which is a multiple of
//! the block size. Were it not so after all, the request would fail rather than be rounded.

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
use super::lane::{Answer, Call};
use super::node::{Node, Nodes, TTL};
use super::space;
use crate::request::Op;

/// Requests that the kernel may send on its own, for all files of the file system: read ahead,
/// write back, asynchronous direct I/O.
const BACKGROUND: u16 = 512;

/// The callbacks of fuser.
pub(super) struct Handler {
    nodes: Arc<Nodes>,
    /// Direct I/O may bypass the page cache altogether.
    bypass: bool,
}

thread_local! {
    /// Number of this session thread. A thread serves one file system only.
    static THREAD: Cell<Option<usize>> = const { Cell::new(None) };
}

impl Handler {
    pub(super) fn new(nodes: Arc<Nodes>) -> Self {
        Self { nodes, bypass: false }
    }

    fn thread(&self) -> usize {
        THREAD.get().unwrap_or_else(|| {
            let number = self.nodes.threads.fetch_add(1, Ordering::Relaxed);
            THREAD.set(Some(number));
            number
        })
    }

    /// Hands a call to the worker of this thread.
    fn send(&self, node: &Node, call: Call) {
        node.set_fresh(false);
        node.lane(self.thread()).send(call);
    }
}

fn is_whole(node: &Node, offset: u64, len: u64) -> bool {
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
        // Without it, cached writes would come with any length, at any offset.
        let needed = InitFlags::FUSE_WRITEBACK_CACHE;
        config.add_capabilities(needed).map_err(|_| std::io::ErrorKind::Unsupported)?;
        for wanted in [
            InitFlags::FUSE_ASYNC_DIO,
            InitFlags::FUSE_PARALLEL_DIROPS,
            // Content changes through this file system only.
            InitFlags::FUSE_EXPLICIT_INVAL_DATA,
        ] {
            // A kernel without one is slower.
            let _ = config.add_capabilities(wanted);
        }
        // Of all kernels that can bypass the cache, those with this one (Linux 6.6) mind what is in it.
        self.bypass = config.add_capabilities(InitFlags::FUSE_DIRECT_IO_ALLOW_MMAP).is_ok();
        // Larger requests would fail.
        config.set_max_write(MAX_REQUEST).map_err(|_| std::io::ErrorKind::Unsupported)?;
        // Refused is only 0.
        let _ = config.set_max_background(BACKGROUND);
        let _ = config.set_congestion_threshold(BACKGROUND / 4 * 3);
        Ok(())
    }

    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let found = name.to_str().filter(|_| parent == INodeNo::ROOT).and_then(|name| self.nodes.named(name));
        match found {
            Some(node) => reply.entry(&node.ttl(), &node.attr(), Generation(0)),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _: &Request, ino: INodeNo, handle: Option<FileHandle>, reply: ReplyAttr) {
        match self.nodes.get(ino) {
            // The kernel names an open file when that is about to be written, and gives up if we do.
            Some(node) if handle.is_some_and(|handle| node.take_overrun(handle)) => {
                reply.error(Errno::ENOSPC)
            }
            Some(node) => reply.attr(&node.ttl(), &node.attr()),
            None if ino == INodeNo::ROOT => reply.attr(&TTL, &self.nodes.root()),
            // The kernel looks the name up once more.
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
            // Opening with O_TRUNC: a truncation without a handle, by who has just opened it.
            Some(0) if !node.read_only => {
                let nodes = handle.is_some().then(|| self.nodes.clone());
                space::empty(node, nodes, self.thread(), reply)
            }
            // Cached pages behind the new end could come back.
            Some(_) => reply.error(Errno::EPERM),
        }
    }

    fn open(&self, _: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let Some(node) = self.nodes.get(ino) else { return reply.error(Errno::ESTALE) };
        let writes = flags.acc_mode() != OpenAccMode::O_RDONLY;
        if writes && node.read_only {
            return reply.error(Errno::EROFS);
        }
        let mut state = node.state();
        if state.closed {
            return reply.error(Errno::ESTALE);
        }
        if state.emptying {
            return reply.error(Errno::EBUSY);
        }
        state.opens += 1;
        if writes {
            node.set_fresh(true);
        }
        // Past the cache direct writes go side by side; else each waits for those before it, even
        // with many threads. But only as long as nobody who uses the cache is there already.
        let bypass = self.bypass && flags.0 & libc::O_DIRECT != 0 && state.cached == 0;
        state.cached += u32::from(!bypass);
        let handle = self.nodes.new_handle(bypass);
        if writes && !bypass {
            state.writers.insert(handle.0, false);
        }
        drop(state);
        // Never FOPEN_KEEP_CACHE: who opens a file sees what was written past the cache before.
        let mut answer = FopenFlags::empty();
        answer.set(FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES, bypass);
        reply.opened(handle, answer);
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
            let mut state = node.state();
            state.opens = state.opens.saturating_sub(1);
            state.cached = state.cached.saturating_sub(u32::from(handle.0.is_multiple_of(2)));
            state.writers.remove(&handle.0);
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
        if !is_whole(&node, offset, len) {
            return reply.error(Errno::EINVAL);
        }
        if len > u64::from(MAX_REQUEST) {
            return reply.error(Errno::EIO);
        }
        let answer = Answer::Data(reply);
        self.send(&node, Call { op: Op::Read, offset, len, buffer: None, answer });
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
                node.note_overrun();
            }
            self.nodes.correct_size(&node);
        }
        if len == 0 {
            return if fits { reply.written(0) } else { reply.error(Errno::ENOSPC) };
        }
        if !is_whole(&node, offset, len) {
            return reply.error(Errno::EINVAL);
        }
        let Some(buffer) = self.nodes.buffers.take_filled(&data[..len as usize]) else {
            return reply.error(Errno::EIO);
        };
        // Who writes directly is told how much was written, and tries the rest again.
        let answer = Answer::Written(reply, (cached && !fits).then_some(Errno::ENOSPC));
        // Of an asynchronous direct write the kernel sends no fsync, but these flags.
        let op = Op::Write { fua: flags.0 & libc::O_DSYNC != 0 };
        self.send(&node, Call { op, offset, len, buffer: Some(buffer), answer });
    }

    fn fsync(&self, _: &Request, ino: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        let Some(node) = self.nodes.get(ino) else { return reply.error(Errno::ENODEV) };
        let answer = Answer::Done(reply);
        self.send(&node, Call { op: Op::Flush, offset: 0, len: 0, buffer: None, answer });
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
                self.send(&node, Call { op, offset, len, buffer: None, answer: Answer::Done(reply) })
            }
        }
    }

    /// At every close. What was cached is written by now; to make it durable is fsync's duty.
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

    // The kernel takes ENOSYS for "never ask again".

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
        // Asked again and again, by programs that look for a disk: ENOSYS would stand for all.
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
