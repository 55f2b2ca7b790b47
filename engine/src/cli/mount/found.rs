//! What `loopengine mount` has mounted, found again: by the directory, or by the image.
//!
//! A pool's name tells the directory: the two belong together from before the mount until after it, and
//! nothing has to be kept in a file. Knows no more of a pool than its devices and their images. Where there
//! is no pool, the table of mounts has the image's name, and a lock on the image tells whether its program
//! has ended.

use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::image::Image;
use super::program::is_without_devices;
use crate::cli::daemon;
use crate::cli::losetup::Devices;
use crate::cli::remote::Remote;
use crate::control::PrivateClient;
use crate::error::{Error, Kind, Result};
use crate::loops::{Info, LoopOp, LoopReply, flag};
use crate::sys::{mntns, range_lock};

/// How names of pools that are mounts begin.
const PREFIX: &str = "mount-";
/// Between two looks at what is left.
const PAUSE: Duration = Duration::from_millis(50);

/// The pool of what is mounted on a directory, as its opener calls it. Mount namespaces count: elsewhere
/// the same name is another directory.
pub(super) fn pool_name(dir: &Path) -> Result<String> {
    let namespace = std::fs::metadata("/proc/self/ns/mnt");
    let namespace = namespace
        .map_err(|error| Error::os(error, "cannot find our mount namespace").hint("mount proc on /proc"))?;
    Ok(name_in(namespace.ino(), dir))
}

fn name_in(namespace: u64, dir: &Path) -> String {
    let mut bytes = namespace.to_le_bytes().to_vec();
    bytes.extend(dir.as_os_str().as_bytes());
    format!("{PREFIX}{:016x}", fnv(&bytes))
}

/// FNV-1a: the same in every version. Names need not be secret, and a plain user's are its own.
fn fnv(bytes: &[u8]) -> u64 {
    let step = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, step)
}

/// What `opener` calls a pool that lists call `full`: those of plain users begin with their number.
fn own_name(full: &str) -> &str {
    match full.split_once('.') {
        Some((uid, own)) if uid.bytes().all(|byte| byte.is_ascii_digit()) => own,
        _ => full,
    }
}

/// A pool; as a rule, one that is a mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::cli) struct Mounted {
    /// As lists call it.
    pub(super) pool: String,
}

impl Mounted {
    /// All that the caller sees.
    pub(super) fn all(run_dir: &Path) -> Result<Vec<Mounted>> {
        let mut pools = Mounted::pools(run_dir)?;
        pools.retain(Mounted::is_mount);
        Ok(pools)
    }

    /// All pools, also those that are no mounts.
    fn pools(run_dir: &Path) -> Result<Vec<Mounted>> {
        let pools =
            daemon::runtime()?.block_on(async { PrivateClient::connect(run_dir).await?.list().await })?;
        Ok(pools.into_iter().map(|pool| Mounted { pool: pool.name }).collect())
    }

    fn is_mount(&self) -> bool {
        own_name(&self.pool).starts_with(PREFIX)
    }

    /// Whether it is the mount on `dir`, or was until just now.
    pub(super) fn is_on(&self, dir: &Path) -> Result<bool> {
        Ok(own_name(&self.pool) == pool_name(dir)?)
    }

    /// The pool that lists call `name`.
    pub(in crate::cli) fn named(name: &str) -> Mounted {
        Mounted { pool: name.to_owned() }
    }

    /// Where it is mounted, youngest first.
    pub(in crate::cli) fn dirs(&self) -> Result<Vec<PathBuf>> {
        let mut dirs = Vec::new();
        for dir in mntns::targets() {
            if self.is_on(&dir)? {
                dirs.push(dir);
            }
        }
        Ok(dirs)
    }

