// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Opens an image for the daemon, and reports errors in one line.
//!
//! The daemon checks again; errors here name the user's own path and option.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Seek, SeekFrom};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::OFlags;

use crate::control::reason;
use crate::error::{Error, Kind, Result};
use crate::instance::spec::AttachSpec;

/// Sizes and offsets are multiples of a sector.
const SECTOR: u64 = 512;

/// Opens the image at `path` as `spec` requires. Sets the path in `spec`.
pub(super) fn open(path: &Path, spec: &mut AttachSpec) -> Result<OwnedFd> {
    let shown = path.display();
    let file = open_file(path, spec.read_only)?;
    let meta = file.metadata().map_err(|error| Error::os(error, format!("cannot use {shown}")))?;
    let kind = meta.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        let what = if kind.is_dir() { "a directory" } else { "neither a file nor a block device" };
        return Err(invalid(format!("{shown} is {what}")).hint("give an image file or a block device"));
    }
    let size = (&file)
        .seek(SeekFrom::End(0))
        .map_err(|error| Error::os(error, format!("cannot find the size of {shown}")))?;
    check(&shown.to_string(), size, kind.is_file(), spec)?;
    spec.path = absolute(path)?;
    Ok(file.into())
}

fn open_file(path: &Path, read_only: bool) -> Result<File> {
    let shown = path.display();
    // Without O_NONBLOCK, opening a FIFO blocks until its other end is open.
    let flags = OFlags::NONBLOCK | OFlags::NOCTTY;
    let opened =
        OpenOptions::new().read(true).write(!read_only).custom_flags(flags.bits().cast_signed()).open(path);
    opened.map_err(|error| {
        let message = format!("cannot open {shown}: {}", reason(&error));
        match error.kind() {
            ErrorKind::NotFound if can_be_created(path) => Error::new(Kind::NotFound, message)
                .hint(format!("create an image with 'loopengine create {shown} --size 10G'")),
            ErrorKind::NotFound => Error::new(Kind::NotFound, message).hint("give the path of an image"),
            ErrorKind::IsADirectory => {
                invalid(format!("{shown} is a directory")).hint("give an image file or a block device")
            }
            ErrorKind::PermissionDenied if read_only => {
                Error::new(Kind::Denied, message).hint("run this as a user who can read the image")
            }
            ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem => Error::new(Kind::Denied, message)
                .hint("attach it with --read-only, or as a user who can write to it"),
            _ => Error::os(error, format!("cannot open {shown}")),
        }
    })
}

/// True if an image file can be created there: the directory exists and is not in /dev.
fn can_be_created(path: &Path) -> bool {
    let dir = path.parent().map(|dir| if dir.as_os_str().is_empty() { Path::new(".") } else { dir });
    // Not a link to a missing file.
    path.symlink_metadata().is_err() && dir.is_some_and(|dir| dir.is_dir() && !dir.starts_with("/dev"))
}

/// Checks that the requested range of the image exists, in whole sectors.
fn check(shown: &str, size: u64, is_file: bool, spec: &AttachSpec) -> Result<()> {
    let unit = u64::from(spec.block_size).max(SECTOR);
    if size == 0 {
        return Err(invalid(format!("{shown} is empty")).hint(match is_file {
            true => format!("give it a size, as with 'truncate -s 10G {shown}'"),
            // The size of a block device is fixed.
            false => "give a block device that has a medium, or an image file".to_owned(),
        }));
    }
    if !spec.offset.is_multiple_of(unit) {
        let message = format!("the offset {} is not a multiple of {unit}", spec.offset);
        return Err(invalid(message).hint(format!("give a multiple of {unit} to --offset")));
    }
    if !spec.size_limit.is_multiple_of(unit) {
        let message = format!("the size limit {} is not a multiple of {unit}", spec.size_limit);
        return Err(invalid(message).hint(format!("give a multiple of {unit} to --size-limit")));
    }
    let rest = match size.checked_sub(spec.offset) {
        Some(rest) if rest >= unit => rest,
        _ => {
            let (message, hint) = match spec.offset {
                0 => (format!("{shown} has only {size} bytes"), "enlarge it: 'truncate --size 1G FILE'"),
                offset => (
                    format!("{shown} has only {size} bytes: the offset {offset} is beyond its end"),
                    "give a smaller --offset",
                ),
            };
            return Err(invalid(message).hint(hint));
        }
    };
    let limited = spec.size_limit > 0 && spec.size_limit <= rest;
    if !limited && !rest.is_multiple_of(unit) {
        let message = format!("the size of {shown}, {size} bytes, is not a multiple of {unit}");
        let limit = format!("give --size-limit {}", rest - rest % unit);
        return Err(invalid(message).hint(match is_file {
            true => format!("extend the file with 'truncate -s %{unit} {shown}', or {limit}"),
            false => limit,
        }));
    }
    Ok(())
}

