// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `loopengine mount`: mounts the file system in an image in one step.
//!
//! The image gets a pool of one device, whose directory is mounted nowhere. The FUSE driver
//! inherits the descriptor of this directory, or the kernel holds the device open. So the pool ends
//! with the mount, and a failure leaves nothing behind. The name of the pool is derived from the
//! mount point ([`mounted::pool_name`]), so `umount` finds it without a state file.
//!
//! Without private devices, the FUSE driver gets the image itself. In both cases the driver
//! inherits the image with a lock on the used range, which a second mount and `umount` check.
//!
//! This file selects the driver. [`image`] inspects images, [`mounted`] finds existing mounts.

mod all;
mod fuse;
mod image;
mod kernel;
mod mounted;
mod open;
mod umount;

use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::fuse_drivers;
use super::losetup::remote::Remote;
use super::number;
use super::out;
use super::pool_options::{PoolOptions, open_pool};
use super::run::mounter::FuseRule;
use super::run::parse_fuse;
use super::size;
use crate::error::{Error, Kind, Result};
use crate::loops::{Errno, LoopConfig, LoopInfo, LoopOp, NAME_BYTES, flag};

pub(super) use fuse::check_fuse;
pub(super) use mounted::{FuseMount, MountPool};
pub(super) use umount::UmountArgs as Umount;

/// Mount the file system in an image.
///
/// Detects the file system and mounts it: as you, with a FUSE driver; as root, with the kernel's
/// driver unless '--fuse' is given. The image becomes a private device. Mounts are always nosuid
/// and nodev. A FUSE mount is visible only to you.
///
/// If there are no private devices (no daemon, an older kernel, or a limit), the FUSE driver opens
/// the image itself.
///
/// 'loopengine umount' ends the mount. 'umount' and 'fusermount3 -u' work too; the device then ends
/// a moment later.
#[derive(Debug, clap::Args)]
pub(super) struct MountArgs {
    /// Image file or block device.
    image: PathBuf,

    /// Mount point.
    #[arg(required_unless_present = "open")]
    dir: Option<PathBuf>,

    /// Mount all partitions below the user's session directory (XDG_RUNTIME_DIR), in a directory
    /// named like the image, and open it with xdg-open, as a desktop does.
    #[arg(long, conflicts_with_all = ["dir", "all", "partition", "offset", "size_limit"])]
    open: bool,

    /// Mount read-only. Images that are not writable are always mounted read-only.
    #[arg(short, long)]
    read_only: bool,

    /// Mount partition N.
    #[arg(short, long, value_name = "N", value_parser = number::within(1..=255_u32))]
    partition: Option<u32>,

    /// Mount every partition with a file system: partition N on DIR/N, which is created.
    #[arg(short, long, conflicts_with_all = ["partition", "offset", "size_limit"])]
    all: bool,

    /// Start at this byte of the image, for example 1M or 1MiB.
    #[arg(long, value_name = "SIZE", default_value = "0", value_parser = size::parse)]
    offset: u64,

    /// Use at most this many bytes; 0: up to the end of the image.
    #[arg(long, alias = "sizelimit", value_name = "SIZE", default_value = "0", value_parser = size::parse)]
    size_limit: u64,

    /// Replay the journal of an ext3 or ext4 file system with e2fsck, if it was not cleanly
    /// unmounted. As root, the kernel always does this.
    #[arg(long)]
    replay_journal: bool,

    /// FUSE driver of a file system [default, except for root: ext2, ext3 and ext4: fuse2fs;
    /// squashfs: squashfuse; erofs: erofsfuse; iso9660: fuseiso; vfat: fusefatfs or fusefat; ntfs:
    /// ntfs-3g; exfat: mount.exfat-fuse or fusefatfs; xfs: xfs-fuse or xfuse].
    #[arg(long, value_name = "FS=PROGRAM,…", value_delimiter = ',', value_parser = parse_fuse)]
    fuse: Vec<FuseRule>,
}

/// Time for the daemon to end a pool after a failed mount.
const END_MAX: Duration = Duration::from_secs(5);

/// What mounts the image.
#[derive(Debug)]
enum Driver {
    Kernel,
    Fuse(String),
}

impl MountArgs {
    pub(super) fn run(self, run_dir: &Path) -> Result<()> {
        if self.open {
            return open::mount(self, run_dir);
        }
        let dir = self.dir.as_deref().unwrap_or(Path::new("."));
        if self.all {
            return all::mount(&self, dir, run_dir);
        }
        let part =
            image::PartitionSpec { number: self.partition, offset: self.offset, size_limit: self.size_limit };
        self.mount(run_dir, image::inspect(&self.image, &part, self.read_only)?, dir)
    }

