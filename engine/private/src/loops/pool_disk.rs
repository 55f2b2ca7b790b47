// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A started disk of a pool: its image, its node, its users.
//!
//! Knows one disk. `disk_allocator` creates and replaces disks.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;

use rustix::fs::CWD;
use rustix::mount::{OpenTreeFlags, open_tree};

use super::{Answer, Errno, errno, errno_of};
use crate::error::Result;
use crate::frontend::kernel_loop::PrivateLoop;
use crate::image::Image;
use crate::instance::served::{Served, Traffic};
use crate::ring::SlotId;
use crate::sys::{block, usage};

/// What serves a disk.
#[derive(Debug)]
pub enum DiskServer {
    /// This program, over ublk.
    Ublk(Box<Served>),
    /// The kernel's loop driver.
    Loop(Arc<PrivateLoop>),
}

impl DiskServer {
    /// The node that the kernel made for it.
    fn node(&self) -> PathBuf {
        match self {
            DiskServer::Ublk(served) => served.device().node(),
            DiskServer::Loop(device) => device.node(),
        }
    }

    /// Its slot on the workers, if they serve it.
    pub fn slot(&self) -> Option<SlotId> {
        match self {
            DiskServer::Ublk(served) => Some(served.slot()),
            DiskServer::Loop(_) => None,
        }
    }

    /// Deletes a stopped disk.
    pub fn delete(&self) -> Result<()> {
        match self {
            DiskServer::Ublk(served) => served.delete(),
            DiskServer::Loop(device) => device.delete(),
        }
    }
}

/// What a disk keeps for as long as it exists.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskShape {
    /// Logical block size in bytes.
    pub block_size: u32,
    /// It may serve an image on which I/O may hang: no other pool has its workers.
    pub may_hang: bool,
}

/// A started disk.
#[derive(Debug)]
pub struct PoolDisk {
    pub(super) server: DiskServer,
    /// Its device number.
    pub rdev: u64,
    /// See the type.
    pub shape: DiskShape,
}

impl PoolDisk {
    /// Logical block size in bytes.
    pub fn block_size(&self) -> u32 {
        self.shape.block_size
    }

    /// Bytes.
    pub fn size(&self) -> u64 {
        match &self.server {
            DiskServer::Ublk(served) => served.geometry().size,
            DiskServer::Loop(device) => device.size(),
        }
    }

    /// Its I/O counters. None: its workers do not answer.
    pub fn traffic(&self) -> Option<Traffic> {
        match &self.server {
            DiskServer::Ublk(served) => served.traffic().ok(),
            DiskServer::Loop(device) => {
                let stats = device.stats();
                let ended = stats.reads + stats.writes + stats.discards + stats.flushes;
                Some(Traffic { in_flight: stats.in_flight, ended })
            }
        }
    }

    /// Serves another image, or another range of the same file.
    pub fn set_image(&self, image: Image) -> Answer<()> {
        let set = match &self.server {
            DiskServer::Ublk(served) => served.replace(image),
            DiskServer::Loop(device) => device.set_image(image),
        };
        set.map_err(|error| errno(&error))
    }

    /// Whether it can be bound while it is open: a disk of ublk, to an image that takes this shape.
    pub fn can_bind(&self, shape: DiskShape) -> bool {
        self.shape == shape && matches!(self.server, DiskServer::Ublk(_))
    }

    /// Binds an unbound disk of ublk to an image. `read_only` and `closed` both refuse writes from
    /// the start; `closed` is temporary.
    pub fn bind(&self, image: Image, read_only: bool, closed: bool) -> Answer<()> {
        let DiskServer::Ublk(served) = &self.server else { return Err(Errno::OPNOTSUPP) };
        // Done while nothing can be in flight, and not before: a last close did not wait for this.
        served.device().disable_scheduler();
        if !read_only && !image.geometry().can_discard {
            // An unbound disk advertises discards. The block layer would take a refused discard for
            // success.
            set_discard_support(served, false)?;
        }
        if read_only || closed {
            self.set_read_only(true)?;
        }
        self.set_image(image)
    }

