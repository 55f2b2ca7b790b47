// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The FUSE protocol, as far as a directory of devices needs it.
//!
//! Knows the layout of linux/fuse.h. Knows nothing of devices. fuser, which `frontend/fuse` uses,
//! does not give access to the argument of an ioctl, which LOOP_CTL_ADD and _REMOVE need. Every
//! field is read at its offset and may be missing: no request causes a panic.

use std::io::IoSlice;
use std::os::fd::BorrowedFd;

use rustix::io::Errno;

/// The smallest buffer that the kernel accepts. Larger requests fail in the kernel.
pub(super) const BUFFER_BYTES: usize = 8192;
/// The inode of the directory itself.
pub(super) const ROOT: u64 = 1;
/// The inode of loop-control.
pub(super) const CONTROL: u64 = 2;

const HEADER_BYTES: usize = 40;
/// The protocol version; newer kernels support it too.
const VERSION: (u32, u32) = (7, 31);
/// Allows concurrent lookups and listings.
const PARALLEL_DIROPS: u32 = 1 << 18;

/// The operation of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LoopfsOp {
    Init,
    Lookup,
    /// Has no reply.
    Forget,
    GetAttr,
    SetAttr,
    ReadDir,
    Open,
    /// Closes: always succeeds, without effect.
    Close,
    Ioctl,
    StatFs,
    Unlink,
    /// Creates or renames an entry.
    Change,
    /// Reads or writes a file.
    Transfer,
    /// Anything else; the kernel does without it.
    Other,
}

/// A request.
#[derive(Clone, Copy, Debug)]
pub(super) struct LoopfsRequest<'a> {
    pub(super) op: LoopfsOp,
    pub(super) unique: u64,
    pub(super) node: u64,
    body: &'a [u8],
}

impl<'a> LoopfsRequest<'a> {
    /// None: the bytes are not a request.
    pub(super) fn parse(bytes: &'a [u8]) -> Option<LoopfsRequest<'a>> {
        let op = match u32_at(bytes, 4)? {
            1 => LoopfsOp::Lookup,
            2 | 42 => LoopfsOp::Forget,
            3 => LoopfsOp::GetAttr,
            4 => LoopfsOp::SetAttr,
            // SYMLINK, MKNOD, MKDIR, RMDIR, RENAME, LINK, CREATE, RENAME2, TMPFILE.
            6 | 8 | 9 | 11 | 12 | 13 | 35 | 45 | 51 => LoopfsOp::Change,
            10 => LoopfsOp::Unlink,
            // OPEN, OPENDIR.
            14 | 27 => LoopfsOp::Open,
            15 | 16 => LoopfsOp::Transfer,
            17 => LoopfsOp::StatFs,
            // RELEASE, RELEASEDIR, DESTROY.
            18 | 29 | 38 => LoopfsOp::Close,
            26 => LoopfsOp::Init,
            28 => LoopfsOp::ReadDir,
            39 => LoopfsOp::Ioctl,
            _ => LoopfsOp::Other,
        };
        let (unique, node) = (u64_at(bytes, 8)?, u64_at(bytes, 16)?);
        Some(LoopfsRequest { op, unique, node, body: bytes.get(HEADER_BYTES..)? })
    }

    /// The name in LOOKUP and UNLINK.
    pub(super) fn name(&self) -> Option<&'a str> {
        let end = self.body.iter().position(|&byte| byte == 0)?;
        std::str::from_utf8(&self.body[..end]).ok()
    }

    /// The major protocol version of INIT.
    pub(super) fn version(&self) -> Option<u32> {
        u32_at(self.body, 0)
    }

    /// Offset and maximum reply size of READDIR.
    pub(super) fn listing(&self) -> Option<(u64, usize)> {
        Some((u64_at(self.body, 8)?, usize::try_from(u32_at(self.body, 16)?).ok()?))
    }

    /// Command and argument of IOCTL.
    pub(super) fn ioctl(&self) -> Option<(u32, u64)> {
        Some((u32_at(self.body, 12)?, u64_at(self.body, 16)?))
    }

