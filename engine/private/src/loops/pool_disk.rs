// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A started disk of a pool: its image, its node, its users.
//!
//! Knows one disk. `disk_allocator` creates and replaces disks.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::CWD;
use rustix::mount::{OpenTreeFlags, open_tree};

use super::{Answer, errno, errno_of};
use crate::image::Image;
use crate::instance::served::{Served, Traffic};
use crate::sys::{block, usage};

/// A started disk.
#[derive(Debug)]
pub struct PoolDisk {
    pub(super) served: Box<Served>,
    /// Its device number.
    pub rdev: u64,
    /// Logical block size in bytes.
    pub block_size: u32,
}

impl PoolDisk {
    /// Bytes.
    pub fn size(&self) -> u64 {
        self.served.geometry().size
    }

    /// Its I/O counters. None: its workers do not answer.
    pub fn traffic(&self) -> Option<Traffic> {
        self.served.traffic().ok()
    }

    /// Serves another image, or another range of the same file.
    pub fn set_image(&self, image: Image) -> Answer<()> {
        self.served.replace(image).map_err(|error| errno(&error))
    }

    /// Binds an unbound disk to an image. `read_only` and `closed` both refuse writes from the
    /// start; `closed` is temporary.
    pub fn bind(&self, image: Image, read_only: bool, closed: bool) -> Answer<()> {
        // Done while nothing can be in flight, and not before: a last close did not wait for this.
        self.served.device().disable_scheduler();
        if !read_only && !image.geometry().can_discard {
            // An unbound disk advertises discards. The block layer would take a refused discard for
            // success.
            self.set_discard_support(false)?;
        }
        if read_only || closed {
            self.set_read_only(true)?;
        }
        self.set_image(image)
    }

    fn set_discard_support(&self, offer: bool) -> Answer<()> {
        self.served.device().set_discard_support(offer).map_err(|error| errno(&error))
    }

    /// Unbinds the disk after a failed `bind`, which no user has seen.
    pub fn unbind(&self) {
        let nothing = Image::unbound(self.block_size).map_err(|error| errno(&error));
        let withdrawn = nothing
            .and_then(|image| self.set_image(image))
            .and_then(|()| self.set_read_only(false))
            .and_then(|()| self.set_discard_support(true));
        if let Err(error) = withdrawn {
            tracing::error!(%error, rdev = self.rdev, "cannot unbind a disk: it still serves its file");
        }
    }

    /// Takes over the current size of its file.
    pub fn resize_to_file(&self) -> Answer<()> {
        self.served.resize(None, |_, _| Ok(())).map(drop).map_err(|error| errno(&error))
    }

    /// Opens its node.
    pub fn open(&self, writable: bool) -> Answer<OwnedFd> {
        let file = File::options().read(true).write(writable).open(self.served.device().node());
        file.map(OwnedFd::from).map_err(|error| errno_of(&error))
    }

    /// Writes back and drops its page cache.
    pub fn flush(&self) -> Answer<()> {
        block::flush(self.open(false)?.as_fd())
    }

    /// A detached mount of its node, for other mount namespaces.
    pub fn node(&self) -> Answer<OwnedFd> {
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        open_tree(CWD, self.served.device().node(), flags)
    }

    /// Sets or clears read-only.
    pub fn set_read_only(&self, read_only: bool) -> Answer<()> {
        block::set_read_only(self.open(false)?.as_fd(), read_only)
    }

    /// Whether disks of device mapper or md are stacked on it.
    pub fn has_holders(&self) -> bool {
        usage::has_holders(self.rdev)
    }

    /// Whether it is mounted, or open with O_EXCL.
    pub fn is_claimed(&self) -> bool {
        use std::os::unix::fs::OpenOptionsExt;
        let opened = File::options().read(true).custom_flags(libc::O_EXCL).open(self.served.device().node());
        opened.is_err_and(|error| error.raw_os_error() == Some(libc::EBUSY))
    }
}
