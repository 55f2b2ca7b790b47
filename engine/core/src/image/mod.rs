// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Images: the file or block device behind a device, and the operations on it.
//!
//! Knows files: descriptors, geometry, ranges. Does not know rings, workers, ublk or instances. A
//! worker issues the operations by this table:
//!
//! | block operation | on the file, at [`Geometry::offset`] + request offset | success condition |
//! |---|---|---|
//! | READ | read | all bytes were read; a short read is resumed. 0 before the end means that the image has shrunk: EIO, and the device is degraded |
//! | WRITE | write | all bytes were written; a short write is resumed. 0 is EIO: to ublk any result that is not negative means "all written" |
//! | WRITE with FUA, or to a device with durable writes | write with RWF_DSYNC | as WRITE; the data is durable before it completes |
//! | either, EINVAL although direct I/O was allowed | a retry through the page cache: [`Image::disable_direct_io`] | for example, the file shares blocks now |
//! | either, EINTR or EAGAIN | a retry | a bounded number of times, then the errno |
//! | FLUSH | fdatasync, one for all pending flushes: [`FlushQueue`] | it started after the flush arrived |
//! | DISCARD | fallocate PUNCH_HOLE, KEEP_SIZE: [`DiscardQueue`] | nothing outside the request changes; a partial block stays |
//! | WRITE_ZEROES | fallocate PUNCH_HOLE, KEEP_SIZE, byte-exact | every byte reads as zero; on EOPNOTSUPP, zeroes are written |
//! | WRITE_ZEROES, keep blocks | fallocate ZERO_RANGE, KEEP_SIZE | as above, and the blocks stay allocated |
//! | WRITE_ZEROES with FUA | as above, then fdatasync | durable before it completes |
//! | any modification, read-only | none: EPERM | |
//!
//! fallocate takes the inode lock and waits for all direct I/O on the file. Hence discards are
//! merged, and one punch is in flight at a time. The file is opened with O_DIRECT (unless
//! buffered), and its cached pages are dropped first, since any cached page makes every direct
//! write invalidate it.

mod create;
mod discard;
mod durability;
mod durable_writes;
mod flush;
pub mod fs;
mod geometry;
mod identity;
mod open;
pub mod partitions;
mod probe;
mod region;
mod seek;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{MemfdFlags, Mode, OFlags, SealFlags, fcntl_add_seals, memfd_create};

use crate::error::{Error, Kind, Result};
use crate::failures::Failures;
use crate::sys::printable;

pub use create::create;
pub use discard::{DiscardQueue, Punch};
pub use durability::{Durability, QuietMoment};
pub use flush::FlushQueue;
pub use geometry::{BLOCK_MAX, FileProperties, Geometry, KERNEL_LOOP_BLOCK_MAX, is_block_size};
pub use identity::Identity;
pub use region::Region;

/// The part of a file that a device maps, and how it is used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ImageSpec {
    /// First byte of the file that the device maps.
    pub offset: u64,
    /// Maximum size in bytes; 0: to the end of the file.
    pub size_limit: u64,
    /// Logical block size in bytes; 0: the smallest that the file supports.
    pub block_size: u32,
    /// The file is never written.
    pub read_only: bool,
    /// Use the page cache instead of direct I/O.
    pub buffered: bool,
    /// Size rules of loop(4): any offset, 512-byte sectors whatever the block size, and size 0 for
    /// an empty range. If direct I/O does not support that, the error is [`Kind::Unsupported`].
    pub loop_semantics: bool,
    /// Every write is durable when it completes.
    pub durable: bool,
}

/// An image: a private file description, which nobody else can change, and its geometry.
#[derive(Debug)]
pub struct Image {
    file: OwnedFd,
    /// Properties of the file; its size is as of the last check.
    properties: FileProperties,
    spec: ImageSpec,
    identity: Identity,
    geometry: Geometry,
    /// See [`Image::may_block`].
    may_block: bool,
    /// See [`Image::is_placeholder`].
    placeholder: bool,
    /// Why direct I/O is not used although requested.
    buffered_reason: Option<String>,
    /// Direct I/O was disabled since the last check.
    direct_io_disabled: AtomicBool,
    /// The path, for messages only.
    name: String,
    /// Counter of failed I/O, if any.
    failures: Option<Arc<Failures>>,
    durability: Arc<Durability>,
}

