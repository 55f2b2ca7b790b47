// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Shared helpers: locations of images (temporary directories, loop devices, file systems on loop
//! devices), which a drop removes; and checks of accepted and refused images.

use std::fs::{File, OpenOptions};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::Duration;

use loopengine_core::image::{Image, ImageSpec};
use loopengine_core::{Error, Kind, Result};
use rustix::fs::OFlags;
use tempfile::TempDir;

pub(crate) const MIB: u64 = 1 << 20;
pub(crate) const PLAIN: ImageSpec = ImageSpec {
    offset: 0,
    size_limit: 0,
    block_size: 0,
    read_only: false,
    buffered: false,
    loop_semantics: false,
    durable: false,
};
pub(crate) const READ_ONLY: ImageSpec = ImageSpec { read_only: true, ..PLAIN };
pub(crate) const BUFFERED: ImageSpec = ImageSpec { buffered: true, ..PLAIN };

pub(crate) fn image_file(path: &Path, size: u64) {
    let file = File::create(path).unwrap();
    file.set_len(size).unwrap();
}

pub(crate) fn attach(path: &Path, source: &ImageSpec) -> Result<Image> {
    let file = OpenOptions::new()
        .read(true)
        .write(!source.read_only)
        .open(path)
        .unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    Image::open(file.into(), source, &path.to_string_lossy())
}

pub(crate) fn flags(image: &Image) -> OFlags {
    rustix::fs::fcntl_getfl(image.fd()).unwrap()
}

/// Checks that an error has one line, a hint, and the expected kind.
#[track_caller]
pub(crate) fn refused<T: std::fmt::Debug>(result: Result<T>, kind: Kind, text: &str) -> Error {
    let error = result.unwrap_err();
    assert_eq!(error.kind(), kind, "{error}");
    assert!(error.to_string().contains(text), "'{error}' lacks '{text}'");
    assert!(!error.to_string().contains('\n'), "{error:?}");
    assert!(error.next_step().is_some(), "what next? {error}");
    error
}

/// A test, or a part of one, that cannot run here.
pub(crate) fn skipped(why: &str) {
    println!("skipped: {why}");
}

/// A directory on the disk of this machine.
pub(crate) fn temporary() -> TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))
        .or_else(|_| tempfile::tempdir())
        .expect("a temporary directory")
}

/// Runs a command whose words are separated by blanks; its output, or what went wrong.
pub(crate) fn run(command: &str) -> std::result::Result<String, String> {
    let mut words = command.split_whitespace();
    let output = Command::new(words.next().unwrap_or_default())
        .args(words)
        .stdin(Stdio::null())
        .output()
        .map_err(|e| format!("{command}: {e}"))?;
    if output.status.success() {
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    } else {
        let text = String::from_utf8_lossy(&output.stderr);
        Err(format!("{command}: {}", text.trim()))
    }
}

/// A loop device of the kernel.
pub(crate) struct Loop(PathBuf);

impl Loop {
    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        if let Err(why) = run(&format!("losetup --detach {}", self.0.display())) {
            eprintln!("left behind: {why}");
        }
    }
}

/// A loop device with this sector size over a file, if permitted.
pub(crate) fn loop_device(file: &Path, sector: u32) -> Option<Loop> {
    let file = file.display();
    let command = format!("losetup --find --show --direct-io=off --sector-size {sector} {file}");
    match run(&command) {
        Ok(path) => Some(Loop(path.into())),
        Err(why) => {
            skipped(&why);
            None
        }
    }
}

/// A file system of its own, mounted. Fields are dropped in this order.
pub(crate) struct Mounted {
    mount: Mount,
    _device: Loop,
    _directory: TempDir,
}

struct Mount(PathBuf);

impl Drop for Mount {
    fn drop(&mut self) {
        // Commands of other tests have all files of this process open until their exec.
        let umount = format!("umount {}", self.0.display());
        for _ in 0..100 {
            if run(&umount).is_ok() {
                return;
            }
            sleep(Duration::from_millis(20));
        }
        if let Err(why) = run(&format!("{umount} --lazy")) {
            eprintln!("left behind: {why}");
        }
    }
}

impl Mounted {
    /// Creates a file system with the command `mkfs` and mounts it, if possible.
    pub(crate) fn new(mkfs: &str, sector: u32, options: &str) -> Option<Mounted> {
        let directory = temporary();
        let (file, point) = (directory.path().join("disk"), directory.path().join("mnt"));
        File::create(&file).and_then(|f| f.set_len(400 << 20)).expect("a sparse file");
        std::fs::create_dir(&point).expect("a mount point");
        let device = loop_device(&file, sector)?;
        let options = if options.is_empty() { "defaults" } else { options };
        let node = device.path().display();
        let mounted = run(&format!("{mkfs} {node}"))
            .and_then(|_| run(&format!("mount -o {options} {node} {}", point.display())));
        match mounted {
            Ok(_) => Some(Mounted { mount: Mount(point), _device: device, _directory: directory }),
            Err(why) => {
                skipped(&why);
                None
            }
        }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.mount.0
    }
}

/// Memory in which [`Memory::bytes`] has exactly the requested alignment.
pub(crate) struct Memory {
    memory: Vec<u8>,
    start: usize,
    len: usize,
}

impl Memory {
    pub(crate) fn bytes(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..self.start + self.len]
    }
}

pub(crate) fn aligned(len: usize, align: usize) -> Memory {
    let memory = vec![0; len + 4 * align];
    let start = memory.as_ptr().align_offset(2 * align) + align;
    Memory { memory, start, len }
}
