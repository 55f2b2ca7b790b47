// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Memory shared with the driver: request descriptors, and data buffers of the copy mode.

use std::fs::File;
use std::os::fd::AsFd;
use std::ptr::NonNull;

use libublk::sys;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, mmap_anonymous, munmap};

use crate::error::{Error, Kind, Result};
use crate::request::{Op, Request, SECTOR, Tag};

const PAGE: usize = 4096;

/// A mapping that is unmapped when dropped.
#[derive(Debug)]
struct Mapping {
    start: NonNull<u8>,
    bytes: usize,
}

// SAFETY: the mapping is owned by this value; access to it goes through the owner.
unsafe impl Send for Mapping {}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped by us with this length; the owner drops it after the kernel is done
        // (`Transport::is_drained`).
        let _ = unsafe { munmap(self.start.as_ptr().cast(), self.bytes) };
    }
}

/// The request descriptors of a queue. The driver writes one before it announces the tag.
#[derive(Debug)]
pub(super) struct Descriptors {
    mapping: Mapping,
    depth: u16,
}

/// A request, and whether the driver failed to register its buffer.
pub(super) struct DescribedRequest {
    pub(super) request: Request,
    pub(super) needs_registration: bool,
}

impl Descriptors {
    /// Maps the descriptors of queue `queue`.
    pub(super) fn map(file: &File, queue: u16, depth: u16) -> Result<Self> {
        let entry = size_of::<sys::ublksrv_io_desc>();
        let stride = (sys::UBLK_MAX_QUEUE_DEPTH as usize * entry).next_multiple_of(PAGE);
        let bytes = (usize::from(depth) * entry).next_multiple_of(PAGE);
        let offset = u64::from(sys::UBLKSRV_CMD_BUF_OFFSET) + u64::from(queue) * stride as u64;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let start = unsafe {
            mmap(
                std::ptr::null_mut(),
                bytes,
                ProtFlags::READ,
                MapFlags::SHARED | MapFlags::POPULATE,
                file.as_fd(),
                offset,
            )
        }
        .map_err(|error| Error::os(error, "cannot map the request descriptors"))?;
        let start = NonNull::new(start.cast()).ok_or_else(|| Error::new(Kind::Internal, "mapped at zero"))?;
        Ok(Self { mapping: Mapping { start, bytes }, depth })
    }

    /// The request announced under `tag`; none beyond the queue depth.
    pub(super) fn read(&self, tag: Tag) -> Option<DescribedRequest> {
        if tag >= self.depth {
            return None;
        }
        // SAFETY: inside the mapping, for tag < depth; aligned, since entries follow each other
        // from a page's start; volatile, for another party (the driver) writes it. It does so only
        // before it announces the tag, which it did.
        let raw = unsafe {
            self.mapping.start.cast::<sys::ublksrv_io_desc>().add(usize::from(tag)).as_ptr().read_volatile()
        };
        let flags = raw.op_flags;
        let fua = flags & sys::UBLK_IO_F_FUA != 0;
        let op = match flags & 0xff {
            sys::UBLK_IO_OP_READ => Op::Read,
            sys::UBLK_IO_OP_WRITE => Op::Write { fua },
            sys::UBLK_IO_OP_FLUSH => Op::Flush,
            sys::UBLK_IO_OP_DISCARD => Op::Discard,
            sys::UBLK_IO_OP_WRITE_ZEROES => {
                Op::WriteZeroes { unmap: flags & sys::UBLK_IO_F_NOUNMAP == 0, fua }
            }
            other => Op::Unknown(other as u8),
        };
        // A length beyond 4 GiB cannot occur (the device's limits are far below). It would fail as
        // out of range.
        let len = if op == Op::Flush {
            0
        } else {
            u32::try_from(u64::from(raw.nr_sectors) * SECTOR).unwrap_or(u32::MAX)
        };
        let offset = raw.start_sector.saturating_mul(SECTOR);
        let request = Request { tag, op, offset: if op == Op::Flush { 0 } else { offset }, len };
        Some(DescribedRequest { request, needs_registration: flags & sys::UBLK_IO_F_NEED_REG_BUF != 0 })
    }
}

/// Data buffers of the copy mode, one per tag. Memory is allocated on first use.
#[derive(Debug)]
pub(super) struct CopyBuffers {
    mapping: Mapping,
    each: usize,
}

impl CopyBuffers {
    /// `depth` buffers of `each` bytes, a multiple of the page size.
    pub(super) fn new(depth: u16, each: usize) -> Result<Self> {
        let bytes = usize::from(depth) * each;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let start =
            unsafe { mmap_anonymous(std::ptr::null_mut(), bytes, ProtFlags::READ | ProtFlags::WRITE, flags) }
                .map_err(|error| Error::os(error, "no memory for data buffers"))?;
        // Huge pages would cost an idle device megabytes for the first 4 KiB used. A kernel without
        // huge pages fails here, which is as good.
        // SAFETY: the mapping made above; this advice changes no byte.
        let _ = unsafe { madvise(start, bytes, Advice::LinuxNoHugepage) };
        let start = NonNull::new(start.cast()).ok_or_else(|| Error::new(Kind::Internal, "mapped at zero"))?;
        Ok(Self { mapping: Mapping { start, bytes }, each })
    }

    /// The address of a tag's buffer.
    pub(super) fn address(&self, tag: Tag) -> usize {
        debug_assert!((usize::from(tag) + 1) * self.each <= self.mapping.bytes);
        self.mapping.start.as_ptr() as usize + usize::from(tag) * self.each
    }
}
