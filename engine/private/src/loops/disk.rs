//! A block device of a pool that has appeared: what it shows, and who has it.
//!
//! Knows one disk. Who makes disks and gives used ones a new life is `maker`.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::CWD;
use rustix::mount::{OpenTreeFlags, open_tree};

use super::{Answer, errno, errno_of};
use crate::image::Image;
use crate::instance::served::{Served, Traffic};
use crate::sys::{block, usage};

/// A block device that has appeared.
#[derive(Debug)]
pub struct Disk {
    pub(super) served: Box<Served>,
    /// Its device number.
    pub rdev: u64,
    /// Logical block size in bytes.
    pub block_size: u32,
}

impl Disk {
    /// Bytes.
    pub fn size(&self) -> u64 {
        self.served.geometry().size
    }

    /// What goes on; none: its workers do not say.
    pub fn traffic(&self) -> Option<Traffic> {
        self.served.traffic().ok()
    }

    /// Shows a file, or another part of the same file.
    pub fn show(&self, image: Image) -> Answer<()> {
        self.served.replace(image).map_err(|error| errno(&error))
    }

    /// Shows a file for the first time. Read-only before anything can be written; `closed`: for now.
    pub fn present(&self, image: Image, read_only: bool, closed: bool) -> Answer<()> {
        // While nothing can be in flight. Whoever waited for the last close before did not wait for this.
        self.served.device().disable_scheduler();
        if !read_only && !image.geometry().can_discard {
            // A disk offers discards before it has an image. The block layer takes a refusal for success.
            self.set_discard_support(false)?;
        }
        if read_only || closed {
            self.set_read_only(true)?;
        }
        self.show(image)
    }

    fn set_discard_support(&self, offer: bool) -> Answer<()> {
        self.served.device().set_discard_support(offer).map_err(|error| errno(&error))
    }

    /// Shows nothing again, after a `present` that failed: nobody was told that it is bound.
    pub fn withdraw(&self) {
        let nothing = Image::unbound(self.block_size).map_err(|error| errno(&error));
        let withdrawn = nothing
            .and_then(|image| self.show(image))
            .and_then(|()| self.set_read_only(false))
            .and_then(|()| self.set_discard_support(true));
        if let Err(error) = withdrawn {
            tracing::error!(%error, rdev = self.rdev, "an unbound disk still shows a file");
        }
    }

    /// Adapts to the present size of its file.
    pub fn adapt(&self) -> Answer<()> {
        self.served.resize(None, |_, _| Ok(())).map(drop).map_err(|error| errno(&error))
    }

    /// Opens its node, for a caller.
    pub fn open(&self, writable: bool) -> Answer<OwnedFd> {
        let file = File::options().read(true).write(writable).open(self.served.device().node());
        file.map(OwnedFd::from).map_err(|error| errno_of(&error))
    }

    /// Writes back and forgets what the kernel has cached of it.
    pub fn flush(&self) -> Answer<()> {
        block::flush(self.open(false)?.as_fd())
    }

    /// Its node, as a mount that is mounted nowhere yet, for other mount namespaces.
    pub fn node(&self) -> Answer<OwnedFd> {
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        open_tree(CWD, self.served.device().node(), flags)
    }

    /// Refuses writes, or not.
    pub fn set_read_only(&self, read_only: bool) -> Answer<()> {
        block::set_read_only(self.open(false)?.as_fd(), read_only)
    }

    /// Other disks lie upon it: device mapper's, md's.
    pub fn has_holders(&self) -> bool {
        usage::has_holders(self.rdev)
    }

    /// Somebody has mounted it, or opened it with O_EXCL.
    pub fn is_claimed(&self) -> bool {
        use std::os::unix::fs::OpenOptionsExt;
        let opened = File::options().read(true).custom_flags(libc::O_EXCL).open(self.served.device().node());
        opened.is_err_and(|error| error.raw_os_error() == Some(libc::EBUSY))
    }
}
