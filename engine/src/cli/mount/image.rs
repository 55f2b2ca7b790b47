// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Inspects an image: the file system, its range, and whether it is writable.
//!
//! Reads with the caller's own rights, before the daemon is involved. Does not know who mounts.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Seek, SeekFrom};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;

use crate::cli::size;
use crate::error::{Error, Kind, Result};
use crate::image::partitions::PartitionRange;
use crate::image::{Identity, Region, fs, partitions};
use crate::instance::claims::locks;
use crate::sys::range_lock;

/// Block size of partition tables; our devices use it too.
const BLOCK: u32 = 512;

/// Maximum number of partitions in a message.
const NAMED_MAX: usize = 16;

/// Signatures that are not mountable file systems.
const NOT_MOUNTED: [&str; 4] = ["crypto_LUKS", "LVM2_member", "swap", "jbd"];

/// An image, and the range to mount.
#[derive(Debug)]
pub(super) struct MountImage {
    pub(super) file: File,
    /// Path as given by the user.
    pub(super) shown: PathBuf,
    /// Full path.
    pub(super) path: PathBuf,
    pub(super) read_only: bool,
    /// First byte.
    pub(super) offset: u64,
    /// Length in bytes; 0: up to the end.
    pub(super) size_limit: u64,
    /// File system, as blkid names it.
    pub(super) kind: &'static str,
    /// True if the journal needs a replay.
    pub(super) needs_recovery: bool,
}

/// The requested part of an image.
#[derive(Debug)]
pub(super) struct PartitionSpec {
    pub(super) number: Option<u32>,
    pub(super) offset: u64,
    pub(super) size_limit: u64,
}

/// True for read-only file systems.
pub(super) fn never_written(kind: &str) -> bool {
    ["squashfs", "erofs", "iso9660", "cramfs"].contains(&kind)
}

/// Inspects the image at `path`.
pub(super) fn inspect(path: &Path, part: &PartitionSpec, read_only: bool) -> Result<MountImage> {
    let shown = path.display();
    let full = path.canonicalize().map_err(|error| {
        let hint = match error.kind() {
            ErrorKind::NotFound => "give an image, then the directory",
            _ => "give an image in a directory that this user can enter",
        };
        Error::os(error, format!("cannot open {shown}")).hint(hint)
    })?;
    let (file, size, read_only) = open_image(path, read_only)?;
    let (offset, limit, kind) = find(&file, size, part, &shown.to_string())?;
    let needs_recovery =
        fs::needs_recovery(&mut Region::new(file.as_fd(), offset, size.saturating_sub(offset)));
    Ok(MountImage {
        file,
        shown: path.to_owned(),
        path: full,
        read_only: read_only || never_written(kind),
        offset,
        size_limit: limit,
        kind,
        needs_recovery,
    })
}

impl MountImage {
    /// Locks the range against other mounts, for as long as this descriptor or a copy is open. Two
    /// file systems that write the same bytes destroy them.
    pub(super) fn lock(&self) -> Result<()> {
        // A file system without locks does not prevent the mount.
        match range_lock::try_lock(self.file.as_fd(), self.offset, self.size_limit, !self.read_only) {
            Ok(false) => {
                let shown = self.shown.display();
                let by = Identity::of(self.file.as_fd(), "").ok().and_then(|image| locks::find(&image).pop());
                let message = match by {
                    Some(user) => format!("{shown} is mounted already, or in use by {}", user.who),
                    None => format!("{shown} is mounted already, or locked by another program"),
                };
                Err(Error::new(Kind::Busy, message).hint(format!(
                    "unmount it with 'loopengine umount {shown}'; 'fuser -v {shown}' lists who has it open"
                )))
            }
            Ok(true) | Err(_) => Ok(()),
        }
    }

    pub(super) fn unlock(&self) {
        let _ = range_lock::unlock(self.file.as_fd(), self.offset, self.size_limit);
    }

    /// The command that extracts the range.
    pub(super) fn copy_out(&self) -> String {
        let count = if self.size_limit > 0 { format!(" count={}", self.size_limit) } else { String::new() };
        let (shown, offset) = (self.shown.display(), self.offset);
        format!("'dd if={shown} of=PART bs=1M iflag=skip_bytes,count_bytes skip={offset}{count}'")
    }
}

/// The partitions of the image at `path`, with their file systems.
pub(super) fn partitions(path: &Path) -> Result<Vec<(u32, Option<&'static str>)>> {
    let (file, size, _) = open_image(path, true)?;
    let region = |start, size| Region::new(file.as_fd(), start, size);
    let table = read_table(&mut region(0, size), &path.display().to_string())?;
    if table.is_empty() {
        let message = format!("{} has no partitions", path.display());
        return Err(Error::new(Kind::NotFound, message).hint("mount it without --all"));
    }
    Ok(table.iter().map(|part| (part.number, fs::detect(&mut region(part.start, part.size)))).collect())
}

/// True if the file system is mountable.
pub(super) fn is_mountable(kind: &str) -> bool {
    !NOT_MOUNTED.contains(&kind)
}

