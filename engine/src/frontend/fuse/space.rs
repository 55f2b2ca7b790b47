//! The space of a file: what is given up, zeroed, reserved, or a hole.
//!
//! Knows which of it means what for a file whose size is fixed. What may wait for the image's file system or
//! for the kernel runs on a thread of its own, never on a session thread.

use std::sync::Arc;
use std::time::Instant;

use fuser::{Errno, ReplyAttr, ReplyLseek};

use super::lane::{Answer, Call};
use super::node::{Emptying, Node, Nodes, PAUSE, SOON};
use crate::request::Op;

/// Threads of a file system that look for holes, at most: beyond them all is data.
const SEEKS_MAX: usize = 16;

/// Zeroes the whole file for its only user; with `nodes`, drops what the kernel caches of it too. Who closed
/// it just now is still counted: that is waited for, though not by a session thread.
pub(super) fn empty(node: Arc<Node>, nodes: Option<Arc<Nodes>>, thread: usize, reply: ReplyAttr) {
    let dropped = nodes.is_some();
    let send = move |node: Arc<Node>, reply: ReplyAttr| {
        let (op, len) = (Op::WriteZeroes { unmap: true, fua: false }, node.size());
        let answer = match nodes {
            Some(nodes) => Answer::Truncated(reply, node.clone(), nodes),
            None => Answer::Emptied(reply, node.clone()),
        };
        node.lane(thread).send(Call { op, offset: 0, len, buffer: None, answer });
    };
    match node.begin_emptying(dropped) {
        Emptying::Begun => send(node, reply),
        Emptying::Refused => reply.error(Errno::EBUSY),
        Emptying::NotYet => {
            let wait = move || {
                let deadline = Instant::now() + SOON;
                loop {
                    match node.begin_emptying(dropped) {
                        Emptying::Begun => return send(node, reply),
                        Emptying::NotYet if Instant::now() < deadline => std::thread::sleep(PAUSE),
                        _ => return reply.error(Errno::EBUSY),
                    }
                }
            };
            // Where that fails the reply is dropped, which answers with EIO.
            let _ = std::thread::Builder::new().name("fuse empty".to_owned()).spawn(wait);
        }
    }
}

/// What fallocate(2) of a file of this size asks of the image, and how many bytes from `offset` on.
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
    // Beyond the end there is nothing to zero, and nothing to reserve.
    if inside < len && (op == Op::Reserve || mode & KEEP == 0) {
        return Err(Errno::ENOSPC);
    }
    Ok((op, inside))
}

/// Where the next data or the next hole begins.
pub(super) fn seek(nodes: &Nodes, node: Arc<Node>, from: i64, whence: i32, reply: ReplyLseek) {
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
    let look = move || {
        let _counted = seeks;
        // What is cached and not written yet is no hole. ENOENT: the kernel caches nothing of the file.
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
    // Where that fails the reply is dropped, which answers with EIO.
    let _ = std::thread::Builder::new().name("fuse seek".to_owned()).spawn(look);
}
