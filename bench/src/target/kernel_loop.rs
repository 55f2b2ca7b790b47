//! The kernel's loop driver, with direct I/O and through the page cache.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;

use super::{LIMIT, Opened, Place, Target, block, check_mark, kernel, need_module};
use crate::{job, sh};

/// A kernel loop device; dropping it detaches it.
pub struct LoopDevice(PathBuf);

impl LoopDevice {
    /// Attaches `image` to the first free one.
    pub fn new(image: &Path, direct: bool) -> Result<LoopDevice> {
        need_module("loop", "/dev/loop-control")?;
        let mut losetup = Command::new(sh::which("losetup")?);
        let direct = if direct { "--direct-io=on" } else { "--direct-io=off" };
        let said = sh::capture(losetup.args([direct, "--find", "--show"]).arg(image), LIMIT)?;
        Ok(LoopDevice(PathBuf::from(said.trim_end())))
    }

    /// Its node.
    pub fn path(&self) -> &Path {
        &self.0
    }

    fn detach(&self) -> Result<()> {
        sh::capture(Command::new(sh::which("losetup")?).arg("--detach").arg(&self.0), LIMIT).map(drop)
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        if let Err(error) = sh::uninterrupted(|| self.detach()) {
            eprintln!("{error:#}");
        }
    }
}

pub(super) struct KernelLoop {
    direct: bool,
    devices: Vec<LoopDevice>,
}

impl KernelLoop {
    pub(super) fn direct() -> KernelLoop {
        KernelLoop { direct: true, devices: Vec::new() }
    }

    pub(super) fn buffered() -> KernelLoop {
        KernelLoop { direct: false, devices: Vec::new() }
    }
}

impl Target for KernelLoop {
    fn name(&self) -> String {
        if self.direct { job::LOOP.into() } else { format!("{} buffered", job::LOOP) }
    }

    fn about(&self) -> String {
        let how = if self.direct { "with direct I/O" } else { "through the page cache of its image" };
        format!("losetup, {how}")
    }

    fn version(&self) -> Result<String> {
        sh::which("losetup")?;
        Ok(kernel())
    }

    fn set_up(&mut self, place: &Place) -> Result<Opened> {
        let mut images = vec![place.image(&self.name())?];
        images.extend(place.many(&self.name())?);
        for image in &images {
            let device = LoopDevice::new(image, self.direct)?;
            check_mark(&device.0, image)?;
            self.devices.push(device);
        }
        let mut paths = self.devices.iter().map(|device| device.0.clone());
        block(paths.next().unwrap_or_default(), paths.collect(), None)
    }

    fn tear_down(&mut self) -> Result<()> {
        self.devices.clear();
        Ok(())
    }
}