fn absolute(path: &Path) -> Result<String> {
    let shown = path.display();
    let path = std::path::absolute(path)
        .map_err(|error| Error::os(error, format!("cannot find the full path of {shown}")))?;
    path.into_os_string().into_string().map_err(|_| {
        invalid(format!("the path {shown} is not UTF-8")).hint("rename the image or its directory")
    })
}

fn invalid(message: String) -> Error {
    Error::new(Kind::Invalid, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(offset: u64, size_limit: u64, block_size: u32) -> AttachSpec {
        AttachSpec { offset, size_limit, block_size, ..AttachSpec::default() }
    }

    fn verdict(size: u64, spec: &AttachSpec) -> String {
        check("disk.img", size, true, spec).map_or_else(|error| error.to_string(), |()| "ok".to_owned())
    }

    #[test]
    fn checks_the_geometry() {
        assert_eq!(verdict(4096, &spec(0, 0, 0)), "ok");
        assert_eq!(verdict(4096, &spec(3584, 0, 512)), "ok");
        assert_eq!(verdict(1000, &spec(0, 512, 0)), "ok");
        assert!(verdict(0, &spec(0, 0, 0)).contains("empty"));
        assert!(verdict(4096, &spec(100, 0, 0)).contains("--offset"));
        assert!(verdict(4096, &spec(512, 0, 4096)).contains("multiple of 4096"));
        assert!(verdict(4096, &spec(4096, 0, 0)).contains("smaller --offset"));
        assert!(verdict(4096, &spec(1 << 40, 0, 0)).contains("smaller --offset"));
        assert!(verdict(4096, &spec(0, 100, 0)).contains("--size-limit"));
        let odd = verdict(1000, &spec(0, 0, 0));
        assert!(odd.contains("truncate -s %512") && odd.contains("--size-limit 512"), "{odd}");
    }

    #[test]
    fn does_not_suggest_truncate_for_block_devices() {
        for (size, says) in [(0, "medium"), (1000, "; give --size-limit 512")] {
            let error = check("/dev/loop0", size, false, &spec(0, 0, 0)).unwrap_err().to_string();
            assert!(error.contains(says) && !error.contains("truncate"), "{error}");
        }
    }

    #[test]
    fn suggests_create_only_where_it_can_succeed() {
        assert!(can_be_created(Path::new("x")) && can_be_created(Path::new("/tmp/x")));
        for path in ["/dev/x", "/nonexistent/x", "/"] {
            assert!(!can_be_created(Path::new(path)), "{path}");
        }
    }

    #[test]
    fn refuses_a_fifo_without_blocking() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("fifo");
        let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
        rustix::fs::mkfifoat(rustix::fs::CWD, &path, mode).unwrap();
        for read_only in [true, false] {
            let mut spec = AttachSpec { read_only, ..spec(0, 0, 0) };
            let error = open(&path, &mut spec).unwrap_err();
            assert!(error.message().contains("neither a file"), "{error}");
        }
    }
}
