// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The backend that `loopengine serve` uses: block devices of ublk where the kernel's driver can be
//! trusted, else those of the kernel's loop driver, else files.
//!
//! Knows releases and modules. Does not open anything.

use crate::broken_kernels;
use crate::config::BackendChoice;
use crate::error::{Error, Kind, Result};
use crate::frontend::{BackendKind, fuse, kernel_loop, ublk};
use crate::kernels::{self, BLOCK_DEVICES};

const KERNEL_LOOP: &str = "serving block devices (kernel loop)";

/// Selects the backend on a kernel of this release, with or without the ublk driver. `force`: even
/// if the driver is known to crash. Also returns a line for the log.
pub(super) fn choose(
    choice: BackendChoice,
    has_ublk: bool,
    release: &str,
    force: bool,
) -> Result<(BackendKind, String)> {
    let broken = broken_kernels::find(release).filter(|_| !force);
    match choice {
        BackendChoice::Auto
            if (broken.is_some() || !has_ublk) && (kernel_loop::check().is_ok() || fuse::check().is_ok()) =>
        {
            let (backend, what) = match kernel_loop::check() {
                Ok(()) => (BackendKind::Loop, KERNEL_LOOP),
                Err(_) => (BackendKind::Fuse, "serving files (FUSE)"),
            };
            let line = match broken {
                Some(broken) => format!(
                    "{what}: {}; for ublk, {}, or give --force",
                    broken.sentence(release),
                    broken.next_kernel()
                ),
                None => format!("{what}: {} is missing; for ublk, {}", ublk::CONTROL_NODE, driver_hint()),
            };
            Ok((backend, line))
        }
        BackendChoice::Auto | BackendChoice::Ublk => {
            broken_kernels::check(release, force)?;
            if !has_ublk {
                let message = format!("the ublk driver is not available: {} is missing", ublk::CONTROL_NODE);
                return Err(Error::new(Kind::Unavailable, message).hint(driver_hint()));
            }
            Ok((BackendKind::Ublk, "serving block devices (ublk)".to_owned()))
        }
        BackendChoice::Loop => {
            kernel_loop::check()?;
            Ok((BackendKind::Loop, KERNEL_LOOP.to_owned()))
        }
        BackendChoice::Fuse => {
            fuse::check()?;
            Ok((BackendKind::Fuse, "serving files (FUSE)".to_owned()))
        }
    }
}

/// The backend of instances by default, and others that an instance or a pool can ask for. Files
/// are only for a daemon without a mount namespace of its own, where nobody else would see them;
/// ublk only for one with such a namespace.
pub(super) fn with_others(default: BackendKind, has_ublk: bool, force: bool) -> Vec<BackendKind> {
    let trusted = force || broken_kernels::find(&kernels::release()).is_none();
    match default {
        BackendKind::Ublk => vec![default, BackendKind::Loop],
        BackendKind::Loop if has_ublk && trusted => vec![default, BackendKind::Ublk],
        BackendKind::Loop => vec![default],
        BackendKind::Fuse => vec![default, BackendKind::Loop],
    }
}

/// The next step if the driver is missing.
pub(super) fn driver_hint() -> String {
    let release = kernels::release();
    if let Some(broken) = broken_kernels::find(&release) {
        return format!("{}: {}", broken.sentence(&release), broken.next_kernel());
    }
    let other = format!("use Linux {} or newer with CONFIG_BLK_DEV_UBLK", BLOCK_DEVICES.version());
    match module_exists(&release) {
        Some(true) => "run 'modprobe ublk_drv'".to_owned(),
        Some(false) => format!("kernel {release} has no module ublk_drv: {other}"),
        None => format!("run 'modprobe ublk_drv'; if kernel {release} has no such module, {other}"),
    }
}

/// True if this kernel has the module installed. None if unknown.
fn module_exists(release: &str) -> Option<bool> {
    let known = std::fs::read_to_string(format!("/lib/modules/{release}/modules.dep")).ok()?;
    Some(known.lines().any(|line| {
        let path = line.split(':').next().unwrap_or_default();
        path.rsplit('/').next().unwrap_or_default().starts_with("ublk_drv.ko")
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    const BROKEN: &str = "6.18.5-200.fc43.x86_64";

    #[test]
    fn refuses_block_devices_on_a_broken_kernel() {
        for has_ublk in [true, false] {
            let refused = choose(BackendChoice::Ublk, has_ublk, BROKEN, false).unwrap_err();
            let line = refused.to_string();
            assert!(line.contains(BROKEN) && line.contains("--force"), "{line}");
        }
        assert!(choose(BackendChoice::Ublk, true, "6.18.6", false).is_ok());
    }

    #[test]
    fn auto_falls_back_on_a_broken_kernel() {
        match choose(BackendChoice::Auto, true, BROKEN, false) {
            Ok((backend, line)) => {
                let has_loop = kernel_loop::check().is_ok();
                assert_eq!(backend, if has_loop { BackendKind::Loop } else { BackendKind::Fuse });
                assert!(line.contains(BROKEN) && line.contains("--force"), "{line}");
            }
            Err(refused) => assert!(fuse::check().is_err() && kernel_loop::check().is_err(), "{refused}"),
        }
        let (backend, _) = choose(BackendChoice::Auto, true, "6.18.6", false).unwrap();
        assert_eq!(backend, BackendKind::Ublk);
    }

    #[test]
    fn force_serves_block_devices_on_a_broken_kernel() {
        for choice in [BackendChoice::Auto, BackendChoice::Ublk] {
            let (backend, _) = choose(choice, true, BROKEN, true).unwrap();
            assert_eq!(backend, BackendKind::Ublk);
        }
    }
}
