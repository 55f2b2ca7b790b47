// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Creates image files.
//!
//! Never opens existing files. Uses the permissions of the calling process, so call it as the user.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;

use rustix::fs::{AtFlags, FallocateFlags, Mode, OFlags};
use rustix::io::Errno;

use crate::error::{Error, Kind, Result};
use crate::request::SECTOR;

/// Bytes per fallocate call: small enough for a progress bar, large enough for long extents.
const ALLOCATE_CHUNK: u64 = 1 << 30;
/// Bytes of zeroes per write.
const WRITE_CHUNK: u64 = 1 << 20;
/// The kernel stores file sizes in an i64.
const SIZE_MAX: u64 = i64::MAX as u64;

/// Creates an image of `size` bytes at `path`, which must not exist, and makes it durable.
///
/// The image is sparse. With `preallocate` all space is allocated now; `progress` gets (bytes done,
/// total bytes), first (0, `size`) when the file exists. On failure nothing is left behind.
///
/// Errors: [`Kind::Exists`], [`Kind::Invalid`] for an invalid size, [`Kind::Quota`] if the file
/// system is full, and errors of the file system.
pub fn create(path: &Path, size: u64, preallocate: bool, mut progress: impl FnMut(u64, u64)) -> Result<()> {
    check_size(size)?;
    let name = path.display();
    let Some(file_name) = path.file_name() else {
        let context = format!("'{name}' does not end in a file name");
        return Err(Error::new(Kind::Invalid, context).hint("name the file to create"));
    };
    // Uses the directory's descriptor, so that cleanup removes the file from the same directory.
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let directory =
        rustix::fs::open(directory, OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
            .map_err(|error| {
                let shown = directory.display();
                let os = Error::os(error, format!("cannot open directory {shown}"));
                match error {
                    Errno::NOENT => os.hint(format!("create it with 'mkdir -p {shown}'")),
                    _ => os.hint("choose a directory that this user can write to"),
                }
            })?;
    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::RDWR | OFlags::CLOEXEC;
    let file =
        rustix::fs::openat(&directory, file_name, flags, Mode::from_raw_mode(0o666)).map_err(|error| {
            let os = Error::os(error, format!("cannot create {name}"));
            match error {
                Errno::EXIST => os.hint("choose another name, or remove that file first"),
                Errno::ACCESS | Errno::PERM | Errno::ROFS => {
                    os.hint("choose a directory that this user can write to")
                }
                _ => os,
            }
        })?;

    progress(0, size);
    fill(file, size, preallocate, &mut progress)
        .and_then(|()| rustix::io::retry_on_intr(|| sync_directory(&directory)))
        .map_err(|error| {
            // Report the first error only.
            let _ = rustix::fs::unlinkat(&directory, file_name, AtFlags::empty());
            describe_error(error, size, preallocate, &name.to_string())
        })
}

fn check_size(size: u64) -> Result<()> {
    let refuse =
        |why: &str, hint: &str| Err(Error::new(Kind::Invalid, format!("size {size} {why}")).hint(hint));
    match size {
        0 => refuse("makes an empty image", "choose a size, such as 1G"),
        _ if size > SIZE_MAX => refuse("is more than a file can have", "choose less than 8 EiB"),
        _ if !size.is_multiple_of(SECTOR) => refuse("is not a multiple of 512 bytes", "choose a multiple"),
        _ => Ok(()),
    }
}

fn describe_error(error: Errno, size: u64, preallocate: bool, name: &str) -> Error {
    let context = format!("cannot create {name} with {size} bytes");
    let os = Error::os(error, context);
    match error {
        Errno::FBIG => os
            .with_kind(Kind::Invalid)
            .hint("choose a smaller size: this file system allows no file that large"),
        Errno::NOSPC | Errno::DQUOT if preallocate => os.hint("free some space, or leave out --preallocate"),
        _ => os,
    }
}

/// Sets the file's size and makes it durable.
fn fill(
    file: OwnedFd,
    size: u64,
    preallocate: bool,
    progress: &mut dyn FnMut(u64, u64),
) -> std::result::Result<(), Errno> {
    if preallocate {
        allocate(&file, size, progress)?;
    } else {
        rustix::io::retry_on_intr(|| rustix::fs::ftruncate(&file, size))?;
    }
    rustix::io::retry_on_intr(|| rustix::fs::fsync(&file))
}

/// Allocates all space in chunks; writes zeroes if fallocate is unsupported.
fn allocate(file: &OwnedFd, size: u64, progress: &mut dyn FnMut(u64, u64)) -> std::result::Result<(), Errno> {
    let mut done = 0;
    while done < size {
        let len = ALLOCATE_CHUNK.min(size - done);
        let mode = FallocateFlags::empty();
        match rustix::io::retry_on_intr(|| rustix::fs::fallocate(file, mode, done, len)) {
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => {
                return write_zeroes(file, done, size, progress);
            }
            other => other?,
        }
        done += len;
        progress(done, size);
    }
    Ok(())
}

fn write_zeroes(
    file: &OwnedFd,
    from: u64,
    size: u64,
    progress: &mut dyn FnMut(u64, u64),
) -> std::result::Result<(), Errno> {
    let errno = |e: std::io::Error| Errno::from_io_error(&e).unwrap_or(Errno::IO);
    let file = File::from(file.as_fd().try_clone_to_owned().map_err(errno)?);
    let zeroes = vec![0; WRITE_CHUNK as usize];
    let mut done = from;
    while done < size {
        let len = WRITE_CHUNK.min(size - done);
        file.write_all_at(&zeroes[..len as usize], done).map_err(errno)?;
        done += len;
        progress(done, size);
    }
    Ok(())
}

/// Makes the directory entry durable, where supported.
fn sync_directory(directory: &OwnedFd) -> std::result::Result<(), Errno> {
    match rustix::fs::fsync(directory) {
        Err(Errno::INVAL | Errno::OPNOTSUPP) => Ok(()),
        other => other,
    }
}
