//! `loopengine mount`: the file system in an image, mounted in one step.
//!
//! The image gets a pool of one device, which is shown nowhere: the program that mounts it inherits the
//! descriptor of the pool's directory, or the kernel has the device open. So the pool ends with the
//! mount, and whatever fails on the way leaves nothing behind. Its name is made of the directory
//! ([`found::pool_name`]), so that `umount` finds it again without a file that says so.
//!
//! Where no private device can be had, a program of FUSE gets the image itself. In both cases it inherits
//! the image with a lock on the part that it uses, by which a second mount and `umount` know of it.
//!
//! Knows who mounts what. What is in an image is [`image`]'s, what is mounted already [`found`]'s.

mod all;
mod found;
mod image;
mod kernel;
mod open;
mod program;
mod umount;

use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::fuse;
use super::number;
use super::private::mounter::Way;
use super::private::parse_fuse;
use super::remote::Remote;
use super::size;
use super::wanted::{Wanted, open_pool};
use crate::error::{Error, Kind, Result};
use crate::loops::{Configure, Errno, Info, LoopOp, NAME_BYTES, flag};

pub(super) use found::Mounted;
pub(super) use program::check as check_fuse;
pub(super) use umount::Args as Umount;

/// Mount the file system in an image.
///
/// Finds out which file system it is, serves the image as a device that nobody else sees, and mounts it,
/// always without set-user-ID programs and device nodes. For a plain user a program of FUSE does so with
/// that user's rights, and only that user sees the files; for root the kernel does, unless '--fuse' names a program.
///
/// Where no private device can be had (no daemon, an older kernel, a limit) the program gets the image itself.
///
/// 'loopengine umount' ends it; after 'umount' or 'fusermount3 -u' nothing is left either, a moment later.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Image file or block device.
    image: PathBuf,

    /// Directory to mount it on.
    #[arg(required_unless_present = "open")]
    dir: Option<PathBuf>,

    /// As a desktop opens an image: mount all that is in it below the directory of the user's session
    /// (XDG_RUNTIME_DIR), on a directory that is called like the image, and show that with xdg-open.
    #[arg(long, conflicts_with_all = ["dir", "all", "partition", "offset", "size_limit"])]
    open: bool,

    /// Refuse writes. An image that cannot be written is mounted so in any case.
    #[arg(short, long)]
    read_only: bool,

    /// Mount partition N of the image.
    #[arg(short, long, value_name = "N", value_parser = number::within(1..=255_u32))]
    partition: Option<u32>,

    /// Mount every partition that has a file system, partition N on DIR/N, which is made.
    #[arg(short, long, conflicts_with_all = ["partition", "offset", "size_limit"])]
    all: bool,

    /// First byte of the image that counts, with a unit as in 1M or 1MiB.
    #[arg(long, value_name = "SIZE", default_value = "0", value_parser = size::parse)]
    offset: u64,

    /// Bytes that count at the most; 0: up to the end of the image.
    #[arg(long, alias = "sizelimit", value_name = "SIZE", default_value = "0", value_parser = size::parse)]
    size_limit: u64,

    /// Replay the journal of an ext3 or ext4 that was not unmounted, with e2fsck. For root the kernel does so
    /// in any case.
    #[arg(long)]
    replay_journal: bool,

    /// The program of FUSE for a file system [default, except for root: ext2, ext3 and ext4 by fuse2fs,
    /// squashfs by squashfuse, erofs by erofsfuse, iso9660 by fuseiso, vfat by fusefatfs or fusefat, ntfs by
    /// ntfs-3g, exfat by mount.exfat-fuse or fusefatfs, xfs by xfs-fuse or xfuse].
    #[arg(long, value_name = "FS=PROGRAM,…", value_delimiter = ',', value_parser = parse_fuse)]
    fuse: Vec<Way>,
}

/// How long the daemon may take to end a pool in which nothing was mounted.
const END_MAX: Duration = Duration::from_secs(5);

/// What mounts.
#[derive(Debug)]
enum By {
    Kernel,
    Program(String),
}

impl Args {
    pub(super) fn run(self, run_dir: &Path) -> Result<()> {
        if self.open {
            return open::mount(self, run_dir);
        }
        let dir = self.dir.as_deref().unwrap_or(Path::new("."));
        if self.all {
            return all::mount(&self, dir, run_dir);
        }
        let part = image::Part { number: self.partition, offset: self.offset, size_limit: self.size_limit };
        self.mount(run_dir, image::look(&self.image, &part, self.read_only)?, dir)
    }

