// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The file table of a ring.
//!
//! The table keeps a device's files open until the last request of the ring ends, also after the
//! daemon's death: recovery relies on that. Before Linux 6.13, however, the kernel closes a removed
//! file only when every request that used the table has ended, whichever file it used. The fetch
//! commands of idle devices never end, so a detached image would stay open and its file system
//! busy. There, submissions pass descriptors and use no table.

use std::os::fd::RawFd;

use io_uring::{IoUring, squeue};

use crate::error::{Error, Result};

/// "No file", to the kernel and here.
const NONE: RawFd = -1;

/// The entries of the file table.
#[derive(Debug)]
pub struct FileTable {
    /// Descriptors by index, where submissions pass descriptors.
    descriptors: Option<Box<[RawFd]>>,
}

/// Whether the kernel closes a removed file as soon as its own requests have ended.
///
/// Linux 6.13 does; the first feature flag that shows it is of 6.15.
pub fn kernel_counts_users(ring: &IoUring) -> bool {
    ring.params().is_feature_no_iowait()
}

impl FileTable {
    /// An empty table of this size.
    pub fn new(ring: &IoUring, len: u32) -> Result<Self> {
        Self::with(ring, len, !kernel_counts_users(ring))
    }

    fn with(ring: &IoUring, len: u32, by_descriptor: bool) -> Result<Self> {
        ring.submitter().register_files_sparse(len).map_err(|error| {
            Error::os(error, "cannot register a file table")
                .hint("raise the limit on open files (LimitNOFILE=)")
        })?;
        Ok(Self { descriptors: by_descriptor.then(|| vec![NONE; len as usize].into()) })
    }

    /// Stores `file` at `index`.
    pub fn set(&mut self, ring: &IoUring, index: u32, file: RawFd) -> Result<()> {
        let updated = ring.submitter().register_files_update(index, &[file]);
        updated.map_err(|error| Error::os(error, "cannot register a file"))?;
        if let Some(descriptors) =
            self.descriptors.as_mut().and_then(|descriptors| descriptors.get_mut(index as usize))
        {
            *descriptors = file;
        }
        Ok(())
    }

    /// Clears `index`.
    pub fn clear(&mut self, ring: &IoUring, index: u32) -> Result<()> {
        self.set(ring, index, NONE)
    }

    /// Whether submissions must be resolved to descriptors.
    pub fn by_descriptor(&self) -> bool {
        self.descriptors.is_some()
    }

    /// The submission with its table index replaced by the descriptor.
    pub fn resolve(&self, entry: &squeue::Entry) -> squeue::Entry {
        /// Byte offsets in `struct io_uring_sqe` of <linux/io_uring.h>.
        const FLAGS: usize = 1;
        const FD: usize = 4;
        const { assert!(size_of::<squeue::Entry>() == 64) };
        let mut entry = entry.clone();
        let Some(descriptors) = &self.descriptors else { return entry };
        // SAFETY: an entry is the kernel's 64-byte structure (asserted above), owned by us; both
        // fields are plain integers inside it, accessed unaligned to ask nothing of its alignment.
        unsafe {
            let bytes = (&raw mut entry).cast::<u8>();
            let (flags, fd) = (bytes.add(FLAGS), bytes.add(FD).cast::<i32>());
            let index = usize::try_from(fd.read_unaligned()).unwrap_or(usize::MAX);
            fd.write_unaligned(descriptors.get(index).copied().unwrap_or(NONE));
            flags.write(flags.read() & !squeue::Flags::FIXED_FILE.bits());
        }
        entry
    }
}

#[cfg(test)]
mod tests {
    use io_uring::{opcode, types};

    use super::*;

    #[test]
    fn resolves_submissions_to_the_file_at_their_index() {
        let ring = IoUring::new(8).unwrap();
        let mut files = FileTable::with(&ring, 3, true).unwrap();
        let open = std::fs::File::open("/dev/zero").unwrap();
        let mut bytes = [1u8; 8];
        let mut read = |files: &FileTable| {
            let entry = opcode::Read::new(types::Fixed(2), bytes.as_mut_ptr(), 8).build();
            let entry = files.resolve(&entry.flags(squeue::Flags::FIXED_FILE));
            let mut ring = IoUring::new(8).unwrap();
            // SAFETY: `bytes` outlives the completion that is waited for.
            unsafe { ring.submission().push(&entry).unwrap() };
            ring.submit_and_wait(1).unwrap();
            ring.completion().next().unwrap().result()
        };
        assert_eq!(read(&files), -libc::EBADF);
        files.set(&ring, 2, std::os::fd::AsRawFd::as_raw_fd(&open)).unwrap();
        assert_eq!(read(&files), 8);
        files.clear(&ring, 2).unwrap();
        assert_eq!(read(&files), -libc::EBADF);
        assert!(files.set(&ring, 3, 0).is_err());
        assert_eq!(bytes, [0; 8]);
    }
}
