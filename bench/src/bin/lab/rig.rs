//! What figures are taken on: an image, and the block devices that are compared on it.
//!
//! All of them read the same image, preallocated and written, each with the scheduler `none`.
//! Needs root and ublk. Dropping a rig takes all of it away.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::Result;

use crate::engine::Daemon;
use crate::fio::Target;
use crate::{sh, store};

/// The target that others are compared with.
pub(crate) const REFERENCE: &str = "kernel loop";
/// The file itself, without a block device.
pub(crate) const RAW: &str = "raw file";

const LIMIT: Duration = Duration::from_secs(300);

/// A kernel loop device; dropping it detaches it.
struct LoopDevice(PathBuf);

impl LoopDevice {
    fn new(image: &Path) -> Result<LoopDevice> {
        sh::capture(Command::new(sh::which("modprobe")?).args(["-q", "loop"]), LIMIT)?;
        let mut losetup = Command::new(sh::which("losetup")?);
        let said = sh::capture(
            losetup.args(["--direct-io=on", "--read-only", "--find", "--show"]).arg(image),
            LIMIT,
        )?;
        Ok(LoopDevice(PathBuf::from(said.trim_end())))
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let detached = sh::which("losetup")
            .and_then(|losetup| sh::capture(Command::new(losetup).arg("--detach").arg(&self.0), LIMIT));
        if let Err(error) = detached {
            eprintln!("lab: {error:#}");
        }
    }
}

/// The devices, in the order of the table.
pub(crate) struct Rig<'a> {
    daemon: &'a Daemon,
    _loop_device: LoopDevice,
    /// What is measured.
    pub(crate) targets: Vec<Target>,
}

impl<'a> Rig<'a> {
    /// Makes `image` of `size_mb` MiB and every device on it; one of the engine for each of `paths`.
    pub(crate) fn new(image: &Path, size_mb: u32, daemon: &'a Daemon, paths: &[String]) -> Result<Rig<'a>> {
        make_image(image, size_mb)?;
        let loop_device = LoopDevice::new(image)?;
        let target = |name: &str, path: &Path| Target { name: name.to_owned(), path: path.to_owned() };
        let mut targets = vec![target(RAW, image), target(REFERENCE, &loop_device.0)];
        for path in paths {
            // Read-only: several devices of one image are refused otherwise.
            let device = daemon.attach(image, &["--read-only", "--path", path])?;
            targets.push(target(&format!("loopengine {path}"), &device));
        }
        for target in targets.iter().filter(|target| target.name != RAW) {
            store::set_scheduler_none(&target.path)?;
        }
        Ok(Rig { daemon, _loop_device: loop_device, targets })
    }
}

impl Drop for Rig<'_> {
    fn drop(&mut self) {
        for target in self.targets.iter().filter(|target| ![RAW, REFERENCE].contains(&target.name.as_str())) {
            if let Err(error) = self.daemon.detach(&target.path) {
                eprintln!("lab: {error:#}");
            }
        }
    }
}

/// Preallocates the image and writes all of it once, past the page cache.
fn make_image(image: &Path, size_mb: u32) -> Result<()> {
    let bytes = format!("{size_mb}M");
    sh::capture(Command::new(sh::which("fallocate")?).args(["-l", &bytes]).arg(image), LIMIT)?;
    let mut dd = Command::new("dd");
    dd.arg("if=/dev/zero").arg(format!("of={}", image.display()));
    dd.args(["bs=1M", &format!("count={size_mb}"), "oflag=direct", "conv=notrunc,fsync", "status=none"]);
    sh::capture(&mut dd, LIMIT).map(drop)
}
