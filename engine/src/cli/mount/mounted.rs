// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Finds mounts of `loopengine mount`, by directory or image.
//!
//! The name of a pool is derived from its directory, from before the mount until after it, so no
//! state file is needed. Of a pool, only devices and images are known. Without a pool, the mount
//! table has the image path, and a lock on the image shows whether its driver still runs.

use std::collections::HashSet;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::fuse::is_without_devices;
use super::image::MountImage;
use crate::cli::daemon;
use crate::cli::losetup::LoopDevices;
use crate::cli::losetup::remote::Remote;
use crate::cli::pool_use::PoolUse;
use crate::control::PrivateClient;
use crate::error::{Error, Kind, Result};
use crate::frontend::kernel_loop;
use crate::hash::fnv1a;
use crate::image::Identity;
use crate::instance::Selector;
use crate::instance::claims::holders::{self, ExternalUse};
use crate::instance::spec::DeviceInfo;
use crate::loops::{LoopInfo, LoopOp, LoopReply, flag};
use crate::sys::{mntns, range_lock};

/// Prefix of the names of pools made by `loopengine mount`.
const PREFIX: &str = "mount-";
/// Interval between two checks.
const PAUSE: Duration = Duration::from_millis(50);

/// The name of the pool for a mount point. It depends on the mount namespace: elsewhere the same
/// path is another directory.
pub(super) fn pool_name(dir: &Path) -> Result<String> {
    let namespace = std::fs::metadata("/proc/self/ns/mnt");
    let namespace = namespace.map_err(|error| {
        Error::os(error, "cannot identify this mount namespace").hint("mount proc on /proc")
    })?;
    Ok(name_in(namespace.ino(), dir))
}

fn name_in(namespace: u64, dir: &Path) -> String {
    let mut bytes = namespace.to_le_bytes().to_vec();
    bytes.extend(dir.as_os_str().as_bytes());
    format!("{PREFIX}{:016x}", fnv1a(&bytes))
}

/// The name without the user id that lists put in front of the pools of plain users.
fn own_name(full: &str) -> &str {
    match full.split_once('.') {
        Some((uid, own)) if uid.bytes().all(|byte| byte.is_ascii_digit()) => own,
        _ => full,
    }
}

/// A pool, usually one made by `loopengine mount`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::cli) struct MountPool {
    /// Full name.
    pub(super) pool: String,
}

impl MountPool {
    /// All mount pools that the caller can see.
    pub(super) fn all(run_dir: &Path) -> Result<Vec<MountPool>> {
        let mut pools = MountPool::pools(run_dir)?;
        pools.retain(MountPool::is_mount);
        Ok(pools)
    }

    /// All pools that the caller can see.
    fn pools(run_dir: &Path) -> Result<Vec<MountPool>> {
        let pools =
            daemon::runtime()?.block_on(async { PrivateClient::connect(run_dir).await?.list().await })?;
        Ok(pools.into_iter().map(|pool| MountPool { pool: pool.name }).collect())
    }

    /// True if 'loopengine mount' made it.
    pub(in crate::cli) fn is_mount(&self) -> bool {
        own_name(&self.pool).starts_with(PREFIX)
    }

    /// True if this is the pool of the mount on `dir`.
    pub(super) fn is_on(&self, dir: &Path) -> Result<bool> {
        Ok(own_name(&self.pool) == pool_name(dir)?)
    }

    /// The pool with the full name `name`.
    pub(in crate::cli) fn named(name: &str) -> MountPool {
        MountPool { pool: name.to_owned() }
    }

    /// Its mount points, newest first.
    pub(in crate::cli) fn dirs(&self) -> Result<Vec<PathBuf>> {
        let mut dirs = Vec::new();
        for dir in mntns::targets() {
            if self.is_on(&dir)? {
                dirs.push(dir);
            }
        }
        Ok(dirs)
    }

