//! Places for images: temporary directories, loop devices, file systems on loop devices. All are
//! gone when their values are.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use tempfile::TempDir;

/// A test, or a part of one, that cannot run here.
pub(crate) fn skipped(why: &str) {
    println!("skipped: {why}");
}

/// A directory on the disk of this machine.
pub(crate) fn temporary() -> TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a temporary directory")
}

/// Runs a command whose words are separated by blanks; its output, or what went wrong.
pub(crate) fn run(command: &str) -> Result<String, String> {
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

/// A loop device with sectors of this size over a file, where we may have one.
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
        if let Err(why) = run(&format!("umount {}", self.0.display())) {
            eprintln!("left behind: {why}");
        }
    }
}

impl Mounted {
    /// Makes and mounts a file system with the command `mkfs`, where we may and can.
    pub(crate) fn new(mkfs: &str, sector: u32, options: &str) -> Option<Mounted> {
        let directory = temporary();
        let (file, point) = (directory.path().join("disk"), directory.path().join("mnt"));
        File::create(&file)
            .and_then(|f| f.set_len(400 << 20))
            .expect("a sparse file");
        std::fs::create_dir(&point).expect("a mount point");
        let device = loop_device(&file, sector)?;
        let options = if options.is_empty() {
            "defaults"
        } else {
            options
        };
        let node = device.path().display();
        let mounted = run(&format!("{mkfs} {node}"))
            .and_then(|_| run(&format!("mount -o {options} {node} {}", point.display())));
        match mounted {
            Ok(_) => Some(Mounted {
                mount: Mount(point),
                _device: device,
                _directory: directory,
            }),
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

/// Memory of which [`Memory::bytes`] starts at an address aligned as asked, and no better.
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