/// Opens an image. Returns the file, its size, and true if it is open read-only.
fn open_image(path: &Path, read_only: bool) -> Result<(File, u64, bool)> {
    let shown = path.display();
    let cannot = |error| Error::os(error, format!("cannot open {shown}"));
    let (mut file, read_only) = open(path, read_only).map_err(cannot)?;
    let kind = file.metadata().map_err(cannot)?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        let what = if kind.is_dir() { "a directory" } else { "neither a file nor a block device" };
        return Err(invalid(format!("{shown} is {what}")).hint("give an image, then the directory"));
    }
    let size = file.seek(SeekFrom::End(0)).map_err(cannot)?;
    Ok((file, size, read_only))
}

/// Opens for writing if requested and possible. True: read-only.
fn open(path: &Path, read_only: bool) -> std::io::Result<(File, bool)> {
    // Without O_NONBLOCK, opening a FIFO blocks until its other end is open.
    let flags = (OFlags::NONBLOCK | OFlags::NOCTTY).bits().cast_signed();
    let open = |write| OpenOptions::new().read(true).write(write).custom_flags(flags).open(path);
    if !read_only {
        match open(true) {
            Ok(file) => return Ok((file, false)),
            Err(error)
                if [ErrorKind::PermissionDenied, ErrorKind::ReadOnlyFilesystem, ErrorKind::IsADirectory]
                    .contains(&error.kind()) => {}
            Err(error) => return Err(error),
        }
    }
    Ok((open(false)?, true))
}

/// Offset, length and type of the file system.
fn find(file: &File, size: u64, part: &PartitionSpec, shown: &str) -> Result<(u64, u64, &'static str)> {
    let rest = size.saturating_sub(part.offset);
    if rest < u64::from(BLOCK) {
        let message = format!("{shown} has {size} bytes: there is no file system at {}", part.offset);
        return Err(invalid(message).hint("give an image with a file system"));
    }
    let within = if part.size_limit > 0 { rest.min(part.size_limit) } else { rest };
    let region = |start: u64, size: u64| Region::new(file.as_fd(), part.offset + start, size);
    let table = || read_table(&mut region(0, within), shown);
    let Some(number) = part.number else {
        return match fs::detect(&mut region(0, within)) {
            Some(kind) => checked(kind, shown).map(|kind| (part.offset, part.size_limit, kind)),
            None => Err(no_file_system(shown, shown, &table()?, |found| {
                fs::detect(&mut region(found.start, found.size))
            })),
        };
    };
    let table = table()?;
    let Some(found) = table.iter().find(|found| found.number == number) else {
        let (message, hint) = match (table.is_empty(), part.offset) {
            (true, 0) => (format!("{shown} has no partitions"), "mount it without --partition"),
            (true, offset) => (format!("{shown} has no partitions at {offset}"), "leave out --offset"),
            (false, _) => (
                format!("{shown} has no partition {number}, but {}", list(&table, |_| None)),
                "select one of these",
            ),
        };
        return Err(Error::new(Kind::NotFound, message).hint(hint));
    };
    let (file_name, shown) = (shown, format!("partition {number} of {shown}"));
    match fs::detect(&mut region(found.start, found.size)) {
        Some(kind) => Ok((part.offset + found.start, found.size, checked(kind, &shown)?)),
        None => Err(no_file_system(&shown, file_name, &[], |_| None)),
    }
}

/// Reads the partition table; none is an empty one. Rejects a GPT that has lost its partitions.
fn read_table(disk: &mut Region<'_>, shown: &str) -> Result<Vec<PartitionRange>> {
    let table = partitions::read(disk, BLOCK)?;
    if table.is_empty() && partitions::has_gpt_entry(disk) {
        let message = format!("{shown} has a GPT without readable partitions");
        let hint = format!("see whether the image is complete ('sfdisk --verify {shown}')");
        return Err(invalid(message).hint(hint));
    }
    Ok(table)
}

fn checked(kind: &'static str, shown: &str) -> Result<&'static str> {
    match is_mountable(kind) {
        true => Ok(kind),
        false => Err(invalid(format!("{shown} contains {kind}, which cannot be mounted"))),
    }
}

fn no_file_system(
    shown: &str,
    file: &str,
    table: &[PartitionRange],
    kind: impl Fn(&PartitionRange) -> Option<&'static str>,
) -> Error {
    if table.is_empty() {
        return invalid(format!("{shown} contains no known file system")).hint(format!(
            "identify it with 'file -s {file}', or give the start of a file system with --offset"
        ));
    }
    invalid(format!("{shown} has partitions: {}", list(table, kind)))
        .hint("select one with --partition N, or mount all with --all")
}

/// Numbers, file systems and sizes.
fn list(table: &[PartitionRange], kind: impl Fn(&PartitionRange) -> Option<&'static str>) -> String {
    let one = |part: &PartitionRange| {
        let kind = kind(part).map(|kind| format!("{kind}, ")).unwrap_or_default();
        format!("{} ({kind}{})", part.number, size::show(part.size))
    };
    let mut words: Vec<String> = table.iter().take(NAMED_MAX).map(one).collect();
    if table.len() > NAMED_MAX {
        words.push("…".to_owned());
    }
    words.join(", ")
}

fn invalid(message: String) -> Error {
    Error::new(Kind::Invalid, message)
}
