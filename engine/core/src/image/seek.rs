// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Finds data and holes of an image, on file systems that support it.
//!
//! Uses lseek. May block as long as the image's file system does.

use std::os::fd::AsFd;

use rustix::fs::SeekFrom;
use rustix::io::Errno;

use super::Image;

impl Image {
    /// The first byte of data, or of a hole, in `from`..`size` of the device; none: no more data. A
    /// hole begins at `size`. Without support by the image, everything is data.
    pub fn seek(&self, from: u64, size: u64, hole: bool) -> Result<Option<u64>, Errno> {
        let offset = self.geometry.offset;
        let Some(start) = offset.checked_add(from) else { return Err(Errno::OVERFLOW) };
        let whence = if hole { SeekFrom::Hole(start) } else { SeekFrom::Data(start) };
        // The file offset is unused: all transfers pass theirs.
        match rustix::fs::seek(self.file.as_fd(), whence) {
            Ok(found) if hole => Ok(Some(found.saturating_sub(offset).clamp(from, size))),
            Ok(found) => Ok(Some(found.saturating_sub(offset).max(from)).filter(|found| *found < size)),
            // The image has shrunk, or ends in a hole.
            Err(Errno::NXIO) => Ok(hole.then_some(from)),
            // A block device.
            Err(Errno::INVAL) => Ok(Some(if hole { size } else { from })),
            Err(error) => Err(error),
        }
    }
}