    /// Unbinds the disk after a failed `bind`, which no user has seen, or takes its file away from
    /// all who have it open.
    pub fn unbind(&self) {
        let withdrawn = match &self.server {
            DiskServer::Ublk(served) => Image::unbound(self.block_size())
                .map_err(|error| errno(&error))
                .and_then(|image| self.set_image(image))
                .and_then(|()| self.set_read_only(false))
                .and_then(|()| set_discard_support(served, true)),
            DiskServer::Loop(_) => self.withdraw_file(),
        };
        if let Err(error) = withdrawn {
            tracing::error!(%error, rdev = self.rdev, "cannot unbind a disk: it still serves its file");
        }
    }

    /// Takes the file away from all who have a disk of the kernel's loop driver open. EAGAIN:
    /// somebody keeps its pages.
    pub fn withdraw_file(&self) -> Answer<()> {
        let DiskServer::Loop(device) = &self.server else { return Err(Errno::OPNOTSUPP) };
        device.withdraw_file().map_err(|error| errno(&error))
    }

    /// Takes over the current size of its file.
    pub fn resize_to_file(&self) -> Answer<()> {
        let resized = match &self.server {
            DiskServer::Ublk(served) => served.resize(None, |_, _| Ok(())).map(drop),
            DiskServer::Loop(device) => device.set_capacity(),
        };
        resized.map_err(|error| errno(&error))
    }

    /// Switches direct I/O. ublk uses it wherever that is `possible`, whether it is asked for or
    /// not.
    pub fn set_direct_io(&self, on: bool, possible: bool) -> Answer<()> {
        match &self.server {
            DiskServer::Ublk(_) if on && !possible => Err(Errno::INVAL),
            DiskServer::Ublk(_) => Ok(()),
            DiskServer::Loop(device) => device.set_direct_io(on).map_err(|error| errno(&error)),
        }
    }

    /// Whether it still has its file: its last close may have unbound it, or a process that calls
    /// the kernel's loop driver past the interception.
    pub fn is_intact(&self) -> bool {
        match &self.server {
            DiskServer::Ublk(_) => true,
            DiskServer::Loop(device) => device.is_bound(),
        }
    }

    /// Whether only an attempt to replace it tells if it is in use.
    pub fn may_be_unused(&self) -> bool {
        matches!(self.server, DiskServer::Ublk(_)) || !self.is_intact()
    }

    /// Tells the kernel's driver whether the last close unbinds it. For a disk of ublk the close
    /// watcher does that.
    pub fn set_autoclear(&self, on: bool) {
        let DiskServer::Loop(device) = &self.server else { return };
        if let Err(error) = device.set_autoclear(on)
            && device.is_bound()
        {
            tracing::warn!(%error, rdev = self.rdev, "cannot change the autoclear of a disk");
        }
    }

    /// Opens its node.
    pub fn open(&self, writable: bool) -> Answer<OwnedFd> {
        let file = File::options().read(true).write(writable).open(self.server.node());
        file.map(OwnedFd::from).map_err(|error| errno_of(&error))
    }

    /// Writes back and drops its page cache.
    pub fn flush(&self) -> Answer<()> {
        block::flush(self.open(false)?.as_fd())
    }

    /// A detached mount of its node, for other mount namespaces.
    pub fn node(&self) -> Answer<OwnedFd> {
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        open_tree(CWD, self.server.node(), flags)
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
        let opened = File::options().read(true).custom_flags(libc::O_EXCL).open(self.server.node());
        opened.is_err_and(|error| error.raw_os_error() == Some(libc::EBUSY))
    }
}

fn set_discard_support(served: &Served, offer: bool) -> Answer<()> {
    served.device().set_discard_support(offer).map_err(|error| errno(&error))
}
