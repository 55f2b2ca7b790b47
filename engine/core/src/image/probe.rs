// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Probes the properties of a file, its file system and its device.
//!
//! Uses statx, sysfs and a few harmless tests; `geometry` interprets the results.

use std::fs;
use std::os::fd::BorrowedFd;

use rustix::fs::{AtFlags, FallocateFlags, SeekFrom, StatxFlags};
use rustix::io::Errno;

use super::open::{FileKind, no_direct_io};
use super::{FileProperties, ImageSpec};
use crate::error::{Error, Result};

/// Larger blocks are useful only to file systems with larger pages.
const PHYSICAL_MAX: u32 = 4096;

/// Magic number of btrfs. It accepts unaligned direct I/O and silently uses the page cache for it.
/// Its alignment is its block size, which it does not report.
const BTRFS: u32 = 0x9123_683e;

/// Magic number of FUSE.
const FUSE: u32 = 0x6573_5546;

/// Whether a transfer may block its submission to io_uring. The kernel polls files that do not
/// support non-blocking I/O. FUSE forwards this poll to its server and then blocks in the transfer,
/// too; other file systems do not.
pub(super) fn may_block(file: BorrowedFd<'_>, name: &str) -> Result<bool> {
    Ok(rustix::fs::fstatfs(file).map_err(|e| examine(e, name))?.f_type as u32 == FUSE)
}

/// The properties that can be read without touching the file; `can_punch` stays false.
pub(super) fn properties(
    file: BorrowedFd<'_>,
    kind: FileKind,
    spec: &ImageSpec,
    name: &str,
) -> Result<FileProperties> {
    let block_device = kind == FileKind::BlockDevice;
    let size = size(file, block_device, name)?;
    let (offset_align, mem_align) = match (spec.buffered, kind) {
        (true, _) => (1, 1),
        (false, FileKind::Regular) => file_alignment(file, name)?,
        (false, FileKind::BlockDevice) => device_alignment(file, name)?,
    };
    let (physical_block_size, discard_granularity) = match kind {
        FileKind::Regular => {
            let stat = rustix::fs::fstatvfs(file).map_err(|e| examine(e, name))?;
            let block = u32::try_from(stat.f_bsize).unwrap_or(0);
            (block.min(PHYSICAL_MAX), block)
        }
        FileKind::BlockDevice => {
            let physical = rustix::fs::ioctl_blkpbszget(file).map_err(|e| examine(e, name))?;
            let granularity = queue_attribute(file, "discard_granularity").unwrap_or(0);
            (physical, u32::try_from(granularity).unwrap_or(0))
        }
    };
    Ok(FileProperties {
        size,
        block_device,
        offset_align,
        mem_align,
        physical_block_size,
        discard_granularity,
        can_punch: false,
    })
}

/// Present size in bytes.
pub(super) fn size(file: BorrowedFd<'_>, block_device: bool, name: &str) -> Result<u64> {
    if block_device {
        // Nothing else uses the offset of our file description.
        return rustix::fs::seek(file, SeekFrom::End(0)).map_err(|e| examine(e, name));
    }
    let stat = rustix::fs::fstat(file).map_err(|e| examine(e, name))?;
    Ok(u64::try_from(stat.st_size).unwrap_or(0))
}

fn examine(error: Errno, name: &str) -> Error {
    Error::os(error, format!("cannot examine {name}"))
}

/// Alignments (offset, memory) of direct I/O on a regular file that is open with O_DIRECT.
fn file_alignment(file: BorrowedFd<'_>, name: &str) -> Result<(u32, u32)> {
    match statx_alignment(file) {
        Some((0, _) | (_, 0)) => Err(no_direct_io(name)),
        Some(alignment) => Ok(alignment),
        // Some file systems do not report it (tmpfs), nor do kernels before 6.1.
        None => {
            let stat = rustix::fs::fstatfs(file).map_err(|e| examine(e, name))?;
            if stat.f_type as u32 == BTRFS {
                let block = u32::try_from(stat.f_bsize).unwrap_or(0);
                return Ok((block, block));
            }
            alignment_by_reading(file, name)
        }
    }
}

/// Alignments of direct I/O on a block device.
fn device_alignment(file: BorrowedFd<'_>, name: &str) -> Result<(u32, u32)> {
    let logical = rustix::fs::ioctl_blksszget(file).map_err(|e| examine(e, name))?;
    let memory = statx_alignment(file).map_or(logical, |(_, memory)| memory.max(1));
    Ok((logical, memory))
}

fn statx_alignment(file: BorrowedFd<'_>) -> Option<(u32, u32)> {
    let stat = rustix::fs::statx(file, c"", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN).ok()?;
    let reported = stat.stx_mask & StatxFlags::DIOALIGN.bits() != 0;
    reported.then_some((stat.stx_dio_offset_align, stat.stx_dio_mem_align))
}

/// Tries reads of the file's first bytes, starting with the smallest alignment.
fn alignment_by_reading(file: BorrowedFd<'_>, name: &str) -> Result<(u32, u32)> {
    let mut memory = vec![0u8; 3 * 4096];
    let page = memory.as_ptr().align_offset(4096);
    for (offset_align, mem_align) in [(512, 512), (4096, 512), (4096, 4096)] {
        // 512 bytes after the start of a page is aligned to 512 bytes only.
        let start = page + mem_align % 4096;
        let buffer = memory.get_mut(start..start + offset_align).unwrap_or_default();
        match rustix::io::retry_on_intr(|| rustix::io::pread(file, &mut *buffer, 0)) {
            Ok(_) => return Ok((offset_align as u32, mem_align as u32)),
            Err(Errno::INVAL) => {}
            Err(error) => return Err(Error::os(error, format!("cannot read {name}"))),
        }
    }
    Err(no_direct_io(name))
}

/// Whether fallocate can punch holes, which implements discards.
///
/// For a regular file only a test tells: it punches one byte just beyond the end, where there is no
/// data. (This may set the modification time, as any later write will.)
pub(super) fn can_punch(file: BorrowedFd<'_>, kind: FileKind, size: u64) -> bool {
    match kind {
        // The kernel punches holes in a block device with Write Zeroes.
        FileKind::BlockDevice => queue_attribute(file, "write_zeroes_max_bytes").is_some_and(|most| most > 0),
        FileKind::Regular => {
            let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            let tried = rustix::io::retry_on_intr(|| rustix::fs::fallocate(file, mode, size, 1));
            // Other errors (a file of maximum size) do not mean that it is unsupported.
            !matches!(tried, Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::NODEV))
        }
    }
}

/// A number from the device's queue directory in sysfs; for a partition, from its disk's.
fn queue_attribute(file: BorrowedFd<'_>, attribute: &str) -> Option<u64> {
    queue_text(rustix::fs::fstat(file).ok()?.st_rdev, attribute)?.parse().ok()
}

/// The same as text, of the block device with this number.
pub(super) fn queue_text(number: u64, attribute: &str) -> Option<String> {
    let (major, minor) = (rustix::fs::major(number), rustix::fs::minor(number));
    let device = format!("/sys/dev/block/{major}:{minor}");
    let text = fs::read_to_string(format!("{device}/queue/{attribute}"))
        .or_else(|_| fs::read_to_string(format!("{device}/../queue/{attribute}")))
        .ok()?;
    Some(text.trim().to_owned())
}
