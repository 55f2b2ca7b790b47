// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A backing store for tests and measurements: a file system on a memory-backed null_blk device,
//! which supports direct I/O.
//!
//! Knows null_blk, mkfs and mount. Needs root.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::ValueEnum;

use crate::kernel_module::NULL_BLK;
use crate::sh;

const LIMIT: Duration = Duration::from_secs(120);
const NULLB: &str = "/sys/kernel/config/nullb";

/// The usual mount options.
pub const DEFAULTS: &str = "defaults";

/// File system of a store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Fs {
    /// XFS
    Xfs,
    /// ext4
    Ext4,
}

/// Makes or removes a store.
#[derive(clap::Args)]
pub struct Options {
    /// File system
    #[arg(long, value_enum, default_value = "xfs")]
    fs: Fs,
    /// Size in MiB; allocates memory on write
    #[arg(long, value_name = "N", default_value_t = 700)]
    size_mb: u32,
    /// Unmount the file system at DIR and free its memory
    #[arg(long)]
    remove: bool,
    /// Mount point
    #[arg(value_name = "DIR")]
    directory: PathBuf,
}

/// Runs `lab store`.
pub fn run(options: &Options) -> Result<()> {
    if !rustix::process::geteuid().is_root() {
        bail!("lab store needs root: run it as root, or in `cargo lab vm`");
    }
    if options.remove {
        remove(&options.directory)
    } else {
        make(options.fs, options.size_mb, DEFAULTS, &options.directory)
    }
}

/// A store; dropping it removes it.
pub struct Store {
    directory: PathBuf,
}

impl Store {
    /// Makes a store of `size_mb` MiB at `directory`, with these mount options.
    pub fn new(fs: Fs, size_mb: u32, options: &str, directory: &Path) -> Result<Store> {
        make(fs, size_mb, options, directory)?;
        Ok(Store { directory: directory.to_owned() })
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        if let Err(error) = sh::uninterrupted(|| remove(&self.directory)) {
            eprintln!("{error:#}");
        }
    }
}

fn make(fs: Fs, size_mb: u32, options: &str, directory: &Path) -> Result<()> {
    let device = NullBlk::new(size_mb)?;
    let mkfs: &[&str] = match fs {
        Fs::Xfs => &["mkfs.xfs", "-q", "-f"],
        // Lazy initialisation would write during a measurement.
        Fs::Ext4 => &["mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0"],
    };
    sh::capture(Command::new(sh::which(mkfs[0])?).args(&mkfs[1..]).arg(&device.node), LIMIT)?;
    std::fs::create_dir_all(directory).with_context(|| format!("cannot make {}", directory.display()))?;
    sh::capture(Command::new("mount").args(["-o", options]).arg(&device.node).arg(directory), LIMIT)?;
    device.keep();
    Ok(())
}

/// A memory-backed null_blk device; dropping it frees its memory.
pub struct NullBlk {
    /// The block device.
    pub node: PathBuf,
    home: Option<PathBuf>,
}

impl NullBlk {
    /// Makes a device of `size_mb` MiB; memory is allocated on write.
    pub fn new(size_mb: u32) -> Result<NullBlk> {
        NULL_BLK.load()?;
        if !Path::new(NULLB).exists() {
            sh::capture(Command::new("mount").args(["-t", "configfs", "none", "/sys/kernel/config"]), LIMIT)?;
        }
        let (name, home) = new_device()?;
        let device = NullBlk { node: PathBuf::from(format!("/dev/{name}")), home: Some(home.clone()) };
        // One queue per CPU, at most two.
        let queues = std::thread::available_parallelism().map_or(1, |cpus| cpus.get().min(2));
        let attributes = [
            ("memory_backed", "1".to_owned()),
            ("discard", "1".to_owned()),
            ("irqmode", "1".to_owned()),
            ("submit_queues", queues.to_string()),
            ("blocksize", "512".to_owned()),
            ("size", size_mb.to_string()),
            ("power", "1".to_owned()),
        ];
        for (attribute, value) in attributes {
            let file = home.join(attribute);
            std::fs::write(&file, value).with_context(|| format!("cannot set {}", file.display()))?;
        }
        let node = &device.node;
        sh::wait_for(&node.display().to_string(), LIMIT, || Ok(node.exists().then_some(())))?;
        set_scheduler_none(node)?;
        Ok(device)
    }

    /// Keeps the device when this is dropped.
    fn keep(mut self) {
        self.home = None;
    }
}

impl Drop for NullBlk {
    fn drop(&mut self) {
        if let Some(home) = &self.home
            && let Err(error) = power_off(home)
        {
            eprintln!("{error:#}");
        }
    }
}

fn power_off(home: &Path) -> Result<()> {
    std::fs::write(home.join("power"), "0")
        .and_then(|()| std::fs::remove_dir(home))
        .with_context(|| format!("cannot remove {}", home.display()))
}

/// Creates a device; returns its name and configuration directory.
fn new_device() -> Result<(String, PathBuf)> {
    for number in 0..64 {
        let name = format!("labstore{number}");
        let home = Path::new(NULLB).join(&name);
        if !home.exists() {
            std::fs::create_dir(&home).with_context(|| format!("cannot make {}", home.display()))?;
            return Ok((name, home));
        }
    }
    bail!("there are 64 file systems of `lab store` already: remove one with `lab store --remove DIR`")
}

fn remove(directory: &Path) -> Result<()> {
    let mounts = std::fs::read_to_string("/proc/self/mounts")?;
    let name = device_of(&mounts, directory)
        .with_context(|| {
            format!("{} is not a file system of `lab store`: see `findmnt`", directory.display())
        })?
        .to_owned();
    sh::capture(Command::new("umount").arg(directory), LIMIT)?;
    let home = Path::new(NULLB).join(name);
    power_off(&home)
}

/// The null_blk device that is mounted at `directory` according to `mounts`.
fn device_of<'a>(mounts: &'a str, directory: &Path) -> Option<&'a str> {
    mounts.lines().rev().find_map(|line| {
        let mut words = line.split(' ');
        let (device, place) = (words.next()?, words.next()?);
        (Path::new(place) == directory)
            .then(|| device.strip_prefix("/dev/"))?
            .filter(|name| name.starts_with("labstore"))
    })
}

/// Sets the I/O scheduler of the block device `node` to none.
pub fn set_scheduler_none(node: &Path) -> Result<()> {
    let real = node.canonicalize().with_context(|| format!("no device {}", node.display()))?;
    let name = real.file_name().unwrap_or_default();
    let file = Path::new("/sys/block").join(name).join("queue/scheduler");
    std::fs::write(&file, "none").with_context(|| format!("cannot write {}", file.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_store_is_removed() {
        let mounts = "/dev/sda1 /data ext4 rw 0 0\n/dev/labstore0 /run/store xfs rw 0 0\n";
        assert_eq!(device_of(mounts, Path::new("/run/store")), Some("labstore0"));
        assert_eq!(device_of(mounts, Path::new("/data")), None);
        assert_eq!(device_of(mounts, Path::new("/nowhere")), None);
    }
}
