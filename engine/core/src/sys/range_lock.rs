// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Locks on parts of a file that belong to the open file, not to a process (F_OFD_SETLK in fcntl(2)).
//!
//! Who inherits the descriptor holds the lock; it ends with the last copy. Everybody heeds it by choice.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Locks `length` bytes from `start` (0: to the end), for writing or for reading. False: another open file
/// has a lock there that does not go with it.
pub fn try_lock(file: BorrowedFd<'_>, start: u64, length: u64, write: bool) -> io::Result<bool> {
    match set(file, start, length, if write { libc::F_WRLCK } else { libc::F_RDLCK }) {
        Err(error) if [Some(libc::EAGAIN), Some(libc::EACCES)].contains(&error.raw_os_error()) => Ok(false),
        done => done.map(|()| true),
    }
}

/// Gives up what this open file has locked there.
pub fn unlock(file: BorrowedFd<'_>, start: u64, length: u64) -> io::Result<()> {
    set(file, start, length, libc::F_UNLCK)
}

fn set(file: BorrowedFd<'_>, start: u64, length: u64, kind: libc::c_int) -> io::Result<()> {
    let position = |bytes: u64| libc::off_t::try_from(bytes).map_err(|_| io::ErrorKind::InvalidInput);
    let (l_start, l_len) = (position(start)?, position(length)?);
    let (l_type, l_whence) = (kind as libc::c_short, libc::SEEK_SET as libc::c_short);
    let lock = libc::flock { l_type, l_whence, l_start, l_len, l_pid: 0 };
    // SAFETY: reads a structure that outlives the call; the descriptor is open.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn parts_that_overlap_exclude_each_other() {
        let path = tempfile::NamedTempFile::new().unwrap();
        let open = || File::options().read(true).write(true).open(path.path()).unwrap();
        let (one, other) = (open(), open());
        assert!(try_lock(one.as_fd(), 512, 512, true).unwrap());
        let inherited = one.try_clone().unwrap();
        drop(one);
        assert!(!try_lock(other.as_fd(), 0, 0, true).unwrap());
        assert!(!try_lock(other.as_fd(), 600, 1, false).unwrap());
        assert!(try_lock(other.as_fd(), 0, 512, true).unwrap());
        unlock(inherited.as_fd(), 512, 512).unwrap();
        assert!(try_lock(inherited.as_fd(), 600, 1, false).unwrap());
        assert!(try_lock(other.as_fd(), 512, 0, false).unwrap(), "two that read");
        assert!(!try_lock(other.as_fd(), 512, 0, true).unwrap());
        drop(inherited);
        assert!(try_lock(other.as_fd(), 512, 0, true).unwrap());
        assert!(try_lock(other.as_fd(), u64::MAX, 0, false).is_err());
    }
}
