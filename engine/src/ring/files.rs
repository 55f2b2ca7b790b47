//! The files of a ring, by place in the kernel's table for it.
//!
//! The table keeps a device's files open until the last request of the ring has ended, also after
//! the daemon's death: recovery relies on that. Kernels before 6.13, however, close what leaves it
//! only when every request that then used the table has ended, whichever file it was about. The
//! commands that wait for requests of idle devices never end: a detached image would stay open, and
//! its file system could not be unmounted. There, submissions name descriptors, and use no table.

use std::os::fd::RawFd;

use io_uring::{IoUring, squeue};

use crate::error::{Error, Result};

/// "No file", to the kernel and here.
const NONE: RawFd = -1;

/// Which file is at which place.
#[derive(Debug)]
pub struct FileTable {
    /// Descriptors by place, where submissions are to name these.
    named: Option<Box<[RawFd]>>,
}

/// Whether the kernel closes a file as soon as the last request about it has ended.
///
/// Linux 6.13 does; the first flag that tells is one of 6.15.
pub fn kernel_counts_users(ring: &IoUring) -> bool {
    ring.params().is_feature_no_iowait()
}

impl FileTable {
    /// An empty table of `places`.
    pub fn new(ring: &IoUring, places: u32) -> Result<Self> {
        Self::with(ring, places, !kernel_counts_users(ring))
    }

    fn with(ring: &IoUring, places: u32, by_descriptor: bool) -> Result<Self> {
        ring.submitter().register_files_sparse(places).map_err(|error| {
            Error::os(error, "cannot register a file table")
                .hint("raise the limit on open files (LimitNOFILE=)")
        })?;
        Ok(Self { named: by_descriptor.then(|| vec![NONE; places as usize].into()) })
    }

    /// Puts `file` at `place`.
    pub fn set(&mut self, ring: &IoUring, place: u32, file: RawFd) -> Result<()> {
        let updated = ring.submitter().register_files_update(place, &[file]);
        updated.map_err(|error| Error::os(error, "cannot register a file"))?;
        if let Some(named) = self.named.as_mut().and_then(|named| named.get_mut(place as usize)) {
            *named = file;
        }
        Ok(())
    }

    /// Empties `place`.
    pub fn clear(&mut self, ring: &IoUring, place: u32) -> Result<()> {
        self.set(ring, place, NONE)
    }

    /// Whether submissions name descriptors: whether they must be resolved.
    pub fn by_descriptor(&self) -> bool {
        self.named.is_some()
    }

    /// A submission with the place in it replaced by the descriptor there.
    pub fn resolve(&self, entry: &squeue::Entry) -> squeue::Entry {
        /// Byte offsets in `struct io_uring_sqe` of <linux/io_uring.h>.
        const FLAGS: usize = 1;
        const FD: usize = 4;
        const { assert!(size_of::<squeue::Entry>() == 64) };
        let mut entry = entry.clone();
        let Some(named) = &self.named else { return entry };
        // SAFETY: an entry is the kernel's 64-byte structure (asserted above), owned by us; both
        // fields are plain integers inside it, accessed unaligned to ask nothing of its alignment.
        unsafe {
            let bytes = (&raw mut entry).cast::<u8>();
            let (flags, fd) = (bytes.add(FLAGS), bytes.add(FD).cast::<i32>());
            let place = usize::try_from(fd.read_unaligned()).unwrap_or(usize::MAX);
            fd.write_unaligned(named.get(place).copied().unwrap_or(NONE));
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
    fn submissions_go_to_the_file_at_their_place() {
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
