// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A FUSE file system whose files are passed through to images: the kernel moves the data, this
//! process only opens.
//!
//! The least that FUSE passthrough (Linux 6.9) costs. It has one directory with the files 0, 1 and
//! so on. Knows no devices: nothing bounds a file's size, and nothing counts its I/O.

use std::ffi::OsStr;
use std::fs::{File, Metadata};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};
use fuser::{
    BackingId, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo,
    InitFlags, KernelConfig, LockOwner, MountOption, OpenFlags, ReplyAttr, ReplyEmpty, ReplyEntry, ReplyOpen,
    Request,
};

/// The kernel may keep names and attributes for this long.
const TTL: Duration = Duration::from_secs(3600);
/// Number of the first file.
const FIRST: u64 = 2;

/// One file.
struct Image {
    file: File,
    metadata: Metadata,
    /// Kept: all openers of a file must use the same one.
    backing: Mutex<Option<BackingId>>,
}

struct Passthrough(Vec<Image>);

/// Serves the images until the file system is unmounted.
pub fn serve(directory: &Path, images: &[PathBuf]) -> Result<()> {
    let open = |path: &PathBuf| -> io::Result<Image> {
        let file = File::options().read(true).write(true).open(path)?;
        let metadata = file.metadata()?;
        Ok(Image { file, metadata, backing: Mutex::default() })
    };
    let opened =
        images.iter().map(|path| open(path).with_context(|| format!("cannot open {}", path.display())));
    let files = Passthrough(opened.collect::<Result<_>>()?);
    let mut config = Config::default();
    config.mount_options = vec![MountOption::FSName("loopbench".into())];
    fuser::mount(files, directory, &config).with_context(|| format!("cannot serve {}", directory.display()))
}

impl Passthrough {
    fn image(&self, ino: INodeNo) -> Option<&Image> {
        self.0.get(usize::try_from(ino.0.checked_sub(FIRST)?).ok()?)
    }

    fn attr(&self, ino: INodeNo) -> Option<FileAttr> {
        let (kind, size) = match self.image(ino) {
            Some(image) => (FileType::RegularFile, image.metadata.len()),
            None if ino == INodeNo::ROOT => (FileType::Directory, 0),
            None => return None,
        };
        let time = SystemTime::UNIX_EPOCH;
        Some(FileAttr {
            ino,
            size,
            blocks: size / 512,
            atime: time,
            mtime: time,
            ctime: time,
            crtime: time,
            kind,
            perm: 0o700,
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        })
    }
}

impl Filesystem for Passthrough {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        let stacked = config.set_max_stack_depth(1).is_ok();
        match config.add_capabilities(InitFlags::FUSE_PASSTHROUGH) {
            Ok(()) if stacked => Ok(()),
            _ => Err(io::Error::new(io::ErrorKind::Unsupported, "this kernel has no FUSE passthrough")),
        }
    }

    fn lookup(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let number = name.to_str().and_then(|name| name.parse::<u64>().ok());
        match number.and_then(|number| self.attr(INodeNo(FIRST + number))) {
            Some(attr) => reply.entry(&TTL, &attr, Generation(0)),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match self.attr(ino) {
            Some(attr) => reply.attr(&TTL, &attr),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn open(&self, _: &Request, ino: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        let Some(image) = self.image(ino) else { return reply.error(Errno::ENOENT) };
        let mut backing = image.backing.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if backing.is_none() {
            match reply.open_backing(&image.file) {
                Ok(opened) => *backing = Some(opened),
                Err(error) => {
                    eprintln!("cannot pass a file through: {error}");
                    return reply.error(error.into());
                }
            }
        }
        if let Some(backing) = &*backing {
            reply.opened_passthrough(FileHandle(0), FopenFlags::empty(), backing);
        }
    }

    /// The kernel does not pass it through.
    fn fsync(&self, _: &Request, ino: INodeNo, _: FileHandle, data_only: bool, reply: ReplyEmpty) {
        let Some(image) = self.image(ino) else { return reply.error(Errno::ENOENT) };
        match if data_only { image.file.sync_data() } else { image.file.sync_all() } {
            Ok(()) => reply.ok(),
            Err(error) => reply.error(error.into()),
        }
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }
}