    fn mount(&self, run_dir: &Path, mut image: image::MountImage, dir: &Path) -> Result<()> {
        let driver = self.driver(image.kind)?;
        let dir = directory(dir)?;
        let mut why_read_only = format!("{} cannot be written", image.shown.display());
        if let Driver::Fuse(program) = &driver {
            fuse::check_journal(program, &image, self.replay_journal)?;
            if !image.read_only && !fuse_drivers::driver(program).writes {
                image.read_only = true;
                why_read_only = format!("{program} does not write {} reliably", image.kind);
            }
        }
        mounted::check_not_mounted(run_dir, &image)?;
        mounted::check_not_in_use(run_dir, &image)?;
        mounted::check_dir_free(&dir)?;
        image.lock()?;
        match &driver {
            Driver::Kernel => {
                let device = PrivateDevice::serve(run_dir, &image, &dir)?;
                let mounted = kernel::mount(&device, &image, &dir);
                mounted.inspect_err(|_| device.end(run_dir))?;
            }
            Driver::Fuse(program) => {
                let device =
                    fuse::device_for(program, &image, || PrivateDevice::serve(run_dir, &image, &dir))?;
                let mounted = fuse::mount(program, device.as_ref(), &image, &dir);
                mounted.inspect_err(|_| device.into_iter().for_each(|device| device.end(run_dir)))?;
            }
        }
        if image.read_only && !self.read_only && !image::never_written(image.kind) {
            out::message(format_args!("{why_read_only}: mounted read-only"));
        }
        Ok(())
    }

    fn driver(&self, kind: &str) -> Result<Driver> {
        if let Some((_, program)) = self.fuse.iter().find(|(fits, _)| fits == kind) {
            return fuse::check_fuse().map(|()| Driver::Fuse(program.clone()));
        }
        if kernel::mounts_for_us() {
            return Ok(Driver::Kernel);
        }
        fuse::default_driver(kind).map(Driver::Fuse)
    }
}

/// The full path of the mount point.
fn directory(dir: &Path) -> Result<PathBuf> {
    let shown = dir.display();
    let cannot = |error: std::io::Error| {
        let (missing, number) = (error.kind() == std::io::ErrorKind::NotFound, error.raw_os_error());
        let error = Error::os(error, format!("cannot mount on {shown}"));
        match number {
            _ if missing => error.hint(format!("create it with 'mkdir {shown}'")),
            Some(libc::ENOTCONN | libc::ECONNABORTED) => error.hint(format!(
                "the FUSE driver of this mount has died; unmount it with 'loopengine umount {shown}'"
            )),
            _ => error,
        }
    };
    let full = dir.canonicalize().map_err(cannot)?;
    match full.metadata().map_err(cannot)?.is_dir() {
        true => Ok(full),
        false => Err(Error::new(Kind::Invalid, format!("{shown} is not a directory"))
            .hint("give the image, then a directory")),
    }
}

/// A device of the image. It lives as long as this descriptor or a copy, or the device, is open.
struct PrivateDevice {
    /// The pool's directory, mounted nowhere.
    pool: OwnedFd,
    /// Full name of the pool.
    name: String,
    /// Name of the node in the directory.
    node: String,
}

impl PrivateDevice {
    /// A path that is valid only in this process.
    fn path(&self) -> PathBuf {
        format!("/proc/self/fd/{}/{}", self.pool.as_raw_fd(), self.node).into()
    }

    fn serve(run_dir: &Path, image: &image::MountImage, dir: &Path) -> Result<PrivateDevice> {
        let options =
            PoolOptions { name: Some(mounted::pool_name(dir)?), max: Some(1), ..PoolOptions::default() };
        let (name, pool) = open_pool(run_dir, &options).map_err(|error| match error.kind() {
            Kind::Exists => mounted::already_mounted(dir),
            _ => error,
        })?;
        let mut device = PrivateDevice { pool, name, node: String::new() };
        let bound = Remote::open(Some(&device.name), run_dir).and_then(|mut remote| {
            remote.bind(image).map_err(|error| {
                let cannot = || Error::os(error, format!("cannot serve {}", image.shown.display()));
                remote.failure().unwrap_or_else(cannot)
            })
        });
        match bound {
            Ok(number) => {
                device.node = format!("loop{number}");
                Ok(device)
            }
            Err(error) => {
                device.end(run_dir);
                Err(error)
            }
        }
    }

    /// Ends the device after a failed mount. Waits until the pool is gone, so that a retry finds
    /// the directory, the image and the user's limit free.
    fn end(self, run_dir: &Path) {
        drop(self.pool);
        // Ignore a failure: the user gets the error of the mount.
        let _ = mounted::wait_gone(run_dir, &[mounted::MountPool { pool: self.name }], END_MAX);
    }
}

impl Remote {
    fn bind(&mut self, image: &image::MountImage) -> std::result::Result<u32, Errno> {
        use super::losetup::LoopDevices;
        use std::os::unix::ffi::OsStrExt;
        let mut file_name = [0; NAME_BYTES];
        let name = image.path.as_os_str().as_bytes();
        for (to, from) in file_name.iter_mut().take(NAME_BYTES - 1).zip(name) {
            *to = *from;
        }
        let flags = if image.read_only { flag::READ_ONLY } else { 0 };
        let info = LoopInfo {
            offset: image.offset,
            size_limit: image.size_limit,
            flags,
            file_name,
            ..LoopInfo::default()
        };
        let file = rustix::io::fcntl_dupfd_cloexec(&image.file, 0)?;
        let number = self.execute(LoopOp::GetFree)?.number()?;
        self.execute(LoopOp::Configure(number, LoopConfig { file, block_size: 0, info }))?;
        Ok(number)
    }
}