    fn mount(&self, run_dir: &Path, mut image: image::Image, dir: &Path) -> Result<()> {
        let by = self.by(image.kind)?;
        let dir = directory(dir)?;
        let mut why_read_only = format!("{} cannot be written", image.shown.display());
        if let By::Program(program) = &by {
            program::check_journal(program, &image, self.replay_journal)?;
            if !image.read_only && !fuse::known(program).writes {
                image.read_only = true;
                why_read_only = format!("{program} does not write {} reliably", image.kind);
            }
        }
        found::not_mounted(run_dir, &image)?;
        found::is_free(&dir)?;
        image.lock()?;
        match &by {
            By::Kernel => {
                let device = Device::serve(run_dir, &image, &dir)?;
                let mounted = kernel::mount(&device, &image, &dir);
                mounted.inspect_err(|_| device.end(run_dir))?;
            }
            By::Program(program) => {
                let device = program::device(program, &image, || Device::serve(run_dir, &image, &dir))?;
                let mounted = program::mount(program, device.as_ref(), &image, &dir);
                mounted.inspect_err(|_| device.into_iter().for_each(|device| device.end(run_dir)))?;
            }
        }
        if image.read_only && !self.read_only && !image::never_written(image.kind) {
            eprintln!("loopengine: {why_read_only}: mounted read-only");
        }
        Ok(())
    }

    fn by(&self, kind: &str) -> Result<By> {
        if let Some((_, program)) = self.fuse.iter().find(|(fits, _)| fits == kind) {
            return program::check().map(|()| By::Program(program.clone()));
        }
        if kernel::mounts_for_us() {
            return Ok(By::Kernel);
        }
        program::usual(kind).map(By::Program)
    }
}

/// The directory, by its full name.
fn directory(dir: &Path) -> Result<PathBuf> {
    let shown = dir.display();
    let cannot = |error: std::io::Error| {
        let (missing, number) = (error.kind() == std::io::ErrorKind::NotFound, error.raw_os_error());
        let error = Error::os(error, format!("cannot mount on {shown}"));
        match number {
            _ if missing => error.hint(format!("make it with 'mkdir {shown}'")),
            Some(libc::ENOTCONN | libc::ECONNABORTED) => error.hint(format!(
                "the program that has mounted there is dead: unmount it with 'loopengine umount {shown}'"
            )),
            _ => error,
        }
    };
    let full = dir.canonicalize().map_err(cannot)?;
    match full.metadata().map_err(cannot)?.is_dir() {
        true => Ok(full),
        false => Err(Error::new(Kind::Invalid, format!("{shown} is not a directory"))),
    }
}

/// A device that shows the image, for as long as this or a copy of its descriptor is open, or the device.
struct Device {
    /// The pool's directory, mounted nowhere.
    pool: OwnedFd,
    /// The pool's name, as lists show it.
    name: String,
    /// Name of the node in there.
    node: String,
}

impl Device {
    /// For this process only.
    fn path(&self) -> PathBuf {
        format!("/proc/self/fd/{}/{}", self.pool.as_raw_fd(), self.node).into()
    }

    fn serve(run_dir: &Path, image: &image::Image, dir: &Path) -> Result<Device> {
        let wanted = Wanted { name: Some(found::pool_name(dir)?), max: Some(1), ..Wanted::default() };
        let (name, pool) = open_pool(run_dir, &wanted).map_err(|error| match error.kind() {
            Kind::Exists => found::taken(dir),
            _ => error,
        })?;
        let mut device = Device { pool, name, node: String::new() };
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

    /// Ends what came to nothing. Comes back when the pool is gone: whoever tries again at once has to
    /// find the directory, the image and the user's account free.
    fn end(self, run_dir: &Path) {
        drop(self.pool);
        // Whether or not it is: the user is told why nothing was mounted.
        let _ = found::wait_gone(run_dir, &[found::Mounted { pool: self.name }], END_MAX);
    }
}

impl Remote {
    fn bind(&mut self, image: &image::Image) -> std::result::Result<u32, Errno> {
        use super::losetup::Devices;
        use std::os::unix::ffi::OsStrExt;
        let mut file_name = [0; NAME_BYTES];
        let name = image.path.as_os_str().as_bytes();
        for (to, from) in file_name.iter_mut().take(NAME_BYTES - 1).zip(name) {
            *to = *from;
        }
        let flags = if image.read_only { flag::READ_ONLY } else { 0 };
        let info =
            Info { offset: image.offset, size_limit: image.size_limit, flags, file_name, ..Info::default() };
        let file = rustix::io::fcntl_dupfd_cloexec(&image.file, 0)?;
        let number = self.execute(LoopOp::GetFree)?.number()?;
        self.execute(LoopOp::Configure(number, Configure { file, block_size: 0, info }))?;
        Ok(number)
    }
}
