// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Block device ioctls that rustix lacks.

use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::io::Errno;

use super::ioctl;

/// Writes back and drops what is cached of a block device.
pub fn flush(device: BorrowedFd<'_>) -> Result<(), Errno> {
    // SAFETY: BLKFLSBUF takes no argument; the descriptor is open for the call (borrowed).
    answer(unsafe { libc::ioctl(device.as_raw_fd(), ioctl::BLKFLSBUF as libc::Ioctl, 0) })
}

/// Has the kernel read the partition table of a disk again, and waits for it. EBUSY: one of the partitions is
/// in use.
pub fn read_partitions(device: BorrowedFd<'_>) -> Result<(), Errno> {
    // SAFETY: BLKRRPART takes no argument; the descriptor is open for the call (borrowed).
    answer(unsafe { libc::ioctl(device.as_raw_fd(), ioctl::BLKRRPART as libc::Ioctl, 0) })
}

/// Has the block layer refuse writes to a device, or take them again.
pub fn set_read_only(device: BorrowedFd<'_>, read_only: bool) -> Result<(), Errno> {
    let flag = libc::c_int::from(read_only);
    // SAFETY: BLKROSET reads one int, which lives until the call returns.
    answer(unsafe { libc::ioctl(device.as_raw_fd(), ioctl::BLKROSET as libc::Ioctl, &raw const flag) })
}

/// Whether the block layer refuses writes to a device.
pub fn is_read_only(device: BorrowedFd<'_>) -> Result<bool, Errno> {
    let mut flag: libc::c_int = 0;
    // SAFETY: BLKROGET writes one int, which lives until the call returns.
    answer(unsafe { libc::ioctl(device.as_raw_fd(), ioctl::BLKROGET as libc::Ioctl, &raw mut flag) })?;
    Ok(flag != 0)
}

/// Size of a block device in bytes.
pub fn size(device: BorrowedFd<'_>) -> Result<u64, Errno> {
    let mut bytes = 0u64;
    // SAFETY: BLKGETSIZE64 writes one u64, which lives until the call returns.
    answer(unsafe { libc::ioctl(device.as_raw_fd(), ioctl::BLKGETSIZE64 as libc::Ioctl, &raw mut bytes) })?;
    Ok(bytes)
}

/// Number of a disk in the order of all that the kernel has had.
pub fn disk_sequence(device: BorrowedFd<'_>) -> Result<u64, Errno> {
    let mut sequence = 0u64;
    // SAFETY: BLKGETDISKSEQ writes one u64, which lives until the call returns.
    answer(unsafe {
        libc::ioctl(device.as_raw_fd(), ioctl::BLKGETDISKSEQ as libc::Ioctl, &raw mut sequence)
    })?;
    Ok(sequence)
}

fn answer(result: libc::c_int) -> Result<(), Errno> {
    if result >= 0 {
        Ok(())
    } else {
        Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO))
    }
}
