//! What a file, its file system and its device can do, asked of the kernel.
//!
//! Knows statx, sysfs and a few harmless trials; does not know what will be made of the answers
//! (see `geometry`).

use std::fs;
use std::os::fd::BorrowedFd;

use rustix::fs::{AtFlags, FallocateFlags, SeekFrom, StatxFlags};
use rustix::io::Errno;

use super::open::{FileKind, no_direct_io};
use super::{Facts, Source};
use crate::error::{Error, Result};

/// Blocks above this would only make sense to a file system that uses larger pages.
const PHYSICAL_MAX: u32 = 4096;

/// Magic number of the one file system that takes unaligned direct I/O and, in silence, does it
/// through the page cache. It aligns to its blocks, and does not say so.
const BTRFS: u32 = 0x9123_683e;

/// Magic number of FUSE.
const FUSE: u32 = 0x6573_5546;

/// Whether a transfer may hold up who submits it to io_uring. The kernel tries it at once if it cannot
/// wait, and asks files that do not say so whether they are ready. Files of FUSE have that question
/// answered by their server, and then wait for the transfer, too; no other file system does.
pub(super) fn holds_up(file: BorrowedFd<'_>, name: &str) -> Result<bool> {
    Ok(rustix::fs::fstatfs(file).map_err(|e| examine(e, name))?.f_type as u32 == FUSE)
}

/// Everything that can be learnt about a file without touching it; `can_punch` is left false.
pub(super) fn facts(file: BorrowedFd<'_>, kind: FileKind, source: &Source, name: &str) -> Result<Facts> {
    let block_device = kind == FileKind::BlockDevice;
    let size = size(file, block_device, name)?;
    let (offset_align, mem_align) = match (source.buffered, kind) {
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
    Ok(Facts {
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
        // Nothing else uses the position of our own file description.
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
        // Not every file system tells (tmpfs), and no kernel before 6.1.
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
    let told = stat.stx_mask & StatxFlags::DIOALIGN.bits() != 0;
    told.then_some((stat.stx_dio_offset_align, stat.stx_dio_mem_align))
}

/// Tries reads of the file's first bytes, from the most convenient alignment on.
fn alignment_by_reading(file: BorrowedFd<'_>, name: &str) -> Result<(u32, u32)> {
    let mut memory = vec![0u8; 3 * 4096];
    let page = memory.as_ptr().align_offset(4096);
    for (offset_align, mem_align) in [(512, 512), (4096, 512), (4096, 4096)] {
        // 512 bytes behind the start of a page is aligned to 512 bytes and to no more.
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

/// Whether fallocate can punch holes, which is how discards are done.
///
/// For a regular file the only way to know is to try: one byte right behind the end, where there
/// is nothing to lose. (This may set the file's time of modification, as any attaching for
/// writing soon will.)
pub(super) fn can_punch(file: BorrowedFd<'_>, kind: FileKind, size: u64) -> bool {
    match kind {
        // The kernel punches holes in a block device with the command Write Zeroes.
        FileKind::BlockDevice => queue_attribute(file, "write_zeroes_max_bytes").is_some_and(|most| most > 0),
        FileKind::Regular => {
            let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            let tried = rustix::io::retry_on_intr(|| rustix::fs::fallocate(file, mode, size, 1));
            // Other errors (a file of the largest size) do not mean that it is impossible.
            !matches!(tried, Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::NODEV))
        }
    }
}

/// A number from the device's queue directory in sysfs; for a partition, from its disk's.
fn queue_attribute(file: BorrowedFd<'_>, attribute: &str) -> Option<u64> {
    let number = rustix::fs::fstat(file).ok()?.st_rdev;
    let (major, minor) = (rustix::fs::major(number), rustix::fs::minor(number));
    let device = format!("/sys/dev/block/{major}:{minor}");
    let text = fs::read_to_string(format!("{device}/queue/{attribute}"))
        .or_else(|_| fs::read_to_string(format!("{device}/../queue/{attribute}")))
        .ok()?;
    text.trim().parse().ok()
}