    /// The parts of a file that it shows; none, if it is of another file or has ended.
    pub(super) fn shows(&self, file: &std::fs::Metadata, run_dir: &Path) -> Result<Vec<Info>> {
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

/// An image, or a part of one, that a program of FUSE has mounted, whether by a device or not.
#[derive(Debug)]
pub(super) struct ByProgram {
    pub(super) dir: PathBuf,
    image: PathBuf,
    offset: u64,
}

impl ByProgram {
    /// All of the caller's.
    pub(super) fn all() -> Vec<ByProgram> {
        let mounts = mntns::fuse_mounts(rustix::process::geteuid().as_raw());
        mounts.into_iter().filter_map(|(dir, source)| ByProgram::of(dir, source)).collect()
    }

    /// Sources are called as `program` calls them.
    fn of(dir: PathBuf, source: PathBuf) -> Option<ByProgram> {
        // A name may have such an end itself.
        let (image, offset) = match source.to_str().and_then(|source| source.rsplit_once("?offset=")) {
            Some((image, offset)) if !source.exists() => (image.into(), offset.parse().ok()?),
            _ => (source, 0),
        };
        // Others have sources that are no images.
        let fits = image.is_absolute() && image.metadata().is_ok_and(|meta| is_image(&meta));
        fits.then_some(ByProgram { dir, image, offset })
    }

    /// Whether this is the directory or the image; names are full.
    pub(super) fn is(&self, named: &Path) -> bool {
        self.dir == named || self.image == named
    }

    /// Waits until its program has ended, which has the image locked. False: that takes longer.
    pub(super) fn wait_gone(&self, until: Instant) -> bool {
        // What nobody can open any more is nobody's.
        let Ok(image) = std::fs::File::open(&self.image) else { return true };
        loop {
            // Of a file system without locks nobody can tell.
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

/// Whether it can be an image.
pub(super) fn is_image(meta: &std::fs::Metadata) -> bool {
    use std::os::unix::fs::FileTypeExt;
    meta.is_file() || meta.file_type().is_block_device()
}

/// Waits for the end of these, at most so long; answers whether it has come.
pub(super) fn wait_gone(run_dir: &Path, these: &[Mounted], at_most: Duration) -> Result<bool> {
    let until = Instant::now() + at_most;
    while Mounted::pools(run_dir)?.iter().any(|left| these.contains(left)) {
        if Instant::now() >= until {
            return Ok(false);
        }
        std::thread::sleep(PAUSE);
    }
    Ok(true)
}

/// A second image on a directory would hide the first.
pub(super) fn is_free(dir: &Path) -> Result<()> {
    match ByProgram::all().iter().any(|one| one.dir == dir) {
        true => Err(taken(dir)),
        false => Ok(()),
    }
}

/// An image is there.
pub(super) fn taken(dir: &Path) -> Error {
    let shown = dir.display();
    Error::new(Kind::Busy, format!("an image is mounted on {shown} already"))
        .hint(format!("unmount it with 'loopengine umount {shown}'"))
}

/// Two file systems that write to the same bytes would destroy them.
pub(super) fn not_mounted(run_dir: &Path, image: &Image) -> Result<()> {
    let shown = image.shown.display();
    let meta = image.file.metadata().map_err(|error| Error::os(error, format!("cannot use {shown}")))?;
    let pools = match Mounted::pools(run_dir) {
        Err(error) if is_without_devices(error.kind()) => return Ok(()),
        pools => pools?,
    };
    for user in pools {
        for other in user.shows(&meta, run_dir)? {
            let writes = !image.read_only || other.flags & flag::READ_ONLY == 0;
            if writes && overlap((image.offset, image.size_limit), (other.offset, other.size_limit)) {
                if !user.is_mount() {
                    let message = format!("{shown} is in use by private pool {}", user.pool);
                    return Err(Error::new(Kind::Busy, message)
                        .hint("end that ('losetup -d' in there), or use it read-only in both places"));
                }
                return Err(Error::new(Kind::Busy, format!("{shown} is mounted already")).hint(format!(
                    "unmount it with 'loopengine umount {shown}', or mount it read-only twice"
                )));
            }
        }
    }
    Ok(())
}

/// Whether two parts, each by its first byte and its length (0: to the end), have a byte in common.
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
    fn names_are_the_same_in_every_version() {
        assert_eq!(fnv(b""), 0xcbf2_9ce4_8422_2325);
        assert_eq!(fnv(b"foobar"), 0x8594_4171_f739_67e8);
        let name = name_in(4026531840, Path::new("/mnt"));
        assert_eq!(name.len(), PREFIX.len() + 16);
        assert_ne!(name, name_in(4026531840, Path::new("/mnt2")));
        assert_ne!(name, name_in(4026531841, Path::new("/mnt")));
    }

    #[test]
    fn whose_names() {
        assert_eq!(own_name("1000.mount-1"), "mount-1");
        assert_eq!(own_name("mount-1"), "mount-1");
        assert_eq!(own_name("ci.mount-1"), "ci.mount-1");
    }

    #[test]
    fn parts_that_overlap() {
        assert!(overlap((0, 0), (1 << 30, 0)));
        assert!(overlap((0, 513), (512, 512)));
        assert!(!overlap((0, 512), (512, 512)));
        assert!(!overlap((512, 0), (0, 512)));
        assert!(overlap((u64::MAX - 1, 0), (0, 0)));
    }
}
