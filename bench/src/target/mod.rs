// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Targets: what is measured. Each is one file that implements one trait.
//!
//! Each target gets its own preallocated and written images on the same store. Its block devices
//! have the scheduler `none`. A target tears down everything that it sets up.

mod ext4;
mod fuse_passthrough;
mod kernel_loop;
mod loopengine;
mod qemu_fuse;
mod qemu_nbd;
mod raw;
mod rublk;

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::kernel_module::{FUSE, LOOP, Module, NBD, NULL_BLK, UBLK, release as kernel};
use crate::{daemon, sh, store};

pub use kernel_loop::{LoopDevice, Loops};

/// The file itself, without a block device.
pub const RAW: &str = raw::FILE;

/// Starting a program is slow on an emulated CPU.
pub(crate) const LIMIT: Duration = Duration::from_secs(180);

/// Number of devices for a job that needs many.
pub const MANY: usize = 16;

/// A target.
pub trait Target {
    /// Name in tables.
    fn name(&self) -> String;

    /// Description in one line.
    fn about(&self) -> String;

    /// Version of the program or driver; fails if it is missing.
    fn version(&self) -> Result<String>;

    /// The kernel module that it needs.
    fn module(&self) -> Option<Module> {
        None
    }

    /// Sets the target up; its module is loaded. `tear_down` follows an error too.
    fn set_up(&mut self, place: &Environment) -> Result<Opened>;

    /// Tears down what `set_up` made, even if it failed halfway.
    fn tear_down(&mut self) -> Result<()>;

    /// Requests that went to a kernel worker thread since the set-up, if the target counts them.
    fn punts(&self) -> Option<u64> {
        None
    }
}

/// What the path of a target is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    File,
    Block,
    /// The directory of a mounted file system.
    Mount,
}

/// A target that is set up.
#[derive(Clone, Debug)]
pub struct Opened {
    pub kind: Kind,
    pub path: PathBuf,
    /// `MANY` smaller devices, if they are needed.
    pub many: Vec<PathBuf>,
    /// The process that serves the target.
    pub server: Option<u32>,
}

/// Where targets are set up.
#[derive(Clone, Debug)]
pub struct Environment {
    /// Directory on the store, for images.
    pub images: PathBuf,
    /// Directory for sockets, mount points and the like.
    pub scratch: PathBuf,
    /// Size of an image in MiB.
    pub image_mb: u32,
    /// Size of each of the `MANY` images in MiB; 0 if they are not needed.
    pub many_mb: u32,
    pub loops: Loops,
}

impl Environment {
    /// Makes a preallocated and written image that begins with its mark.
    pub fn image(&self, name: &str) -> Result<PathBuf> {
        self.make(name, self.image_mb)
    }

    /// Makes the `MANY` small images.
    pub fn many(&self, name: &str) -> Result<Vec<PathBuf>> {
        if self.many_mb == 0 {
            return Ok(Vec::new());
        }
        (0..MANY).map(|number| self.make(&format!("{name}-{number}"), self.many_mb)).collect()
    }

    fn make(&self, name: &str, size_mb: u32) -> Result<PathBuf> {
        let path = self.images.join(format!("{}.img", plain(name)));
        make_image(&path, size_mb)?;
        mark(&path)?;
        Ok(path)
    }

    /// Makes a directory with this name.
    pub fn directory(&self, name: &str) -> Result<PathBuf> {
        let path = self.scratch.join(plain(name));
        std::fs::create_dir_all(&path).with_context(|| format!("cannot make {}", path.display()))?;
        Ok(path)
    }
}

/// `name` as a file name.
fn plain(name: &str) -> String {
    name.replace(|c: char| !c.is_ascii_alphanumeric(), "-")
}

/// Preallocates the image and writes all of it once with direct I/O.
pub fn make_image(image: &Path, size_mb: u32) -> Result<()> {
    let bytes = format!("{size_mb}M");
    sh::capture(Command::new(sh::which("fallocate")?).args(["-l", &bytes]).arg(image), LIMIT)?;
    let mut dd = Command::new("dd");
    dd.arg("if=/dev/zero").arg(format!("of={}", image.display()));
    dd.args(["bs=1M", &format!("count={size_mb}"), "oflag=direct", "conv=notrunc,fsync", "status=none"]);
    sh::capture(&mut dd, LIMIT).map(drop)
}

/// Size of a mark.
const MARK: usize = 4096;

fn mark_of(image: &Path) -> Vec<u8> {
    let mut mark = format!("loopbench {} {}", std::process::id(), image.display()).into_bytes();
    mark.resize(MARK, b'.');
    mark
}

fn mark(image: &Path) -> Result<()> {
    use std::os::unix::fs::FileExt;
    let file = std::fs::OpenOptions::new().write(true).open(image)?;
    file.write_all_at(&mark_of(image), 0)?;
    file.sync_all()?;
    // Later measurements must not find it in the page cache.
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)?;
    Ok(())
}

/// Whether `path` begins with the mark of `image`.
pub fn leads_to(path: &Path, image: &Path) -> Result<bool> {
    use std::io::Read;
    let mut bytes = vec![0; MARK];
    let mut file = std::fs::File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    file.read_exact(&mut bytes).with_context(|| format!("cannot read {}", path.display()))?;
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)?;
    Ok(bytes == mark_of(image))
}