    /// The ranges of a file to which its devices are bound; none if it has another file, or has
    /// ended.
    pub(super) fn bound_ranges(&self, file: &std::fs::Metadata, run_dir: &Path) -> Result<Vec<LoopInfo>> {
        let mut remote = match Remote::open(Some(&self.pool), run_dir) {
            Err(error) if error.kind() == Kind::NotFound => return Ok(Vec::new()),
            remote => remote?,
        };
        let mut parts = Vec::new();
        for entry in remote.entries().unwrap_or_default() {
            let status = remote.execute(LoopOp::Status(entry.number)).and_then(LoopReply::status);
            let Ok(status) = status else { continue };
            let same = match file.rdev() {
                0 => (status.device, status.inode) == (file.dev(), file.ino()),
                device => status.rdevice == device,
            };
            if same {
                parts.push(status.info);
            }
        }
        Ok(parts)
    }
}

/// A mount of an image or a part of it by a FUSE driver, with or without a device.
#[derive(Debug)]
pub(in crate::cli) struct FuseMount {
    pub(in crate::cli) dir: PathBuf,
    image: PathBuf,
    offset: u64,
}

impl FuseMount {
    /// All FUSE mounts of the caller.
    pub(super) fn all() -> Vec<FuseMount> {
        let mounts = mntns::fuse_mounts(rustix::process::geteuid().as_raw());
        mounts.into_iter().filter_map(|(dir, source)| FuseMount::of(dir, source)).collect()
    }

    /// The caller's mount of `image`.
    pub(in crate::cli) fn of_image(image: &Path) -> Option<FuseMount> {
        let image = image.canonicalize().ok()?;
        FuseMount::all().into_iter().find(|mount| mount.image == image)
    }

    /// Parses a source that `fuse::options` made.
    fn of(dir: PathBuf, source: PathBuf) -> Option<FuseMount> {
        // A path may itself end like this.
        let (image, offset) = match source.to_str().and_then(|source| source.rsplit_once("?offset=")) {
            Some((image, offset)) if !source.exists() => (image.into(), offset.parse().ok()?),
            _ => (source, 0),
        };
        // Other FUSE mounts have sources that are not images.
        let fits = image.is_absolute() && image.metadata().is_ok_and(|meta| is_image(&meta));
        fits.then_some(FuseMount { dir, image, offset })
    }

    /// True if `named` is the directory or the image, as a full path.
    pub(super) fn is(&self, named: &Path) -> bool {
        self.dir == named || self.image == named
    }

    /// Waits until its driver has ended, which holds a lock on the image. False on timeout.
    pub(super) fn wait_gone(&self, until: Instant) -> bool {
        // An image that cannot be opened has no users.
        let Ok(image) = std::fs::File::open(&self.image) else { return true };
        loop {
            // Without lock support, assume that it has ended.
            if range_lock::try_lock(image.as_fd(), self.offset, 1, false).unwrap_or(true) {
                return true;
            }
            if Instant::now() >= until {
                return false;
            }
            std::thread::sleep(PAUSE);
        }
    }
}

/// True if the file can be an image.
pub(super) fn is_image(meta: &std::fs::Metadata) -> bool {
    use std::os::unix::fs::FileTypeExt;
    meta.is_file() || meta.file_type().is_block_device()
}

/// Waits until these pools have ended. False on timeout.
pub(super) fn wait_gone(run_dir: &Path, these: &[MountPool], at_most: Duration) -> Result<bool> {
    let until = Instant::now() + at_most;
    while MountPool::pools(run_dir)?.iter().any(|left| these.contains(left)) {
        if Instant::now() >= until {
            return Ok(false);
        }
        std::thread::sleep(PAUSE);
    }
    Ok(true)
}

/// Refuses a mount point with an image: a second mount would hide the first.
pub(super) fn check_dir_free(dir: &Path) -> Result<()> {
    match FuseMount::all().iter().any(|one| one.dir == dir) {
        true => Err(already_mounted(dir)),
        false => Ok(()),
    }
}

/// The error for a mount point that has an image.
pub(super) fn already_mounted(dir: &Path) -> Error {
    let shown = dir.display();
    Error::new(Kind::Busy, format!("an image is mounted on {shown} already"))
        .hint(format!("unmount it with 'loopengine umount {shown}'"))
}

