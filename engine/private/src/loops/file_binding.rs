// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The backing file of a device: the caller's file, checked, and reopened for I/O.
//!
//! Knows which backing files loop(4) accepts, and how a tenant could misuse one. Does not know
//! devices.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;

use rustix::fs::{FileType, OFlags};

use super::disk_allocator::DiskAllocator;
use super::name_watcher::NameWatch;
use super::{Answer, Bound, Errno, LoopConfig, LoopInfo, NAME_BYTES, errno, flag};
use crate::error::Kind;
use crate::failures::Failures;
use crate::image::{Durability, Image, ImageSpec, is_block_size};
use crate::instance::claims::Claims;
use crate::instance::claims::sharing::{self, Hold};

/// Flags that LOOP_CONFIGURE accepts.
const CONFIGURABLE: u32 = flag::READ_ONLY | flag::AUTOCLEAR | flag::PARTSCAN | flag::DIRECT_IO;
/// Valid block sizes.
const BLOCK_SIZES: [u32; 4] = [512, 1024, 2048, 4096];

/// An open backing file.
#[derive(Debug)]
pub struct FileBinding {
    /// The caller's file, kept to examine and reopen it; never used for I/O.
    file: OwnedFd,
    /// The requested values, with the resulting flags.
    pub info: LoopInfo,
    /// Logical block size in bytes.
    pub block_size: u32,
    /// Direct I/O is used (whether it was requested or not).
    direct: bool,
    /// See [`DiskAllocator::is_kernel_loop`].
    direct_on_request: bool,
    _hold: Hold,
    shared: Shared,
    device: u64,
    inode: u64,
    rdevice: u64,
    /// The loop device of the same pool that is the file, if the daemon opened it for the caller.
    below: Option<u32>,
    _name: Option<NameWatch>,
}

/// What all disks of a device share, those of partitions included.
#[derive(Clone, Debug)]
struct Shared {
    /// Failed requests.
    failures: Arc<Failures>,
    durability: Arc<Durability>,
}

/// Refuses a file of the wrong type, which the driver checks first.
pub fn check_kind(file: &OwnedFd, claims: &Claims) -> Answer<()> {
    let stat = rustix::fs::fstat(file)?;
    match FileType::from_raw_mode(stat.st_mode) {
        // The loop-control of a pool is one of these.
        FileType::RegularFile | FileType::CharacterDevice if !claims.allows_images_on(stat.st_dev) => {
            Err(Errno::INVAL)
        }
        // Anonymous inodes, as of eventfd, have no type.
        FileType::Directory | FileType::Unknown => Err(Errno::INVAL),
        _ => Ok(()),
    }
}

/// Does the checks that LOOP_CONFIGURE and LOOP_SET_STATUS64 have in common. Returns the values to
/// keep: a terminated name, and nothing of encryption.
pub fn check_info(info: &LoopInfo) -> Answer<LoopInfo> {
    if info.encrypt_key_size > 32 || info.encrypt_type != 0 {
        return Err(Errno::INVAL);
    }
    if info.offset > i64::MAX as u64 || info.size_limit > i64::MAX as u64 {
        return Err(Errno::OVERFLOW);
    }
    let mut kept = LoopInfo { encrypt_key_size: 0, ..*info };
    kept.file_name[NAME_BYTES - 1] = 0;
    Ok(kept)
}

/// The requested logical block size: a power of two, 512 to a page. `kernel_loop`: the kernel's loop
/// driver decides whether it can be more.
pub fn check_block_size(bytes: u64, kernel_loop: bool) -> Answer<u32> {
    match u32::try_from(bytes) {
        Ok(0) => Ok(BLOCK_SIZES[0]),
        Ok(size) if BLOCK_SIZES.contains(&size) || kernel_loop && is_block_size(size) => Ok(size),
        _ => Err(Errno::INVAL),
    }
}

