// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What is measured: each target is one small file behind one trait.
//!
//! Every target gets images of its own, preallocated and written, on the same store. Its block
//! devices have the scheduler `none`. Whatever it starts, it takes away.

mod ext4;
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

/// The file itself, without a block device: what all others are on top of.
pub const RAW: &str = raw::FILE;

/// An emulated CPU is slow to start programs.
pub(crate) const LIMIT: Duration = Duration::from_secs(180);

/// Devices of the job that uses many.
pub const MANY: usize = 16;

/// Something to be measured.
pub trait Target {
    /// Its name in tables.
    fn name(&self) -> String;

    /// What it is, in one line.
    fn about(&self) -> String;

    /// Version of what is behind it; an error where that is missing.
    fn version(&self) -> Result<String>;

    /// The module of the kernel that it needs.
    fn module(&self) -> Option<Module> {
        None
    }

    /// Makes it usable, its module being there. After an error `tear_down` is called too.
    fn set_up(&mut self, place: &Place) -> Result<Opened>;

    /// Takes away what `set_up` made, however far it came.
    fn tear_down(&mut self) -> Result<()>;

    /// Operations that left the fast path since it was set up, if it counts them.
    fn punts(&self) -> Option<u64> {
        None
    }
}

/// What a target's path is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    File,
    Block,
    /// The directory of a mounted file system.
    Mount,
}

/// A target that can be measured.
#[derive(Clone, Debug)]
pub struct Opened {
    pub kind: Kind,
    pub path: PathBuf,
    /// Sixteen more, smaller ones, where it was asked for them.
    pub many: Vec<PathBuf>,
    /// The process that serves it.
    pub server: Option<u32>,
}

/// Where targets are set up.
#[derive(Clone, Debug)]
pub struct Place {
    /// Directory for images, on the store.
    pub images: PathBuf,
    /// Directory for sockets, mount points and the like.
    pub scratch: PathBuf,
    /// Size of a target's image, in MiB.
    pub image_mb: u32,
    /// Size of each of the many, in MiB; 0: they are not needed.
    pub many_mb: u32,
    pub loops: Loops,
}

impl Place {
    /// A preallocated and written image; its first block names it.
    pub fn image(&self, name: &str) -> Result<PathBuf> {
        self.make(name, self.image_mb)
    }

    /// The many small ones.
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

    /// An empty directory of this name.
    pub fn directory(&self, name: &str) -> Result<PathBuf> {
        let path = self.scratch.join(plain(name));
        std::fs::create_dir_all(&path).with_context(|| format!("cannot make {}", path.display()))?;
        Ok(path)
    }
}

/// A name that can be one of a file.
fn plain(name: &str) -> String {
    name.replace(|c: char| !c.is_ascii_alphanumeric(), "-")
}

/// Preallocates the image and writes all of it once, past the page cache where that can be done.
pub fn make_image(image: &Path, size_mb: u32) -> Result<()> {
    let bytes = format!("{size_mb}M");
    sh::capture(Command::new(sh::which("fallocate")?).args(["-l", &bytes]).arg(image), LIMIT)?;
    let mut dd = Command::new("dd");
    dd.arg("if=/dev/zero").arg(format!("of={}", image.display()));
    dd.args(["bs=1M", &format!("count={size_mb}"), "oflag=direct", "conv=notrunc,fsync", "status=none"]);
    sh::capture(&mut dd, LIMIT).map(drop)
}

/// Bytes of a mark.
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
    // What was written through the page cache is not to be found there later.
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)?;
    Ok(())
}

/// Whether what is read at `path` begins with the mark of `image`.
pub fn leads_to(path: &Path, image: &Path) -> Result<bool> {
    use std::io::Read;
    let mut bytes = vec![0; MARK];
    let mut file = std::fs::File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    file.read_exact(&mut bytes).with_context(|| format!("cannot read {}", path.display()))?;
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)?;
    Ok(bytes == mark_of(image))
}

/// An error if a device is not the one that it was meant to be.
pub(crate) fn check_mark(path: &Path, image: &Path) -> Result<()> {
    if !leads_to(path, image)? {
        bail!("{} does not show {}", path.display(), image.display());
    }
    Ok(())
}

/// Block devices at `path` and `many`, all with the scheduler `none`.
pub(crate) fn block(path: PathBuf, many: Vec<PathBuf>, server: Option<u32>) -> Result<Opened> {
    std::iter::once(&path).chain(&many).try_for_each(|node| store::set_scheduler_none(node))?;
    Ok(Opened { kind: Kind::Block, path, many, server })
}

/// The first word of what `program` says of its version that begins with a digit.
pub(crate) fn version_of(program: &str, words: &[&str]) -> Result<String> {
    let output = sh::output(Command::new(sh::which(program)?).args(words), LIMIT)?;
    // fuse2fs speaks on standard error, and what it calls on standard output.
    let said = [output.stderr, output.stdout].concat();
    let said = String::from_utf8_lossy(&said);
    let number = said.split_whitespace().find(|word| word.starts_with(|c: char| c.is_ascii_digit()));
    Ok(number.unwrap_or("of an unknown version").trim_end_matches([',', ')']).to_owned())
}

/// The version of what is behind `target`, or why it is unavailable here, as far as that can be told without
/// setting it up.
pub(crate) fn check(target: &dyn Target) -> Result<String> {
    let version = target.version()?;
    target.module().map_or(Ok(()), Module::check)?;
    Ok(version)
}

/// A program that serves while it runs in the foreground.
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
            // Ctrl-C on a terminal is not for it.
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

    /// Ends it as a service manager would.
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

/// All there are, in the order of a table.
pub fn all() -> Vec<Box<dyn Target>> {
    let mut targets: Vec<Box<dyn Target>> = vec![
        Box::new(raw::RawFile),
        Box::new(raw::RawDevice::default()),
        Box::new(kernel_loop::KernelLoop::direct()),
        Box::new(kernel_loop::KernelLoop::buffered()),
    ];
    // A path that is not granted says so when it is set up.
    for path in ["batch", "auto", "copy"] {
        targets.push(Box::new(loopengine::Ublk::new(path)));
    }
    targets.push(Box::new(loopengine::Fuse::default()));
    targets.push(Box::new(qemu_fuse::QemuFuse::default()));
    targets.push(Box::new(qemu_nbd::QemuNbd::default()));
    targets.push(Box::new(rublk::Rublk::default()));
    targets.push(Box::new(ext4::Ext4::on_loop()));
    targets.push(Box::new(ext4::Ext4::on_loopengine()));
    targets.push(Box::new(ext4::Fuse2fs::default()));
    targets
}

/// The version of loopengine on PATH.
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
        assert!(check_mark(&b, &a).unwrap_err().to_string().contains("does not show"));
    }
}
