// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Handles the kernel's requests.
//!
//! Knows which operations the directory supports, and the pool's operation for each. Permissions
//! are the kernel's to check, from the owners and modes that it gets here.
//!
//! | request | reply |
//! |---|---|
//! | open of loopN | none: the kernel opens block devices itself |
//! | ioctl of loop-control | LOOP_CTL_ADD, _REMOVE, _GET_FREE; anything else ENOSYS, of which FUSE makes ENOTTY |
//! | unlink of loopN | LOOP_CTL_REMOVE |
//! | unlink of loop-control, of a partition | EPERM |
//! | rename | EPERM: every tool takes loopN for number N |
//! | mknod, mkdir, symlink, link, rmdir, create | EPERM |
//! | read, write of loop-control | EINVAL, as from the character device |
//! | truncate of loop-control, utimes | success, without effect |
//! | any request on an inode of a removed device | ESTALE |

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use super::inode_table::{InodeTable, NodeKey};
use super::wire::{CONTROL, LoopfsOp, LoopfsReply, LoopfsRequest, ROOT, refuse};
use crate::loops::{Answer, Errno, LoopOp};
use crate::sys::ioctl;

/// Maximum bytes of a reply to READDIR.
const LISTING_MAX: usize = 64 << 10;

/// Handles the requests of one directory.
#[derive(Debug)]
pub(super) struct RequestHandler {
    nodes: Arc<InodeTable>,
}

impl RequestHandler {
    pub(super) fn new(nodes: Arc<InodeTable>) -> RequestHandler {
        RequestHandler { nodes }
    }

    /// Handles one request.
    pub(super) fn handle(&self, request: &LoopfsRequest<'_>, fuse: BorrowedFd<'_>) {
        match self.reply(request) {
            Ok(Some(reply)) => reply.send(fuse, request.unique),
            Ok(None) => {}
            Err(errno) => refuse(fuse, request.unique, errno),
        }
    }

    /// The reply; none where the kernel expects none.
    fn reply(&self, request: &LoopfsRequest<'_>) -> Answer<Option<LoopfsReply>> {
        let (nodes, node) = (&self.nodes, request.node);
        let reply = match request.op {
            LoopfsOp::Init if request.version() == Some(7) => LoopfsReply::init(),
            LoopfsOp::Init => return Err(Errno::PROTO),
            LoopfsOp::Forget => return Ok(None),
            LoopfsOp::Lookup => LoopfsReply::entry(&nodes.lookup(in_root(request)?)?),
            LoopfsOp::GetAttr => LoopfsReply::attr(&nodes.attr(node)?),
            LoopfsOp::SetAttr => {
                LoopfsReply::attr(&nodes.change(node, request.changes().ok_or(Errno::INVAL)?)?)
            }
            LoopfsOp::Open => nodes.key(node).map(|key| LoopfsReply::opened(key == NodeKey::Control))?,
            LoopfsOp::Close => LoopfsReply::done(),
            LoopfsOp::ReadDir => self.list(request)?,
            LoopfsOp::StatFs => self.statfs(),
            LoopfsOp::Unlink => self.unlink(in_root(request)?).map(|()| LoopfsReply::done())?,
            LoopfsOp::Ioctl if node == CONTROL => {
                let (command, argument) = request.ioctl().ok_or(Errno::INVAL)?;
                LoopfsReply::ioctl(match self.control(command, argument) {
                    Ok(number) => i32::try_from(number).unwrap_or(i32::MAX),
                    Err(errno) => -errno.raw_os_error(),
                })
            }
            LoopfsOp::Ioctl => return Err(Errno::NOTTY),
            LoopfsOp::Change => return Err(Errno::PERM),
            LoopfsOp::Transfer => return Err(Errno::INVAL),
            LoopfsOp::Other => return Err(Errno::NOSYS),
        };
        Ok(Some(reply))
    }

    /// An ioctl of loop-control. The driver uses 32 bits of the argument.
    fn control(&self, command: u32, argument: u64) -> Answer<u32> {
        let devices = self.nodes.devices();
        match command {
            ioctl::LOOP_CTL_ADD => devices.control_op(LoopOp::Add(argument as u32 as i32)),
            ioctl::LOOP_CTL_REMOVE => devices.control_op(LoopOp::Remove(argument as u32 as i32)),
            ioctl::LOOP_CTL_GET_FREE => devices.control_op(LoopOp::GetFree),
            _ => Err(Errno::NOSYS),
        }
    }

    fn unlink(&self, name: &str) -> Answer<()> {
        self.nodes.lookup(name)?;
        match NodeKey::of(name) {
            Some(NodeKey::Device(device)) => {
                let number = i32::try_from(device).map_err(|_| Errno::INVAL)?;
                self.nodes.devices().control_op(LoopOp::Remove(number)).map(drop)
            }
            _ => Err(Errno::PERM),
        }
    }

    fn list(&self, request: &LoopfsRequest<'_>) -> Answer<LoopfsReply> {
        let (after, max) = request.listing().ok_or(Errno::INVAL)?;
        if request.node != ROOT {
            return Err(Errno::NOTDIR);
        }
        let max = max.min(LISTING_MAX);
        let mut reply = LoopfsReply::done();
        if after == 0 {
            reply = reply.listed(max, ROOT, 1, DIRECTORY, ".").map_err(|_| Errno::INVAL)?;
        }
        for (offset, attr, name) in self.nodes.list(after) {
            reply = match reply.listed(max, attr.ino, offset, attr.mode, &name) {
                Ok(more) => more,
                Err(full) => return Ok(full),
            };
        }
        Ok(reply)
    }

    fn statfs(&self) -> LoopfsReply {
        let devices = self.nodes.devices();
        let max = u64::from(devices.spec().max);
        let used = devices.entries().len() as u64;
        LoopfsReply::statfs(max, max.saturating_sub(used))
    }
}

const DIRECTORY: u32 = 0o040000;

/// The name in a request on a directory entry. There is only the root directory.
fn in_root<'a>(request: &LoopfsRequest<'a>) -> Answer<&'a str> {
    match request.node {
        ROOT => request.name().ok_or(Errno::NOENT),
        _ => Err(Errno::NOTDIR),
    }
}