impl Image {
    /// Takes a file that a caller opened. Trusts nothing about it.
    ///
    /// The caller must have opened it with the access that `spec` needs. Only regular files and
    /// block devices are accepted. The file is then opened again, so that nobody shares our file
    /// description, and the caller's is closed.
    ///
    /// May block as long as the file's file system does (NFS, FUSE), and while cached pages are
    /// written back: never call it on a worker.
    pub fn open(file: OwnedFd, spec: &ImageSpec, path_for_messages: &str) -> Result<Image> {
        let name = printable(path_for_messages);
        open::check_access(file.as_fd(), spec.read_only, &name)?;
        Self::adopt(file.as_fd(), spec, name, None)
    }

    /// The placeholder image of an unbound device: size 0, every request fails.
    pub fn unbound(block_size: u32) -> Result<Image> {
        let name = "/dev/null";
        let file = rustix::fs::open(name, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
            .map_err(|e| Error::os(e, "cannot open /dev/null"))?;
        Image::placeholder(file, name, block_size)
    }

    /// The same for the kernel's loop driver: a file that stays empty.
    pub fn empty(block_size: u32) -> Result<Image> {
        let made = || {
            let file = memfd_create("loopengine", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
            fcntl_add_seals(&file, SealFlags::GROW | SealFlags::SEAL)?;
            Ok(file)
        };
        let file = made().map_err(|e: rustix::io::Errno| Error::os(e, "cannot create an empty file"))?;
        Image::placeholder(file, "nothing", block_size)
    }

    fn placeholder(file: OwnedFd, name: &str, block_size: u32) -> Result<Image> {
        let spec = ImageSpec { loop_semantics: true, buffered: true, block_size, ..ImageSpec::default() };
        let properties = FileProperties {
            size: 0,
            block_device: false,
            offset_align: 1,
            mem_align: 1,
            physical_block_size: block_size,
            // A device's features are fixed before its image is known. An image without them fails
            // such requests.
            discard_granularity: 4096,
            can_punch: true,
        };
        Ok(Image {
            geometry: Geometry::compute(&properties, &spec, name)?,
            identity: Identity::of(file.as_fd(), name)?,
            file,
            properties,
            spec,
            may_block: false,
            placeholder: true,
            buffered_reason: None,
            direct_io_disabled: AtomicBool::new(false),
            name: name.to_owned(),
            failures: None,
            durability: Arc::default(),
        })
    }

    /// Opens the image of a device of this `shape` again after a restart, by path, and only if it
    /// is the same file. See [`Image::recover`].
    ///
    /// Errors: [`Kind::NotFound`] if the path does not exist or leads to another file.
    pub fn reopen(path: &Path, spec: &ImageSpec, expected: &Identity, shape: &Geometry) -> Result<Image> {
        let name = printable(&path.to_string_lossy());
        // O_PATH has no side effects; opening some device nodes has.
        let handle = rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
            .map_err(|e| Error::os(e, format!("cannot open image {name}")))?;
        if !Identity::of(handle.as_fd(), &name)?.is_same_file(expected) {
            return Err(Error::new(
                Kind::NotFound,
                format!("{name} is not the file that was attached before"),
            )
            .hint("put the image back at that path, or detach the device with --force"));
        }
        Self::adopt_for(handle.as_fd(), spec, name, shape)
    }

    /// Takes a file that a caller opened, for an existing device, which keeps its `shape`. If the
    /// file no longer supports direct I/O in that shape, the page cache is used.
    pub fn recover(
        file: OwnedFd,
        spec: &ImageSpec,
        shape: &Geometry,
        path_for_messages: &str,
    ) -> Result<Image> {
        let name = printable(path_for_messages);
        open::check_access(file.as_fd(), spec.read_only, &name)?;
        Self::adopt_for(file.as_fd(), spec, name, shape)
    }

    fn adopt_for(handle: BorrowedFd<'_>, spec: &ImageSpec, name: String, shape: &Geometry) -> Result<Image> {
        match Self::adopt(handle, spec, name.clone(), Some(shape)) {
            Err(error) if error.kind() == Kind::Unsupported && !spec.buffered => {
                let image = Self::adopt(handle, &ImageSpec { buffered: true, ..*spec }, name, Some(shape))?;
                Ok(Image { buffered_reason: Some(error.message()), ..image })
            }
            outcome => outcome,
        }
    }

    /// `shape`: of an existing device; none: computed from the file.
    fn adopt(
        handle: BorrowedFd<'_>,
        spec: &ImageSpec,
        name: String,
        shape: Option<&Geometry>,
    ) -> Result<Image> {
        let geometry = |properties: &FileProperties| match shape {
            Some(shape) => shape.check(properties, &name).map(|()| *shape),
            None => Geometry::compute(properties, spec, &name),
        };
        let kind = open::file_kind(handle, &name)?;
        let file = open::reopen(handle, kind, spec, &name)?;
        let identity = Identity::of(file.as_fd(), &name)?;
        if identity != Identity::of(handle, &name)? {
            return Err(Error::new(Kind::Internal, format!("{name} was replaced while it was opened")));
        }
        let mut properties = probe::properties(file.as_fd(), kind, spec, &name)?;
        // Validates the request before the file is touched.
        geometry(&properties)?;
        if !spec.buffered {
            open::drop_cached_pages(file.as_fd(), spec.read_only, &name)?;
        }
        if !spec.read_only {
            properties.can_punch = probe::can_punch(file.as_fd(), kind, properties.size);
        }
        let geometry = geometry(&properties)?;
        // An existing device keeps its promise wherever its image is.
        if spec.durable && shape.is_none() {
            durable_writes::prepare(file.as_fd(), &properties, geometry.offset, geometry.size, &name)?;
        }
        Ok(Image {
            geometry,
            // Block device data bypasses the file system of the device's node.
            may_block: !properties.block_device && probe::may_block(file.as_fd(), &name)?,
            placeholder: false,
            file,
            properties,
            spec: *spec,
            identity,
            buffered_reason: None,
            direct_io_disabled: AtomicBool::new(false),
            name,
            failures: None,
            durability: Arc::default(),
        })
    }

    /// Counts failed I/O in `failures`.
    #[must_use]
    pub fn with_failure_counter(self, failures: Arc<Failures>) -> Image {
        Image { failures: Some(failures), ..self }
    }

    /// Shares the knowledge of what is durable with other images of the same file.
    #[must_use]
    pub fn with_durability(self, durability: Arc<Durability>) -> Image {
        Image { durability, ..self }
    }

    /// What is known to be durable.
    pub fn durability(&self) -> &Durability {
        &self.durability
    }

    /// Counts a failed request. `short`: the file ends before the device does.
    #[cold]
    pub fn count_failure(&self, errno: i32, short: bool) {
        self.failures.iter().for_each(|failures| failures.count(errno, short));
    }

    /// The path, printable.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The descriptor of the worker's operations.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// The identity of the file, independent of its path.
    pub fn identity(&self) -> Identity {
        self.identity
    }

    /// The geometry, as of the last check.
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// Maximum size of the device in bytes, as requested; 0: to the end of the file.
    pub fn size_limit(&self) -> u64 {
        self.spec.size_limit
    }

    /// Transfers may block the thread that submits them, so they must be submitted with
    /// IOSQE_ASYNC.
    pub fn may_block(&self) -> bool {
        self.may_block
    }

    /// It is [`Image::unbound`] or [`Image::empty`], on no file system that anybody can delay.
    pub fn is_placeholder(&self) -> bool {
        self.placeholder
    }

    /// Whether data goes through the page cache.
    pub fn is_buffered(&self) -> bool {
        rustix::fs::fcntl_getfl(&self.file).is_ok_and(|flags| !flags.contains(OFlags::DIRECT))
    }

    /// Why data goes through the page cache although direct I/O was requested.
    pub fn buffered_reason(&self) -> Option<&str> {
        let refused = !self.spec.buffered && self.is_buffered();
        self.buffered_reason.as_deref().or(refused.then_some("its file system refused direct I/O"))
    }

    /// Falls back to the page cache after the file system rejected direct I/O. Returns false if
    /// direct I/O is not the cause. The file description is private, so all queues change at once:
    /// no write bypasses the cache while another one uses it.
    pub fn disable_direct_io(&self) -> bool {
        let Ok(flags) = rustix::fs::fcntl_getfl(&self.file) else { return false };
        if self.spec.buffered || !flags.contains(OFlags::DIRECT) {
            return !self.spec.buffered;
        }
        self.direct_io_disabled.store(true, Ordering::Relaxed);
        rustix::fs::fcntl_setfl(&self.file, flags - OFlags::DIRECT).is_ok()
    }

    /// Whether direct I/O was disabled since the last call.
    pub fn take_direct_io_disabled(&self) -> bool {
        self.direct_io_disabled.swap(false, Ordering::Relaxed)
    }

    /// Whether it is a block device.
    pub fn is_block_device(&self) -> bool {
        self.properties.block_device
    }

    /// The file's present size in bytes.
    pub fn length(&self) -> Result<u64> {
        probe::size(self.file.as_fd(), self.properties.block_device, &self.name)
    }

    /// Truncates or extends the file; new bytes take no space.
    pub fn set_length(&self, bytes: u64) -> Result<()> {
        // A flush must make the new length durable.
        self.durability.begin();
        let done = rustix::io::retry_on_intr(|| rustix::fs::ftruncate(&self.file, bytes));
        self.durability.end();
        done.map_err(|error| Error::os(error, format!("cannot resize {} to {bytes} bytes", self.name)))
    }

    /// The geometry of a device of `size` bytes, and the file length that it needs. `now`: the
    /// present device size. Rejects a size that would truncate bytes beyond the device.
    pub fn geometry_for_size(&self, size: u64, now: u64) -> Result<(Geometry, u64)> {
        let Image { name, spec, .. } = self;
        let refuse = |context: String, hint: &str| Err(Error::new(Kind::Invalid, context).hint(hint));
        if self.properties.block_device {
            let hint = "resize it with its own tools, then resize the device without --size";
            return refuse(format!("{name} is a block device: the daemon cannot resize it"), hint);
        }
        let block = u64::from(self.geometry.block_size);
        if size == 0 || !size.is_multiple_of(block) {
            let context = format!("{size} bytes are not a multiple of the block size, {block} bytes");
            return refuse(context, "give another --size");
        }
        if spec.size_limit != 0 && size > spec.size_limit {
            let context = format!("the device was attached with --size-limit {}", spec.size_limit);
            return refuse(context, "give a smaller --size, or attach it again");
        }
        let (old, end) = (self.length()?, spec.offset.saturating_add(now));
        let new = spec.offset.saturating_add(size);
        if new < old && old >= end.saturating_add(block) {
            let context = format!("{} bytes of {name} follow the device and would be lost", old - end);
            return refuse(context, "resize the image yourself, then resize the device without --size");
        }
        if spec.durable && new > old {
            let context = format!("{name} would get a part that is not written, and writes must be durable");
            return refuse(context, "write its new part yourself, then resize the device without --size");
        }
        let properties = FileProperties { size: new, ..self.properties };
        Ok((Geometry::compute(&properties, spec, name)?, new))
    }

    /// The geometry for the file's present size; `geometry` keeps the old one.
    ///
    /// Fails if the file has become too small for a device.
    pub fn current_geometry(&self) -> Result<Geometry> {
        let properties = FileProperties { size: self.length()?, ..self.properties };
        let geometry = Geometry::compute(&properties, &self.spec, &self.name)?;
        if geometry.durable_writes {
            durable_writes::prepare(self.fd(), &properties, geometry.offset, geometry.size, &self.name)?;
        }
        Ok(geometry)
    }
}