/// Refuses an image that a pool uses: two file systems that write the same bytes destroy them.
pub(super) fn check_not_mounted(run_dir: &Path, image: &MountImage) -> Result<()> {
    let shown = image.shown.display();
    let meta = image.file.metadata().map_err(|error| Error::os(error, format!("cannot use {shown}")))?;
    let pools = match MountPool::pools(run_dir) {
        Err(error) if is_without_devices(error.kind()) => return Ok(()),
        pools => pools?,
    };
    for user in pools {
        for other in user.bound_ranges(&meta, run_dir)? {
            let writes = !image.read_only || other.flags & flag::READ_ONLY == 0;
            if writes && overlap((image.offset, image.size_limit), (other.offset, other.size_limit)) {
                let user = PoolUse::of_image(&image.path, run_dir)?;
                // It may have ended meanwhile.
                let Some(user) = user else { continue };
                let next_step = format!("{}, or use it read-only in both places", user.next_step);
                return Err(user.error(&image.shown).hint(next_step));
            }
        }
    }
    Ok(())
}

/// Refuses an image that a device of an instance or another program writes, or reads while this mount
/// would write. Plain users do not see devices of instances.
pub(super) fn check_not_in_use(run_dir: &Path, image: &MountImage) -> Result<()> {
    let shown = image.shown.display();
    let meta = image.file.metadata().map_err(|error| Error::os(error, format!("cannot use {shown}")))?;
    let rdev = if meta.file_type().is_block_device() { meta.rdev() } else { 0 };
    let range = (image.offset, image.size_limit);
    let devices = match daemon::ask(run_dir, async |client| client.devices(&Selector::All).await) {
        Err(error) if matches!(error.kind(), Kind::Denied | Kind::Unavailable) => Vec::new(),
        devices => devices?,
    };
    let identity = if rdev == 0 { (meta.dev(), meta.ino()) } else { (rdev, 0) };
    let conflicts = |device: &DeviceInfo| {
        identity == (device.image_device, device.image_inode)
            && !(image.read_only && device.read_only)
            && overlap(range, (device.offset, device.size))
    };
    if let Some(device) = devices.into_iter().find(conflicts) {
        let name = format!("{}/loop{}", device.instance, device.number);
        return Err(Error::new(Kind::Busy, format!("{shown} is attached as {name}"))
            .hint(format!("mount {}, or detach it with 'loopengine detach {name}'", device.path)));
    }
    // Devices of this daemon have passed; the kernel's loop driver shows them again.
    let identity = Identity { dev: meta.dev(), ino: meta.ino(), rdev, btime_ns: 0 };
    let conflicts = |user: &ExternalUse| (user.writes || !image.read_only) && overlap(range, user.range);
    // A device of this daemon that is open for a moment counts as in use there.
    let may_open = |number| !kernel_loop::numbered_as_ours()(number);
    match holders::find(&identity, &HashSet::new(), may_open).into_iter().find(conflicts) {
        None => Ok(()),
        Some(user) => Err(Error::new(Kind::Busy, format!("{shown} is in use by {}", user.who))
            .hint("end that use, or use it read-only in both places")),
    }
}

/// True if two ranges, each start and length (0: to the end), overlap.
fn overlap(one: (u64, u64), other: (u64, u64)) -> bool {
    let end = |(start, length): (u64, u64)| match length {
        0 => u64::MAX,
        length => start.saturating_add(length),
    };
    one.0 < end(other) && other.0 < end(one)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pool_names_are_stable() {
        let name = name_in(4026531840, Path::new("/mnt"));
        assert_eq!(name.len(), PREFIX.len() + 16);
        assert_ne!(name, name_in(4026531840, Path::new("/mnt2")));
        assert_ne!(name, name_in(4026531841, Path::new("/mnt")));
    }

    #[test]
    fn strips_the_user_id() {
        assert_eq!(own_name("1000.mount-1"), "mount-1");
        assert_eq!(own_name("mount-1"), "mount-1");
        assert_eq!(own_name("ci.mount-1"), "ci.mount-1");
    }

    #[test]
    fn detects_overlapping_ranges() {
        assert!(overlap((0, 0), (1 << 30, 0)));
        assert!(overlap((0, 513), (512, 512)));
        assert!(!overlap((0, 512), (512, 512)));
        assert!(!overlap((512, 0), (0, 512)));
        assert!(overlap((u64::MAX - 1, 0), (0, 0)));
    }
}
