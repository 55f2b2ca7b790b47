// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Whether durable writes to a file are cheap: where each one overwrites blocks in place, on a store
//! that has no volatile cache or can write through it.
//!
//! Only speed depends on this: a durable write is durable anywhere. Elsewhere it would wait for the
//! file system's journal or for the store's whole cache.

use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use rustix::io::Errno;

use super::FileProperties;
use super::probe::queue_text;
use crate::error::{Error, Kind, Result};
use crate::sys::extents::extents;

/// `FIEMAP_EXTENT_SHARED`, and what keeps data from being overwritten in place: UNKNOWN, DELALLOC,
/// ENCODED, NOT_ALIGNED, DATA_INLINE, DATA_TAIL, UNWRITTEN.
const SHARED: u32 = 0x2000;
const NOT_IN_PLACE: u32 = 0x2 | 0x4 | 0x8 | 0x100 | 0x200 | 0x400 | 0x800;
/// How long to look through a file in many pieces.
const PATIENCE: Duration = Duration::from_secs(10);

/// Refuses a file on which durable writes are slow, and makes durable what it holds: no flush will.
/// `start` and `len`: the bytes that will be written.
pub(super) fn prepare(
    file: BorrowedFd<'_>,
    properties: &FileProperties,
    start: u64,
    len: u64,
    name: &str,
) -> Result<()> {
    let failed = |error| Error::os(error, format!("cannot examine {name}"));
    let stat = rustix::fs::fstat(file).map_err(failed)?;
    let store = if properties.block_device { stat.st_rdev } else { stat.st_dev };
    let cache = queue_text(store, "write_cache");
    let writes_through = match cache.as_deref() {
        Some("write through") => true,
        Some(_) => queue_text(store, "fua").as_deref() == Some("1"),
        None => return refuse(format!("{name} is not on one block device: durable writes may be slow")),
    };
    if !writes_through {
        return refuse(format!("the disk below {name} cannot write through its cache (no FUA)"));
    }
    if !properties.block_device {
        check_extents(file, start, len, name)?;
    }
    rustix::io::retry_on_intr(|| rustix::fs::fdatasync(file))
        .map_err(|error| Error::os(error, format!("cannot write back {name}")))
}

fn check_extents(file: BorrowedFd<'_>, start: u64, len: u64, name: &str) -> Result<()> {
    let (mut next, end) = (start, start.saturating_add(len));
    let until = Instant::now() + PATIENCE;
    while next < end {
        let found = match extents(file, next, end - next) {
            Ok(found) => found,
            Err(Errno::OPNOTSUPP | Errno::NOTTY) => {
                return refuse(format!("the file system of {name} does not report extents (FIEMAP)"));
            }
            Err(error) => return Err(Error::os(error, format!("cannot examine {name}"))),
        };
        let before = next;
        for extent in found {
            if extent.start > next || extent.flags & NOT_IN_PLACE != 0 {
                break;
            }
            if extent.flags & SHARED != 0 {
                let context = format!("{name} shares blocks with another file at byte {next}");
                return Err(Error::new(Kind::Unsupported, context)
                    .hint("copy it with 'cp --sparse=never --reflink=never'"));
            }
            next = next.max(extent.start.saturating_add(extent.len));
        }
        if next == before {
            return Err(Error::new(
                Kind::Unsupported,
                format!("{name} has a hole or unwritten blocks at byte {next}"),
            )
            .hint("write all of it, as in 'cp --sparse=never --reflink=never IMAGE NEW'"));
        }
        if Instant::now() > until {
            return refuse(format!("{name} has too many extents to examine"));
        }
    }
    Ok(())
}

fn refuse(context: String) -> Result<()> {
    Err(Error::new(Kind::Unsupported, context).hint("attach it without --durable"))
}
