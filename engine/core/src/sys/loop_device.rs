// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The ioctls of the kernel's loop driver, loop(4), on a device and on /dev/loop-control.
//!
//! Knows the layout of their arguments. Does not open anything. Each call may block as long as the
//! file system of the backing file does.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use rustix::io::Errno;

use super::ioctl::{
    LOOP_CHANGE_FD, LOOP_CLR_FD, LOOP_CONFIGURE, LOOP_CTL_ADD, LOOP_CTL_REMOVE, LOOP_GET_STATUS64,
    LOOP_SET_BLOCK_SIZE, LOOP_SET_CAPACITY, LOOP_SET_DIRECT_IO, LOOP_SET_STATUS64,
};

/// The device refuses writes.
pub const LO_FLAGS_READ_ONLY: u32 = 1;
/// The driver unbinds the device when its last user closes it.
pub const LO_FLAGS_AUTOCLEAR: u32 = 4;
/// The kernel scans for partitions.
pub const LO_FLAGS_PARTSCAN: u32 = 8;
/// The driver uses direct I/O.
pub const LO_FLAGS_DIRECT_IO: u32 = 16;

/// `struct loop_info64`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct LoopInfo {
    /// Device number of the file system of the backing file.
    pub device: u64,
    /// Inode of the backing file.
    pub inode: u64,
    /// Device number of the backing file, if it is a device.
    pub rdevice: u64,
    /// First byte of the file that the device maps.
    pub offset: u64,
    /// Maximum size in bytes; 0: to the end of the file.
    pub size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    /// LO_FLAGS_*.
    pub flags: u32,
    /// A name that the binder chose; it ends with a zero byte.
    pub file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}
const _: () = assert!(size_of::<LoopInfo>() == 232);

/// `struct loop_config`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
    info: LoopInfo,
    reserved: [u64; 8],
}
const _: () = assert!(size_of::<LoopConfig>() == 304);

impl Default for LoopInfo {
    fn default() -> LoopInfo {
        LoopInfo {
            device: 0,
            inode: 0,
            rdevice: 0,
            offset: 0,
            size_limit: 0,
            number: 0,
            encrypt_type: 0,
            encrypt_key_size: 0,
            flags: 0,
            file_name: [0; 64],
            crypt_name: [0; 64],
            encrypt_key: [0; 32],
            init: [0; 2],
        }
    }
}

impl LoopInfo {
    /// Sets the name, cut to the bytes that fit.
    pub fn set_file_name(&mut self, name: &[u8]) {
        let fits = name.len().min(self.file_name.len() - 1);
        self.file_name = [0; 64];
        self.file_name[..fits].copy_from_slice(&name[..fits]);
    }

    /// The name, up to its zero byte.
    pub fn file_name(&self) -> &[u8] {
        self.file_name.split(|byte| *byte == 0).next().unwrap_or_default()
    }
}

/// Binds a device to a file. EBUSY: it is bound already, or claimed exclusively.
pub fn configure(
    device: impl AsFd,
    file: BorrowedFd<'_>,
    block_size: u32,
    info: &LoopInfo,
) -> Result<(), Errno> {
    let fd = file.as_raw_fd().cast_unsigned();
    let config = LoopConfig { fd, block_size, info: *info, reserved: [0; 8] };
    let device = device.as_fd().as_raw_fd();
    // SAFETY: LOOP_CONFIGURE reads one loop_config, which lives until the call returns, as do both
    // descriptors (borrowed).
    answer(unsafe { libc::ioctl(device, LOOP_CONFIGURE as libc::Ioctl, &raw const config) }).map(drop)
}

/// What a device is bound to. ENXIO: to nothing.
pub fn status(device: impl AsFd) -> Result<LoopInfo, Errno> {
    let mut info = LoopInfo::default();
    let device = device.as_fd().as_raw_fd();
    // SAFETY: LOOP_GET_STATUS64 writes one loop_info64, which lives until the call returns.
    answer(unsafe { libc::ioctl(device, LOOP_GET_STATUS64 as libc::Ioctl, &raw mut info) })?;
    Ok(info)
}

/// Changes flags, name and range of a bound device.
pub fn set_status(device: impl AsFd, info: &LoopInfo) -> Result<(), Errno> {
    let device = device.as_fd().as_raw_fd();
    // SAFETY: LOOP_SET_STATUS64 reads one loop_info64, which lives until the call returns.
    answer(unsafe { libc::ioctl(device, LOOP_SET_STATUS64 as libc::Ioctl, &raw const *info) }).map(drop)
}

/// Unbinds a device, or has its last close unbind it if others have it open.
pub fn clear(device: impl AsFd) -> Result<(), Errno> {
    with_number(device, LOOP_CLR_FD, 0)
}

/// Has a read-only device use another file of the same size.
pub fn change_file(device: impl AsFd, file: BorrowedFd<'_>) -> Result<(), Errno> {
    with_number(device, LOOP_CHANGE_FD, u64::from(file.as_raw_fd().cast_unsigned()))
}

/// Has a device take over the present size of its file.
pub fn set_capacity(device: impl AsFd) -> Result<(), Errno> {
    with_number(device, LOOP_SET_CAPACITY, 0)
}

/// Switches direct I/O. EINVAL: the file cannot do it.
pub fn set_direct_io(device: impl AsFd, on: bool) -> Result<(), Errno> {
    with_number(device, LOOP_SET_DIRECT_IO, u64::from(on))
}

/// Changes the logical block size, in bytes. EAGAIN: the device has dirty pages.
pub fn set_block_size(device: impl AsFd, bytes: u32) -> Result<(), Errno> {
    with_number(device, LOOP_SET_BLOCK_SIZE, u64::from(bytes))
}

/// Adds a device with this number. EEXIST: there is one.
pub fn add(control: impl AsFd, number: u32) -> Result<(), Errno> {
    with_number(control, LOOP_CTL_ADD, u64::from(number))
}

/// Removes a device. EBUSY: it is bound or open.
pub fn remove(control: impl AsFd, number: u32) -> Result<(), Errno> {
    with_number(control, LOOP_CTL_REMOVE, u64::from(number))
}

fn with_number(file: impl AsFd, request: u32, number: u64) -> Result<(), Errno> {
    let file = file.as_fd().as_raw_fd();
    // SAFETY: the argument of these requests is a number or nothing; the descriptor is open for the
    // call (borrowed), as is one that the number names.
    answer(unsafe { libc::ioctl(file, request as libc::Ioctl, number as libc::c_ulong) }).map(drop)
}

fn answer(result: libc::c_int) -> Result<libc::c_int, Errno> {
    match result {
        0.. => Ok(result),
        _ => Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_cut_and_ends_with_zero() {
        let mut info = LoopInfo::default();
        assert_eq!(info.file_name(), b"");
        info.set_file_name(&[b'x'; 100]);
        assert_eq!(info.file_name(), [b'x'; 63]);
        info.set_file_name(b"short");
        assert_eq!(info.file_name(), b"short");
    }

    #[test]
    fn a_file_is_no_loop_device() {
        let null = std::fs::File::open("/dev/null").unwrap();
        assert_eq!(status(&null).err(), Some(Errno::NOTTY));
        assert_eq!(clear(&null), Err(Errno::NOTTY));
    }
}
