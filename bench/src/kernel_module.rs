// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Kernel modules that targets and the store need.
//!
//! Loads modules with modprobe and names the missing one. Knows nothing of what uses a module.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, anyhow};

use crate::sh;

const LIMIT: Duration = Duration::from_secs(180);

/// A kernel module, or the same code built into the kernel.
#[derive(Clone, Copy, Debug)]
pub struct Module {
    /// Name and options.
    name: &'static str,
    /// This file exists once the module is loaded.
    path: &'static str,
}

pub(crate) const LOOP: Module = Module { name: "loop", path: "/dev/loop-control" };
pub(crate) const FUSE: Module = Module { name: "fuse", path: "/dev/fuse" };
pub(crate) const UBLK: Module = Module { name: "ublk_drv", path: "/dev/ublk-control" };
pub(crate) const NULL_BLK: Module = Module { name: "null_blk nr_devices=0", path: "/sys/module/null_blk" };
pub(crate) const NBD: Module = Module { name: "nbd nbds_max=32", path: "/sys/block/nbd0" };

impl Module {
    /// Loads the module unless it is loaded already.
    pub(crate) fn load(self) -> Result<()> {
        self.modprobe(&["-q"])?;
        if self.is_loaded() { Ok(()) } else { Err(self.missing()) }
    }

    /// Checks that `load` would succeed, without loading.
    pub(crate) fn check(self) -> Result<()> {
        self.modprobe(&["-q", "--dry-run"])
    }

    pub(crate) fn is_loaded(self) -> bool {
        Path::new(self.path).exists()
    }

    fn modprobe(self, options: &[&str]) -> Result<()> {
        if self.is_loaded() {
            return Ok(());
        }
        let mut command = Command::new(sh::which("modprobe")?);
        sh::capture(command.args(options).args(self.name.split(' ')), LIMIT)
            .map(drop)
            .map_err(|_| self.missing())
    }

    fn missing(self) -> anyhow::Error {
        let name = self.name.split(' ').next().unwrap_or(self.name);
        anyhow!(
            "this kernel ({}) has no module {name}; `cargo lab bench` measures in a VM whose kernel has it",
            release()
        )
    }
}

/// Release of the running kernel, as the version of a driver that is part of it.
pub(crate) fn release() -> String {
    format!("Linux {}", rustix::system::uname().release().to_string_lossy())
}