    /// The mode, user and group that SETATTR sets.
    pub(super) fn changes(&self) -> Option<AttrChanges> {
        let valid = u32_at(self.body, 0)?;
        let wanted =
            |bit: u32, at| if valid & bit == 0 { Some(None) } else { u32_at(self.body, at).map(Some) };
        Some(AttrChanges { mode: wanted(1, 68)?, uid: wanted(2, 76)?, gid: wanted(4, 80)? })
    }
}

/// See [`LoopfsRequest::changes`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct AttrChanges {
    pub(super) mode: Option<u32>,
    pub(super) uid: Option<u32>,
    pub(super) gid: Option<u32>,
}

/// The attributes of an inode, as in stat(2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Attr {
    pub(super) ino: u64,
    /// Type and permission bits.
    pub(super) mode: u32,
    pub(super) links: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    /// As in stat(2).
    pub(super) rdev: u64,
    /// Seconds since 1970.
    pub(super) changed: u64,
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at.checked_add(N)?)?.try_into().ok()
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    array(bytes, at).map(u32::from_ne_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    array(bytes, at).map(u64::from_ne_bytes)
}

/// The body of a reply, built field by field.
#[derive(Debug, Default)]
pub(super) struct LoopfsReply(Vec<u8>);

impl LoopfsReply {
    fn u16(mut self, value: u16) -> Self {
        self.0.extend_from_slice(&value.to_ne_bytes());
        self
    }

    fn u32(mut self, value: u32) -> Self {
        self.0.extend_from_slice(&value.to_ne_bytes());
        self
    }

    fn u64(mut self, value: u64) -> Self {
        self.0.extend_from_slice(&value.to_ne_bytes());
        self
    }

    fn zeroes(mut self, bytes: usize) -> Self {
        self.0.resize(self.0.len() + bytes, 0);
        self
    }

    /// Success, without a body.
    pub(super) fn done() -> Self {
        Self::default()
    }

    /// The protocol version, whatever newer one the kernel offers.
    pub(super) fn init() -> Self {
        const BACKGROUND: u16 = 16;
        let reply = Self::default().u32(VERSION.0).u32(VERSION.1).u32(0).u32(PARALLEL_DIROPS);
        // The smallest max_write, since nothing is written; time in nanoseconds; one page per
        // request.
        reply.u16(BACKGROUND).u16(BACKGROUND / 4 * 3).u32(4096).u32(1).u16(1).u16(0).zeroes(32)
    }

    fn attributes(self, attr: &Attr) -> Self {
        let (major, minor) = (rustix::fs::major(attr.rdev), rustix::fs::minor(attr.rdev));
        // The kernel's 32-bit encoding of a device number.
        let rdev = (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12);
        let times = self.u64(attr.ino).u64(0).u64(0).u64(attr.changed).u64(attr.changed).u64(attr.changed);
        let reply = times.zeroes(12).u32(attr.mode).u32(attr.links).u32(attr.uid).u32(attr.gid);
        reply.u32(rdev).u32(512).u32(0)
    }

    /// The inode of a name.
    pub(super) fn entry(attr: &Attr) -> Self {
        let valid = valid_ns(attr);
        Self::default().u64(attr.ino).zeroes(24).u32(valid).u32(valid).attributes(attr)
    }

    /// Attributes.
    pub(super) fn attr(attr: &Attr) -> Self {
        Self::default().zeroes(8).u32(valid_ns(attr)).u32(0).attributes(attr)
    }

    /// An open file without a handle. With `direct`, reads reach the daemon although the file is
    /// empty.
    pub(super) fn opened(direct: bool) -> Self {
        Self::default().u64(0).u32(direct.into()).u32(0)
    }

    /// The return value of an ioctl. Negative: an errno (FUSE turns ENOSYS into ENOTTY).
    pub(super) fn ioctl(result: i32) -> Self {
        Self::default().u32(result as u32).zeroes(12)
    }

