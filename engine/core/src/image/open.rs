// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Opens a private file description of a file that an untrusted caller opened.
//!
//! Knows what a hostile caller can pass; does not know sizes.

use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{Advice, FileType, Mode, OFlags};
use rustix::io::Errno;

use super::ImageSpec;
use crate::error::{Error, Kind, Result};
use crate::sys::pseudo;

/// The two kinds of file that hold images.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FileKind {
    Regular,
    BlockDevice,
}

/// Rejects a file that the caller did not open with the access needed.
pub(super) fn check_access(file: BorrowedFd<'_>, read_only: bool, name: &str) -> Result<()> {
    let flags = rustix::fs::fcntl_getfl(file).map_err(|e| Error::os(e, format!("cannot examine {name}")))?;
    let refuse = |what: &str, hint: &str| {
        Err(Error::new(Kind::Denied, format!("{name} was opened {what}")).hint(hint))
    };
    if flags.contains(OFlags::PATH) {
        return refuse("as a path only (O_PATH)", "open it for reading and writing");
    }
    match flags & OFlags::RWMODE {
        OFlags::RDWR => {}
        OFlags::RDONLY if read_only => {}
        OFlags::RDONLY => return refuse("for reading only", "attach it with --read-only"),
        _ => return refuse("without read access", "open it for reading too"),
    }
    // An append-only caller must not gain the right to overwrite.
    if !read_only && flags.contains(OFlags::APPEND) {
        return refuse("for appending only", "open it without O_APPEND");
    }
    Ok(())
}

/// Rejects files that cannot be images.
pub(super) fn file_kind(file: BorrowedFd<'_>, name: &str) -> Result<FileKind> {
    let examine = |e| Error::os(e, format!("cannot examine {name}"));
    let stat = rustix::fs::fstat(file).map_err(examine)?;
    let what = match FileType::from_raw_mode(stat.st_mode) {
        FileType::BlockDevice => return Ok(FileKind::BlockDevice),
        FileType::RegularFile => match pseudo::name(rustix::fs::fstatfs(file).map_err(examine)?.f_type) {
            None => return Ok(FileKind::Regular),
            Some(file_system) => format!("a file of {file_system}"),
        },
        FileType::Directory => "a directory".to_owned(),
        FileType::CharacterDevice => "a character device".to_owned(),
        FileType::Fifo => "a pipe".to_owned(),
        FileType::Socket => "a socket".to_owned(),
        FileType::Symlink => "a symbolic link".to_owned(),
        FileType::Unknown => "not a file".to_owned(),
    };
    Err(Error::new(Kind::Invalid, format!("{name} is {what}"))
        .hint("an image is a regular file or a block device"))
}

/// Opens the same file again. Open file flags belong to all who share the description: the caller
/// could clear O_DIRECT or set O_APPEND on a shared one at any time.
pub(super) fn reopen(file: BorrowedFd<'_>, kind: FileKind, spec: &ImageSpec, name: &str) -> Result<OwnedFd> {
    let access = if spec.read_only { OFlags::RDONLY } else { OFlags::RDWR };
    let mut flags = access | OFlags::CLOEXEC | OFlags::NOCTTY;
    if !spec.buffered {
        flags |= OFlags::DIRECT;
    }
    // A lease would block the open as long as its owner likes (45 s by default).
    if kind == FileKind::Regular {
        flags |= OFlags::NONBLOCK;
    }
    let link = format!("/proc/self/fd/{}", file.as_raw_fd());
    let open = |flags| rustix::fs::open(&*link, flags, Mode::empty());
    // With O_NOATIME a read never writes the inode. Only the owner may set it.
    let opened = match open(flags | OFlags::NOATIME) {
        Err(Errno::PERM) => open(flags),
        opened => opened,
    };
    let opened = opened.map_err(|error| describe_error(error, spec, name))?;
    // In io_uring, O_NONBLOCK would turn blocking into EAGAIN.
    rustix::fs::fcntl_getfl(&opened)
        .and_then(|flags| rustix::fs::fcntl_setfl(&opened, flags - OFlags::NONBLOCK))
        .map_err(|e| Error::os(e, format!("cannot set up {name}")))?;
    Ok(opened)
}

/// The error for a file that the caller has open but that cannot be opened again.
fn describe_error(error: Errno, spec: &ImageSpec, name: &str) -> Error {
    let other = Error::os(error, format!("cannot open {name}"));
    match error {
        Errno::INVAL if !spec.buffered => no_direct_io(name),
        Errno::ACCESS | Errno::PERM | Errno::ROFS if !spec.read_only => {
            other.hint("attach it with --read-only, or make it writable")
        }
        Errno::TXTBSY => other.with_kind(Kind::Busy).hint("it is a running program: wait until it ends"),
        Errno::WOULDBLOCK => Error::new(Kind::Busy, format!("another process holds a lease on {name}"))
            .hint("end that process, or try again in a minute"),
        Errno::NOENT => other.with_kind(Kind::Unavailable).hint("mount proc on /proc"),
        _ => other,
    }
}

/// The error for a file without direct I/O support.
pub(super) fn no_direct_io(name: &str) -> Error {
    Error::new(Kind::Unsupported, format!("the file system does not support direct I/O on {name}"))
        .hint("attach with --buffered")
}

/// Writes back and drops the file's cached pages: with any cached page, direct writes take the slow
/// path that invalidates pages.
pub(super) fn drop_cached_pages(file: BorrowedFd<'_>, read_only: bool, name: &str) -> Result<()> {
    match rustix::io::retry_on_intr(|| rustix::fs::fdatasync(file)) {
        // A reader does not need others' writes to be durable.
        Err(error) if !read_only => {
            return Err(Error::os(error, format!("cannot write back the cached pages of {name}")));
        }
        _ => {}
    }
    // Only advice: mapped and dirty pages stay, which costs only speed.
    let _ = rustix::fs::fadvise(file, 0, None, Advice::DontNeed);
    Ok(())
}
