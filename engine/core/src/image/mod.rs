//! Where bytes live: the file or block device behind a device, and what may be done to it.
//!
//! Knows files: which descriptor, which geometry, which ranges. Does not know rings, workers,
//! ublk or instances: a worker issues the operations, by this table:
//!
//! | block operation | on the file, at [`Geometry::offset`] + request offset | right when |
//! |---|---|---|
//! | READ | read | all bytes came; a short read goes on where it stopped. 0 before the end means that the image has shrunk: EIO, and the device is degraded |
//! | WRITE | write | all bytes went; a short write goes on where it stopped. 0 is EIO: to ublk any result that is not negative means "all written" |
//! | WRITE with FUA | write with RWF_DSYNC | as WRITE; the data is durable before it completes |
//! | either, EINVAL although direct I/O was allowed | the same again, through the page cache: [`Image::leave_direct_io`] | the file shares blocks now, for example |
//! | either, EINTR or EAGAIN | the same again | a bounded number of times, then the errno |
//! | FLUSH | fdatasync, one for all that wait: [`FlushQueue`] | it began after the flush arrived |
//! | DISCARD | fallocate PUNCH_HOLE, KEEP_SIZE: [`DiscardQueue`] | nothing outside the request is touched; what does not fill a block stays |
//! | WRITE_ZEROES | fallocate PUNCH_HOLE, KEEP_SIZE, byte-exact | every byte reads as zero; EOPNOTSUPP: zeroes are written |
//! | WRITE_ZEROES, keep blocks | fallocate ZERO_RANGE, KEEP_SIZE | as above, and the blocks stay allocated |
//! | WRITE_ZEROES with FUA | as above, then fdatasync | durable before it completes |
//! | any change, read-only | none: EPERM | |
//!
//! fallocate takes the inode's lock and waits for all direct I/O on the file, hence the merging
//! and the limit of one punch in flight. The file itself is opened with O_DIRECT (unless
//! buffered), and its cached pages are dropped first, since any cached page makes every direct
//! write pay for invalidating it.

mod create;
mod discard;
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

use rustix::fs::{Mode, OFlags};

use crate::error::{Error, Kind, Result};
use crate::failures::Failures;

pub use create::create;
pub use discard::{DiscardQueue, Punch};
pub use flush::FlushQueue;
pub use geometry::{Facts, Geometry};
pub use identity::Identity;
pub use region::Region;

/// Which part of a file is shown, and how it is used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Source {
    /// First byte of the file that the device shows.
    pub offset: u64,
    /// Bytes at the most; 0: to the end of the file.
    pub size_limit: u64,
    /// Logical block size in bytes; 0: the smallest that the file allows.
    pub block_size: u32,
    /// Nothing is ever written.
    pub read_only: bool,
    /// Through the page cache instead of by direct I/O.
    pub buffered: bool,
    /// Sizes are what loop(4) makes of them: any offset, sectors of 512 bytes whatever the block size,
    /// and a device that shows nothing of its file has no bytes. With direct I/O, what that cannot do
    /// is [`Kind::Unsupported`].
    pub as_loop: bool,
}

/// An image: a file description of our own, which nobody else can change, and its geometry.
#[derive(Debug)]
pub struct Image {
    file: OwnedFd,
    /// What was found out about the file; its size is as of the last look.
    facts: Facts,
    source: Source,
    identity: Identity,
    geometry: Geometry,
    /// See [`Image::holds_up`].
    holds_up: bool,
    /// Direct I/O was wanted, and why it is not done.
    why_buffered: Option<String>,
    /// Direct I/O was given up since the last look.
    left: AtomicBool,
    /// The path, for messages only.
    name: String,
    /// Where failing I/O is counted, if it is.
    failures: Option<Arc<Failures>>,
}

impl Image {
    /// Takes a file that a caller opened, and trusts nothing about it.
    ///
    /// The caller must have opened it for what `source` wants; only regular files and block
    /// devices are taken. The file is then opened once more, so that nobody shares our file
    /// description, and the caller's is closed.
    ///
    /// May block for as long as the file's file system likes (NFS, FUSE), and while cached pages
    /// are written back: never call it on a worker.
    pub fn open(file: OwnedFd, source: &Source, path_for_messages: &str) -> Result<Image> {
        let name = printable(path_for_messages);
        open::check_access(file.as_fd(), source.read_only, &name)?;
        Self::adopt(file.as_fd(), source, name, None)
    }