    /// The maximum number of inodes, and how many are free.
    pub(super) fn statfs(files: u64, free: u64) -> Self {
        Self::default().zeroes(24).u64(files).u64(free).u32(512).u32(255).u32(512).zeroes(28)
    }

    /// Adds an entry to a listing of at most `max` bytes. Err: it does not fit. `next` is the
    /// offset after it.
    pub(super) fn listed(self, max: usize, ino: u64, next: u64, mode: u32, name: &str) -> Result<Self, Self> {
        let padding = name.len().next_multiple_of(8) - name.len();
        if self.0.len() + 24 + name.len() + padding > max {
            return Err(self);
        }
        let mut reply = self.u64(ino).u64(next).u32(name.len() as u32).u32(mode >> 12 & 0xf);
        reply.0.extend_from_slice(name.as_bytes());
        Ok(reply.zeroes(padding))
    }

    /// Sends it. A failure is ignored: the caller does not wait any more.
    pub(super) fn send(self, fuse: BorrowedFd<'_>, unique: u64) {
        send(fuse, unique, 0, &self.0);
    }

    #[cfg(test)]
    pub(super) fn bytes(&self) -> &[u8] {
        &self.0
    }
}

/// How long the kernel may cache a name and its attributes. Those of a device are valid once. The
/// directory and loop-control stay until the end of the pool, and change by requests of this kernel
/// only; a call of losetup(8) asks for them eight times.
fn valid_ns(attr: &Attr) -> u32 {
    match attr.ino {
        ROOT | CONTROL => 100_000_000,
        _ => 0,
    }
}

/// Replies with an errno.
pub(super) fn refuse(fuse: BorrowedFd<'_>, unique: u64, errno: Errno) {
    send(fuse, unique, -errno.raw_os_error(), &[]);
}

fn send(fuse: BorrowedFd<'_>, unique: u64, error: i32, body: &[u8]) {
    let mut header = [0; 16];
    header[..4].copy_from_slice(&((16 + body.len()) as u32).to_ne_bytes());
    header[4..8].copy_from_slice(&error.to_ne_bytes());
    header[8..].copy_from_slice(&unique.to_ne_bytes());
    let _ = rustix::io::writev(fuse, &[IoSlice::new(&header), IoSlice::new(body)]);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The sizes in linux/fuse.h; the kernel refuses other replies.
    #[test]
    fn replies_have_the_sizes_that_the_kernel_expects() {
        let attr = Attr { ino: 1, mode: 0, links: 1, uid: 0, gid: 0, rdev: 0, changed: 0 };
        assert_eq!(LoopfsReply::init().bytes().len(), 64);
        assert_eq!(LoopfsReply::entry(&attr).bytes().len(), 128);
        assert_eq!(LoopfsReply::attr(&attr).bytes().len(), 104);
        assert_eq!(LoopfsReply::opened(true).bytes().len(), 16);
        assert_eq!(LoopfsReply::ioctl(-1).bytes().len(), 16);
        assert_eq!(LoopfsReply::statfs(1, 1).bytes().len(), 80);
        let listed = LoopfsReply::done().listed(100, 2, 3, 0o060000, "loop0").unwrap();
        assert_eq!(listed.bytes().len(), 32);
        assert!(listed.listed(63, 2, 3, 0, "loop1").is_err(), "full");
    }

    #[test]
    fn encodes_device_numbers_as_the_kernel() {
        let rdev = rustix::fs::makedev(259, 0x12345);
        let attr = Attr { ino: 1, mode: 0, links: 1, uid: 0, gid: 0, rdev, changed: 0 };
        let reply = LoopfsReply::attr(&attr);
        assert_eq!(u32_at(reply.bytes(), 16 + 76), Some(0x45 | 259 << 8 | 0x12300 << 12));
    }

    proptest::proptest! {
        #[test]
        fn parses_any_bytes_without_a_panic(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..160)) {
            if let Some(request) = LoopfsRequest::parse(&bytes) {
                let _ = (request.name(), request.listing(), request.ioctl(), request.changes(), request.version());
            }
        }
    }
}
