// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The kernel's loop driver, with direct I/O and through the page cache.

use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::rc::Rc;

use anyhow::{Context, Result};

use super::{Environment, LIMIT, LOOP, Module, Opened, Target, block, check_mark, kernel};
use crate::{job, sh};

/// Removes loop devices by number and prints those that remain. It retries for five seconds:
/// programs that scan all disks, such as udev, briefly hold a device open.
const REMOVE: &str = r#"
use Errno;
open(my $control, '+<', '/dev/loop-control') or die "/dev/loop-control: $!\n";
for (1 .. 50) {
    @ARGV = grep { !defined ioctl($control, 0x4C81, $_ + 0) and $!{EBUSY} } @ARGV or exit;
    select(undef, undef, undef, 0.1);
}
die "still in use: @ARGV\n";
"#;

/// The loop devices of a run. The driver creates a device when none is free, and keeps it after it
/// is detached; dropping this removes the devices that were created for this run.
#[derive(Clone, Debug, Default)]
pub struct Loops(Rc<Made>);

/// Numbers of the devices.
#[derive(Debug, Default)]
struct Made(RefCell<Vec<String>>);

impl Loops {
    /// Attaches `image` to the first free device. Not interrupted by Ctrl-C, which would lose its
    /// name.
    pub fn attach(&self, image: &Path, direct: bool) -> Result<LoopDevice> {
        LOOP.load()?;
        let mut losetup = Command::new(sh::which("losetup")?);
        let direct = if direct { "--direct-io=on" } else { "--direct-io=off" };
        let losetup = losetup.args([direct, "--find", "--show"]).arg(image);
        let before = numbers();
        let said = sh::uninterrupted(|| sh::capture(losetup, LIMIT))?;
        let device = LoopDevice(PathBuf::from(said.trim_end()));
        let number = said.trim_end().trim_start_matches("/dev/loop").to_owned();
        if !before.contains(&number) {
            self.0.0.borrow_mut().push(number);
        }
        Ok(device)
    }
}

impl Drop for Made {
    fn drop(&mut self) {
        if self.0.borrow().is_empty() {
            return;
        }
        // losetup(8) has no option for this, and an ioctl needs unsafe code; Debian always has
        // perl.
        let remove = || {
            let perl = sh::which("perl").context("perl is not installed")?;
            sh::capture(Command::new(perl).args(["-e", REMOVE]).args(&*self.0.borrow()), LIMIT)
        };
        if let Err(error) = sh::uninterrupted(remove) {
            eprintln!("cannot remove loop devices {}: {error:#}", self.0.borrow().join(" "));
        }
    }
}

/// Numbers of the existing loop devices, bound or not.
fn numbers() -> Vec<String> {
    let disks = std::fs::read_dir("/sys/block").into_iter().flatten().flatten();
    disks.filter_map(|disk| Some(disk.file_name().to_str()?.strip_prefix("loop")?.to_owned())).collect()
}

/// A kernel loop device; dropping it detaches it.
pub struct LoopDevice(PathBuf);

impl LoopDevice {
    /// Path of the device node.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Detaches the device.
    pub fn detach(self) -> Result<()> {
        let detached = self.losetup_detach();
        std::mem::forget(self);
        detached
    }

    fn losetup_detach(&self) -> Result<()> {
        let mut losetup = Command::new(sh::which("losetup")?);
        sh::uninterrupted(|| sh::capture(losetup.arg("--detach").arg(&self.0), LIMIT)).map(drop)
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        if let Err(error) = self.losetup_detach() {
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

    fn module(&self) -> Option<Module> {
        Some(LOOP)
    }

    fn set_up(&mut self, place: &Environment) -> Result<Opened> {
        let mut images = vec![place.image(&self.name())?];
        images.extend(place.many(&self.name())?);
        for image in &images {
            let device = place.loops.attach(image, self.direct)?;
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
