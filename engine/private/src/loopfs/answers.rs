//! What each request of the kernel is answered.
//!
//! Knows what may be done in the directory, and by which operation of the pool. Who may is decided
//! by the kernel, from the owners and modes that are told here.
//!
//! | asked for | answer |
//! |---|---|
//! | open of loopN | is not asked: block devices are the kernel's business |
//! | ioctl of loop-control | LOOP_CTL_ADD, _REMOVE, _GET_FREE; anything else ENOSYS, of which FUSE makes ENOTTY |
//! | unlink of loopN | LOOP_CTL_REMOVE |
//! | unlink of loop-control, of a partition | EPERM |
//! | rename | EPERM: every tool takes loopN for number N |
//! | mknod, mkdir, symlink, link, rmdir, creating | EPERM |
//! | reading, writing loop-control | EINVAL, as the character device does |
//! | truncating it, setting times | nothing, with success |
//! | an inode of a device that is gone | ESTALE |

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use super::nodes::{CONTROL, Key, Nodes};
use super::wire::{Op, ROOT, Reply, Request, refuse};
use crate::loops::{Answer, Errno, LoopOp};
use crate::sys::ioctl;

/// Bytes of one answer to READDIR at the most.
const LISTING_MAX: usize = 64 << 10;

/// Answers for one directory.
#[derive(Debug)]
pub(super) struct Answers {
    nodes: Arc<Nodes>,
}

impl Answers {
    pub(super) fn new(nodes: Arc<Nodes>) -> Answers {
        Answers { nodes }
    }

    /// Answers one request.
    pub(super) fn answer(&self, request: &Request<'_>, fuse: BorrowedFd<'_>) {
        match self.reply(request) {
            Ok(Some(reply)) => reply.send(fuse, request.unique),
            Ok(None) => {}
            Err(errno) => refuse(fuse, request.unique, errno),
        }
    }

    /// The answer; none where nobody waits for one.
    fn reply(&self, request: &Request<'_>) -> Answer<Option<Reply>> {
        let (nodes, node) = (&self.nodes, request.node);
        let reply = match request.op {
            Op::Init if request.version() == Some(7) => Reply::init(),
            Op::Init => return Err(Errno::PROTO),
            Op::Forget => return Ok(None),
            Op::Lookup => Reply::entry(&nodes.named(in_root(request)?)?),
            Op::GetAttr => Reply::attr(&nodes.attr(node)?),
            Op::SetAttr => Reply::attr(&nodes.change(node, request.changes().ok_or(Errno::INVAL)?)?),
            Op::Open => nodes.key(node).map(|key| Reply::opened(key == Key::Control))?,
            Op::Close => Reply::done(),
            Op::ReadDir => self.list(request)?,
            Op::StatFs => self.statfs(),
            Op::Unlink => self.unlink(in_root(request)?).map(|()| Reply::done())?,
            Op::Ioctl if node == CONTROL => {
                let (command, argument) = request.ioctl().ok_or(Errno::INVAL)?;
                Reply::ioctl(match self.control(command, argument) {
                    Ok(number) => i32::try_from(number).unwrap_or(i32::MAX),
                    Err(errno) => -errno.raw_os_error(),
                })
            }
            Op::Ioctl => return Err(Errno::NOTTY),
            Op::Change => return Err(Errno::PERM),
            Op::Transfer => return Err(Errno::INVAL),
            Op::Other => return Err(Errno::NOSYS),
        };
        Ok(Some(reply))
    }

    /// An ioctl of loop-control. The argument is a number, of which the driver takes 32 bits.
    fn control(&self, command: u32, argument: u64) -> Answer<u32> {
        let devices = self.nodes.devices();
        match command {
            ioctl::LOOP_CTL_ADD => devices.control(LoopOp::Add(argument as u32 as i32)),
            ioctl::LOOP_CTL_REMOVE => devices.control(LoopOp::Remove(argument as u32 as i32)),
            ioctl::LOOP_CTL_GET_FREE => devices.control(LoopOp::GetFree),
            _ => Err(Errno::NOSYS),
        }
    }

    fn unlink(&self, name: &str) -> Answer<()> {
        self.nodes.named(name)?;
        match Key::of(name) {
            Some(Key::Device(device)) => {
                let number = i32::try_from(device).map_err(|_| Errno::INVAL)?;
                self.nodes.devices().control(LoopOp::Remove(number)).map(drop)
            }
            _ => Err(Errno::PERM),
        }
    }

    fn list(&self, request: &Request<'_>) -> Answer<Reply> {
        let (after, max) = request.listing().ok_or(Errno::INVAL)?;
        if request.node != ROOT {
            return Err(Errno::NOTDIR);
        }
        let max = max.min(LISTING_MAX);
        let mut reply = Reply::done();
        if after == 0 {
            reply = reply.listed(max, ROOT, 1, DIRECTORY, ".").map_err(|_| Errno::INVAL)?;
        }
        for (place, attr, name) in self.nodes.list(after) {
            reply = match reply.listed(max, attr.ino, place, attr.mode, &name) {
                Ok(more) => more,
                Err(full) => return Ok(full),
            };
        }
        Ok(reply)
    }

    fn statfs(&self) -> Reply {
        let devices = self.nodes.devices();
        let max = u64::from(devices.spec().max);
        let used = devices.entries().len() as u64;
        Reply::statfs(max, max.saturating_sub(used))
    }
}

const DIRECTORY: u32 = 0o040000;

/// The name of a request about a name in the directory: there are no other directories.
fn in_root<'a>(request: &Request<'a>) -> Answer<&'a str> {
    match request.node {
        ROOT => request.name().ok_or(Errno::NOENT),
        _ => Err(Errno::NOTDIR),
    }
}