    /// No image: a device over it has no size, and every request on it fails.
    pub fn nothing(block_size: u32) -> Result<Image> {
        let name = "/dev/null".to_owned();
        let file = rustix::fs::open("/dev/null", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
            .map_err(|e| Error::os(e, "cannot open /dev/null"))?;
        let source = Source { as_loop: true, buffered: true, block_size, ..Source::default() };
        let facts = Facts {
            size: 0,
            block_device: false,
            offset_align: 1,
            mem_align: 1,
            physical_block_size: block_size,
            // What a device can do is said once, when it has no image yet; what its image cannot, fails.
            discard_granularity: 4096,
            can_punch: true,
        };
        Ok(Image {
            geometry: Geometry::compute(&facts, &source, &name)?,
            identity: Identity::of(file.as_fd(), &name)?,
            file,
            facts,
            source,
            holds_up: false,
            why_buffered: None,
            left: AtomicBool::new(false),
            name,
            failures: None,
        })
    }

    /// Opens the image of a device of this `shape` again after a restart, by path, and only if it is still
    /// the same file. See [`Image::recover`].
    ///
    /// Errors: [`Kind::NotFound`] when the path leads nowhere or to another file.
    pub fn reopen(path: &Path, source: &Source, expected: &Identity, shape: &Geometry) -> Result<Image> {
        let name = printable(&path.to_string_lossy());
        // O_PATH looks without touching: opening some device nodes has effects.
        let handle = rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
            .map_err(|e| Error::os(e, format!("cannot open image {name}")))?;
        if !Identity::of(handle.as_fd(), &name)?.is_still(expected) {
            return Err(Error::new(
                Kind::NotFound,
                format!("{name} is not the file that was attached before"),
            )
            .hint("put the image back at that path, or detach the device with --force"));
        }
        Self::adopt_for(handle.as_fd(), source, name, shape)
    }

    /// Takes a file that a caller opened, for a device that exists and keeps its `shape` whatever the file
    /// allows now. Where it no longer allows direct I/O in that shape, the page cache is used.
    pub fn recover(
        file: OwnedFd,
        source: &Source,
        shape: &Geometry,
        path_for_messages: &str,
    ) -> Result<Image> {
        let name = printable(path_for_messages);
        open::check_access(file.as_fd(), source.read_only, &name)?;
        Self::adopt_for(file.as_fd(), source, name, shape)
    }

    fn adopt_for(handle: BorrowedFd<'_>, source: &Source, name: String, shape: &Geometry) -> Result<Image> {
        match Self::adopt(handle, source, name.clone(), Some(shape)) {
            Err(error) if error.kind() == Kind::Unsupported && !source.buffered => {
                let image = Self::adopt(handle, &Source { buffered: true, ..*source }, name, Some(shape))?;
                Ok(Image { why_buffered: Some(error.message()), ..image })
            }
            outcome => outcome,
        }
    }

    /// `shape`: of a device that exists; none: what the file allows.
    fn adopt(
        handle: BorrowedFd<'_>,
        source: &Source,
        name: String,
        shape: Option<&Geometry>,
    ) -> Result<Image> {
        let geometry = |facts: &Facts| match shape {
            Some(shape) => shape.check(facts, &name).map(|()| *shape),
            None => Geometry::compute(facts, source, &name),
        };
        let kind = open::file_kind(handle, &name)?;
        let file = open::reopen(handle, kind, source, &name)?;
        let identity = Identity::of(file.as_fd(), &name)?;
        if identity != Identity::of(handle, &name)? {
            return Err(Error::new(
                Kind::Internal,
                format!("{name} became another file while it was opened"),
            ));
        }
        let mut facts = probe::facts(file.as_fd(), kind, source, &name)?;
        // Everything that can be wrong with the request is known before the file is touched.
        geometry(&facts)?;
        if !source.buffered {
            open::drop_cached_pages(file.as_fd(), source.read_only, &name)?;
        }
        if !source.read_only {
            facts.can_punch = probe::can_punch(file.as_fd(), kind, facts.size);
        }
        Ok(Image {
            geometry: geometry(&facts)?,
            // Data of a block device does not pass through the file system that its node is on.
            holds_up: !facts.block_device && probe::holds_up(file.as_fd(), &name)?,
            file,
            facts,
            source: *source,
            identity,
            why_buffered: None,
            left: AtomicBool::new(false),
            name,
            failures: None,
        })
    }

    /// Has failing I/O counted there.
    #[must_use]
    pub fn counted(self, failures: Arc<Failures>) -> Image {
        Image { failures: Some(failures), ..self }
    }

    /// A request on it failed. `short`: the file was found to end before the device does.
    #[cold]
    pub fn failed(&self, errno: i32, short: bool) {
        self.failures.iter().for_each(|failures| failures.count(errno, short));
    }

    /// The path, as it may stand in a message.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The descriptor on which the worker's operations go.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Which file this is, whatever path led to it.
    pub fn identity(&self) -> Identity {
        self.identity
    }

    /// Sizes and alignments, as of the last look.
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// Transfers must not be tried by the thread that submits them: it would wait for them.
    pub fn holds_up(&self) -> bool {
        self.holds_up
    }

    /// Data goes through the page cache.
    pub fn is_buffered(&self) -> bool {
        rustix::fs::fcntl_getfl(&self.file).is_ok_and(|flags| !flags.contains(OFlags::DIRECT))
    }

    /// Why data goes through the page cache although direct I/O was wanted.
    pub fn why_buffered(&self) -> Option<&str> {
        let refused = !self.source.buffered && self.is_buffered();
        self.why_buffered.as_deref().or(refused.then_some("its file system refused direct I/O"))
    }

    /// Goes on through the page cache where the file system refuses direct I/O that it took before; false:
    /// direct I/O is not what it refuses. The file description is ours alone, so that all queues change at
    /// once: of two writes to one page, no one bypasses the cache that the other is in.
    pub fn leave_direct_io(&self) -> bool {
        let Ok(flags) = rustix::fs::fcntl_getfl(&self.file) else { return false };
        if self.source.buffered || !flags.contains(OFlags::DIRECT) {
            return !self.source.buffered;
        }
        self.left.store(true, Ordering::Relaxed);
        rustix::fs::fcntl_setfl(&self.file, flags - OFlags::DIRECT).is_ok()
    }

    /// Direct I/O was given up since this was last asked.
    pub fn left_direct_io(&self) -> bool {
        self.left.swap(false, Ordering::Relaxed)
    }

    /// A block device, not a regular file.
    pub fn is_block_device(&self) -> bool {
        self.facts.block_device
    }

    /// Bytes that the file has now.
    pub fn length(&self) -> Result<u64> {
        probe::size(self.file.as_fd(), self.facts.block_device, &self.name)
    }

    /// Changes them; what comes to it takes no space.
    pub fn set_length(&self, bytes: u64) -> Result<()> {
        rustix::io::retry_on_intr(|| rustix::fs::ftruncate(&self.file, bytes))
            .map_err(|error| Error::os(error, format!("cannot give {} a length of {bytes} bytes", self.name)))
    }

    /// The geometry with a device of `size` bytes, and the length that the file must have for it. `now`: what
    /// the device shows. Refuses what would cut off bytes that are not the device's.
    pub fn with_size(&self, size: u64, now: u64) -> Result<(Geometry, u64)> {
        let Image { name, source, .. } = self;
        let refuse = |context: String, hint: &str| Err(Error::new(Kind::Invalid, context).hint(hint));
        if self.facts.block_device {
            let hint = "resize it with its own tools, then the device without --size";
            return refuse(format!("{name} is a block device: its size is not the daemon's to change"), hint);
        }
        let block = u64::from(self.geometry.block_size);
        if size == 0 || !size.is_multiple_of(block) {
            let context = format!("{size} bytes are not a multiple of the block size, {block} bytes");
            return refuse(context, "give another --size");
        }
        if source.size_limit != 0 && size > source.size_limit {
            let context = format!("the device was attached with --size-limit {}", source.size_limit);
            return refuse(context, "give a smaller --size, or attach it again");
        }
        let (old, end) = (self.length()?, source.offset.saturating_add(now));
        let new = source.offset.saturating_add(size);
        if new < old && old >= end.saturating_add(block) {
            let context =
                format!("{} bytes of {name} lie behind the device, and would be cut off", old - end);
            return refuse(context, "change the image by hand, then the device without --size");
        }
        let facts = Facts { size: new, ..self.facts };
        Ok((Geometry::compute(&facts, source, name)?, new))
    }

    /// The geometry that follows from the file's present size; `geometry` keeps what it was.
    ///
    /// When the file has become too small to be shown at all, this is an error.
    pub fn refreshed(&self) -> Result<Geometry> {
        let facts = Facts { size: self.length()?, ..self.facts };
        Geometry::compute(&facts, &self.source, &self.name)
    }
}

/// A path as it may stand in a one-line message or a log, whoever chose it.
pub(crate) fn printable(path: &str) -> String {
    let shown = |c: char| if c.is_control() { '?' } else { c };
    path.chars().map(shown).collect()
}
