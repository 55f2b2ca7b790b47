// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The extents of a file, by FIEMAP.

use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::io::Errno;

use super::ioctl::FS_IOC_FIEMAP;

/// Extents per call.
const EXTENTS: usize = 128;
/// First write back what is not yet allocated.
const FLAG_SYNC: u32 = 1;

/// One extent, in bytes of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// First byte.
    pub start: u64,
    /// Bytes.
    pub len: u64,
    /// `FIEMAP_EXTENT_*`.
    pub flags: u32,
}

/// `struct fiemap_extent` of linux/fiemap.h.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct RawExtent {
    logical: u64,
    physical: u64,
    length: u64,
    reserved64: [u64; 2],
    flags: u32,
    reserved: [u32; 3],
}

/// `struct fiemap`, followed by space for its extents.
#[repr(C)]
#[derive(Debug)]
struct Fiemap {
    start: u64,
    length: u64,
    flags: u32,
    mapped_extents: u32,
    extent_count: u32,
    reserved: u32,
    extents: [RawExtent; EXTENTS],
}

/// The first extents of a range of a file; none: the rest of the range is a hole. Errors:
/// [`Errno::OPNOTSUPP`] where the file system does not tell.
pub fn extents(file: BorrowedFd<'_>, start: u64, len: u64) -> Result<Vec<Extent>, Errno> {
    let mut map = Fiemap {
        start,
        length: len,
        flags: FLAG_SYNC,
        mapped_extents: 0,
        extent_count: EXTENTS as u32,
        reserved: 0,
        extents: [RawExtent::default(); EXTENTS],
    };
    // SAFETY: FIEMAP writes the header and at most `extent_count` extents, which fit into `map`;
    // it lives until the call returns, and the descriptor is open for the call (borrowed).
    let done = unsafe { libc::ioctl(file.as_raw_fd(), FS_IOC_FIEMAP as libc::Ioctl, &raw mut map) };
    if done < 0 {
        return Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO));
    }
    let mapped = map.extents.iter().take(map.mapped_extents as usize);
    Ok(mapped.map(|raw| Extent { start: raw.logical, len: raw.length, flags: raw.flags }).collect())
}
