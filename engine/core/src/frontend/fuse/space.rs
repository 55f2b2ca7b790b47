// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The space of a file: truncation, zeroing, allocation, holes.
//!
//! Knows their meaning for a file of fixed size. Whatever may wait for the image's file system or
//! the kernel runs on its own thread, never on a session thread.

use std::sync::Arc;
use std::time::Instant;

use fuser::{Errno, FileAttr, ReplyAttr, ReplyLseek};

use super::call_queue::{FuseCall, FuseReply, ZeroedReply};
use super::node::{FuseNode, NodeTable, POLL_INTERVAL, RELEASE_TIMEOUT, TTL, ZeroingStart};
use crate::request::Op;

/// Maximum number of seeking threads of a file system; beyond it everything is data.
const SEEKS_MAX: usize = 16;

/// A file that is being zeroed, and the caller that waits for it.
#[derive(Debug)]
struct ZeroedFile {
    reply: ReplyAttr,
    node: Arc<FuseNode>,
    /// Have the kernel drop its cache: report size 0 first, the true size later.
    nodes: Option<Arc<NodeTable>>,
}

impl ZeroedReply for ZeroedFile {
    fn reply(self: Box<Self>, zeroed: Result<(), Errno>) {
        let ZeroedFile { reply, node, nodes } = *self;
        node.state().zeroing = false;
        match (zeroed, nodes) {
            (Err(error), _) => reply.error(error),
            (Ok(()), None) => reply.attr(&TTL, &node.attr()),
            (Ok(()), Some(nodes)) => {
                reply.attr(&TTL, &FileAttr { size: 0, ..node.attr() });
                nodes.correct_size(&node);
            }
        }
    }
}

/// Zeroes the whole file for its only handle; with `nodes`, drops the kernel's cache too. A handle
/// that was just closed still counts: a separate thread waits for it.
pub(super) fn zero_file(node: Arc<FuseNode>, nodes: Option<Arc<NodeTable>>, thread: usize, reply: ReplyAttr) {
    let dropped = nodes.is_some();
    let send = move |node: Arc<FuseNode>, reply: ReplyAttr| {
        let (op, len) = (Op::WriteZeroes { unmap: true, fua: false }, node.size());
        let answer = FuseReply::Zeroed(Box::new(ZeroedFile { reply, node: node.clone(), nodes }));
        node.call_queue(thread).send(FuseCall { op, offset: 0, len, buffer: None, answer });
    };
    match node.start_zeroing(dropped) {
        ZeroingStart::Started => send(node, reply),
        ZeroingStart::Busy => reply.error(Errno::EBUSY),
        ZeroingStart::NotYet => {
            let wait = move || {
                let deadline = Instant::now() + RELEASE_TIMEOUT;
                loop {
                    match node.start_zeroing(dropped) {
                        ZeroingStart::Started => return send(node, reply),
                        ZeroingStart::NotYet if Instant::now() < deadline => {
                            std::thread::sleep(POLL_INTERVAL)
                        }
                        _ => return reply.error(Errno::EBUSY),
                    }
                }
            };
            // If that fails the reply is dropped, which answers with EIO.
            let _ = std::thread::Builder::new().name("fuse empty".to_owned()).spawn(wait);
        }
    }
}

/// The operation on the image for fallocate(2) on a file of this size, and its length from
/// `offset`.
pub(super) fn fallocate(size: u64, offset: u64, len: u64, mode: i32) -> Result<(Op, u64), Errno> {
    const KEEP: i32 = libc::FALLOC_FL_KEEP_SIZE;
    let zeroes = |unmap| Op::WriteZeroes { unmap, fua: false };
    let op = match mode & !KEEP {
        0 => Op::Reserve,
        libc::FALLOC_FL_PUNCH_HOLE => zeroes(true),
        libc::FALLOC_FL_ZERO_RANGE => zeroes(false),
        _ => return Err(Errno::EOPNOTSUPP),
    };
    let inside = size.saturating_sub(offset).min(len);
    // Beyond the end nothing can be zeroed or allocated.
    if inside < len && (op == Op::Reserve || mode & KEEP == 0) {
        return Err(Errno::ENOSPC);
    }
    Ok((op, inside))
}

/// Finds the next data or the next hole.
pub(super) fn seek(nodes: &NodeTable, node: Arc<FuseNode>, from: i64, whence: i32, reply: ReplyLseek) {
    let size = node.size();
    let from = match u64::try_from(from) {
        Ok(from) if from < size => from,
        _ => return reply.error(Errno::ENXIO),
    };
    let hole = match whence {
        libc::SEEK_DATA => false,
        libc::SEEK_HOLE => true,
        _ => return reply.error(Errno::EINVAL),
    };
    let all_data = if hole { size } else { from };
    let (seeks, notifier) = (nodes.seeks.clone(), nodes.notifier.get().cloned());
    let (Some(notifier), true) = (notifier, Arc::strong_count(&seeks) <= SEEKS_MAX + 1) else {
        return reply.offset(all_data.cast_signed());
    };
    let take_calls = move || {
        let _counted = seeks;
        // Cached data is no hole. ENOENT: the kernel caches nothing of the file.
        let written = node.state().writers.is_empty()
            || match notifier.inval_inode(fuser::INodeNo(node.ino), from.cast_signed(), 0) {
                Ok(()) => true,
                Err(error) => error.raw_os_error() == Some(libc::ENOENT),
            };
        let found = match node.image.upgrade() {
            Some(image) if written => image.seek(from, size, hole),
            _ => Ok(Some(all_data)),
        };
        match found {
            Ok(Some(found)) => reply.offset(found.cast_signed()),
            Ok(None) => reply.error(Errno::ENXIO),
            Err(error) => reply.error(Errno::from_i32(error.raw_os_error())),
        }
    };
    // If that fails the reply is dropped, which answers with EIO.
    let _ = std::thread::Builder::new().name("fuse seek".to_owned()).spawn(take_calls);
}