impl FileBinding {
    /// Opens the image of a caller's file for loopN. `writes`: the device was opened for writing.
    pub fn open(
        with: LoopConfig,
        writes: bool,
        number: u32,
        allocator: &DiskAllocator,
    ) -> Answer<(FileBinding, Image)> {
        let (claims, direct_on_request) = (&allocator.shared().claims, allocator.is_kernel_loop());
        // The checks have the driver's order.
        let file = with.file;
        let stat = rustix::fs::fstat(&file)?;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile | FileType::BlockDevice => {}
            _ => return Err(Errno::INVAL),
        }
        if with.info.flags & !CONFIGURABLE != 0 {
            return Err(Errno::INVAL);
        }
        let mut info = check_info(&with.info)?;
        let mut block_size = check_block_size(with.block_size.into(), direct_on_request)?;
        let opened = rustix::fs::fcntl_getfl(&file)?;
        if opened & OFlags::RWMODE == OFlags::RDONLY || !writes {
            info.flags |= flag::READ_ONLY;
        }
        if opened.contains(OFlags::DIRECT) {
            info.flags |= flag::DIRECT_IO;
        }
        let failures =
            Failures::of(claims.pool_device(number).to_string(), path(&file).display().to_string());
        let shared = Shared { failures, durability: Arc::default() };
        if with.block_size == 0 && info.flags & flag::DIRECT_IO != 0 {
            block_size = direct_block_size(&file, &info, &shared);
        }
        let (image, direct) = open(&file, &info, block_size, direct_on_request, &shared)?;
        if !direct {
            info.flags &= !flag::DIRECT_IO;
        }
        let read_only = info.flags & flag::READ_ONLY != 0;
        let hold =
            sharing::claim_for_pool(claims, &image, number, read_only).map_err(|error| errno(&error))?;
        // A server of FUSE may delay this as long as it likes.
        let _name = if image.may_block() { None } else { allocator.watch_name(file.as_fd()) };
        let binding = FileBinding {
            file,
            info,
            block_size,
            direct,
            direct_on_request,
            _hold: hold,
            shared,
            device: stat.st_dev,
            inode: stat.st_ino,
            rdevice: stat.st_rdev,
            below: allocator.last_device(stat.st_rdev),
            _name,
        };
        Ok((binding, image))
    }

    /// Opens the image again, with another offset, limit or block size.
    pub fn reopen(&self, info: &LoopInfo, block_size: u32) -> Answer<(Image, bool)> {
        open(&self.file, info, block_size, self.direct_on_request, &self.shared)
    }

    /// The same, read-only.
    pub fn reopen_read_only(&self, info: &LoopInfo, block_size: u32) -> Answer<Image> {
        let info = LoopInfo { flags: info.flags | flag::READ_ONLY, ..*info };
        self.reopen(&info, block_size).map(|(image, _)| image)
    }

    /// Takes over the arguments and the result of `reopen`.
    pub fn adopt(&mut self, info: LoopInfo, block_size: u32, direct: bool) {
        if self.direct && !direct {
            tracing::warn!(
                "a loop device on {} uses the page cache: direct I/O is no longer possible",
                path(&self.file).display()
            );
        }
        self.direct = direct;
        self.block_size = block_size;
        self.info = info;
        if !direct {
            self.info.flags &= !flag::DIRECT_IO;
        }
    }

    /// Whether direct I/O is used, and not only requested.
    pub fn is_direct(&self) -> bool {
        self.direct
    }

    /// Whether writes are refused.
    pub fn read_only(&self) -> bool {
        self.info.flags & flag::READ_ONLY != 0
    }

    /// Device number of the backing file, if it is a block device.
    pub fn rdevice(&self) -> u64 {
        self.rdevice
    }

    /// File system, inode, and device number, as in stat(2).
    pub fn stat_numbers(&self) -> (u64, u64, u64) {
        (self.device, self.inode, self.rdevice)
    }

    /// For listings and sysfs.
    pub fn to_bound(&self) -> Bound {
        let (image_device, image_inode) = match self.rdevice {
            0 => (self.device, self.inode),
            rdevice => (rdevice, 0),
        };
        Bound {
            // Not the daemon's name of its disk.
            backing_file: self
                .below
                .map_or_else(|| path(&self.file), |number| format!("/dev/loop{number}").into()),
            image_device,
            image_inode,
            offset: self.info.offset,
            size_limit: self.info.size_limit,
            flags: self.info.flags,
        }
    }
}

/// The smallest block size that allows direct I/O at any offset of a file; without one, the
/// smallest.
fn direct_block_size(file: &OwnedFd, info: &LoopInfo, shared: &Shared) -> u32 {
    let whole = LoopInfo { offset: 0, size_limit: 0, ..*info };
    let direct = |size: &u32| open(file, &whole, *size, true, shared).is_ok_and(|(_, direct)| direct);
    BLOCK_SIZES.into_iter().find(direct).unwrap_or(BLOCK_SIZES[0])
}

/// Opens the image for direct I/O if possible; unless `on_request`, whether it was requested or not:
/// the device behaves the same, and is faster.
fn open(
    file: &OwnedFd,
    info: &LoopInfo,
    block_size: u32,
    on_request: bool,
    shared: &Shared,
) -> Answer<(Image, bool)> {
    let read_only = info.flags & flag::READ_ONLY != 0;
    let buffered = on_request && info.flags & flag::DIRECT_IO == 0;
    let source = ImageSpec {
        offset: info.offset,
        size_limit: info.size_limit,
        block_size,
        read_only,
        buffered,
        loop_semantics: true,
        durable: false,
    };
    let attempt = |source: &ImageSpec| {
        let file = rustix::io::fcntl_dupfd_cloexec(file, 0)?;
        let Shared { failures, durability } = shared.clone();
        let image = Image::open(file, source, failures.image());
        Ok::<_, Errno>(image.map(|image| image.with_failure_counter(failures).with_durability(durability)))
    };
    match attempt(&source)? {
        Ok(image) => Ok((image, !buffered)),
        Err(error) if error.kind() == Kind::Unsupported => {
            let image = attempt(&ImageSpec { buffered: true, ..source })?.map_err(|error| errno(&error))?;
            Ok((image, false))
        }
        Err(error) => Err(errno(&error)),
    }
}

/// The file's present path in the mounts of its opener. Asks no file system.
fn path(file: &OwnedFd) -> PathBuf {
    std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap_or_default()
}