/// Fails unless the device at `path` is backed by `image`.
pub(crate) fn check_mark(path: &Path, image: &Path) -> Result<()> {
    if !leads_to(path, image)? {
        bail!("{} is not backed by {}", path.display(), image.display());
    }
    Ok(())
}

/// A target of block devices, with the scheduler set to `none`.
pub(crate) fn block(path: PathBuf, many: Vec<PathBuf>, server: Option<u32>) -> Result<Opened> {
    std::iter::once(&path).chain(&many).try_for_each(|node| store::set_scheduler_none(node))?;
    Ok(Opened { kind: Kind::Block, path, many, server })
}

/// The first word that begins with a digit in the output of `program`.
pub(crate) fn version_of(program: &str, words: &[&str]) -> Result<String> {
    let output = sh::output(Command::new(sh::which(program)?).args(words), LIMIT)?;
    // fuse2fs prints to standard error, the programs that it starts to standard output.
    let said = [output.stderr, output.stdout].concat();
    let said = String::from_utf8_lossy(&said);
    let number = said.split_whitespace().find(|word| word.starts_with(|c: char| c.is_ascii_digit()));
    Ok(number.unwrap_or("of an unknown version").trim_end_matches([',', ')']).to_owned())
}

/// The version of `target`, or why it is unavailable, as far as this is known without setting it
/// up.
pub(crate) fn check(target: &dyn Target) -> Result<String> {
    let version = target.version()?;
    target.module().map_or(Ok(()), Module::check)?;
    Ok(version)
}

/// A server that runs in the foreground.
pub(crate) struct Server {
    child: Child,
    name: String,
    log: PathBuf,
}

impl Server {
    pub(crate) fn start(command: &mut Command, log: PathBuf) -> Result<Server> {
        let name = sh::describe(command);
        let file = std::fs::File::create(&log).with_context(|| format!("cannot write {}", log.display()))?;
        let child = command
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            // Ctrl-C on a terminal must not reach the server.
            .process_group(0)
            .spawn()
            .with_context(|| format!("cannot run {name}"))?;
        Ok(Server { child, name, log })
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits until `ready`.
    pub(crate) fn wait(&mut self, ready: impl Fn() -> bool) -> Result<()> {
        let (child, name, log) = (&mut self.child, &self.name, &self.log);
        sh::wait_for(name, LIMIT, || {
            if let Some(status) = child.try_wait()? {
                bail!("{name}: {status}: {}", sh::last_line(log));
            }
            Ok(ready().then_some(()))
        })
    }

    /// Stops the server with SIGTERM and waits for it.
    pub(crate) fn stop(&mut self) -> Result<()> {
        if self.child.try_wait()?.is_none()
            && let Some(pid) = i32::try_from(self.child.id()).ok().and_then(rustix::process::Pid::from_raw)
        {
            rustix::process::kill_process(pid, rustix::process::Signal::TERM)?;
        }
        let ended = sh::ended(&mut self.child, &self.name, LIMIT);
        if ended.is_err() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
        ended
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = sh::uninterrupted(|| self.stop());
        }
    }
}

/// All targets in the order of a table.
pub fn all() -> Vec<Box<dyn Target>> {
    let mut targets: Vec<Box<dyn Target>> = vec![
        Box::new(raw::RawFile),
        Box::new(raw::RawDevice::default()),
        Box::new(kernel_loop::KernelLoop::direct()),
        Box::new(kernel_loop::KernelLoop::buffered()),
    ];
    // Setting up fails in an I/O mode that the kernel does not support.
    for mode in ["batch", "auto", "copy"] {
        targets.push(Box::new(loopengine::Ublk::new(mode)));
    }
    targets.push(Box::new(loopengine::Ublk::durable()));
    targets.push(Box::new(loopengine::Other::kernel_loop()));
    targets.push(Box::new(loopengine::Other::fuse()));
    targets.push(Box::new(fuse_passthrough::FusePassthrough::default()));
    targets.push(Box::new(qemu_fuse::QemuFuse::default()));
    targets.push(Box::new(qemu_nbd::QemuNbd::default()));
    targets.push(Box::new(rublk::Rublk::default()));
    targets.push(Box::new(ext4::Ext4::on_loop()));
    targets.push(Box::new(ext4::Ext4::on_loopengine()));
    targets.push(Box::new(ext4::Fuse2fs::default()));
    targets
}

/// Version of loopengine on PATH.
pub(crate) fn engine() -> Result<String> {
    daemon::version()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_different_and_make_different_files() {
        let mut names: Vec<String> = all().iter().map(|target| plain(&target.name())).collect();
        let count = names.len();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), count);
    }

    #[test]
    fn another_image_is_noticed() {
        let place = tempfile::tempdir().unwrap();
        let (a, b) = (place.path().join("a"), place.path().join("b"));
        for image in [&a, &b] {
            std::fs::write(image, vec![0; 8192]).unwrap();
            mark(image).unwrap();
        }
        assert!(leads_to(&a, &a).unwrap());
        assert!(!leads_to(&b, &a).unwrap());
        assert!(check_mark(&b, &a).unwrap_err().to_string().contains("is not backed by"));
    }
}
