// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Mounts an image with the kernel, for root.

use std::ffi::CStr;
use std::path::{Path, PathBuf};

use rustix::fs::AtFlags;
use rustix::io::Errno;
use rustix::mount::{MountFlags, mount as mount_fs};

use super::PrivateDevice;
use super::image::MountImage;
use crate::error::{Error, Kind, Result};
use crate::sys;

/// True for root of the initial user namespace: elsewhere the kernel mounts no disk.
pub(super) fn mounts_for_us() -> bool {
    rustix::process::geteuid().is_root() && sys::userns::is_initial()
}

/// Mounts `device` on `dir`. The device then lives until the unmount.
pub(super) fn mount(device: &PrivateDevice, image: &MountImage, dir: &Path) -> Result<()> {
    let shown = image.shown.display();
    let cannot = |error: Errno| Error::os(error, format!("cannot mount {shown} on {}", dir.display()));
    let source = source(device).map_err(cannot)?;
    let mut flags = MountFlags::NOSUID | MountFlags::NODEV;
    flags.set(MountFlags::RDONLY, image.read_only);
    // Overrides a panic option in the image.
    let data: Option<&CStr> = image.kind.starts_with("ext").then_some(c"errors=remount-ro");
    mount_fs(&source, dir, driver(image.kind), flags, data).map_err(|error| match error {
        Errno::NODEV => {
            Error::new(Kind::Unsupported, format!("this kernel does not support {}", image.kind)).hint(
                format!("give a FUSE driver with --fuse {}=PROGRAM, or load the kernel module", image.kind),
            )
        }
        Errno::BUSY => cannot(error),
        error => cannot(error).hint("read the log of the kernel with dmesg"),
    })
}

/// The name of the file system in the kernel.
fn driver(kind: &str) -> &str {
    match kind {
        "ntfs" => "ntfs3",
        kind => kind,
    }
}

/// A device path that stays valid after this process ends.
fn source(device: &PrivateDevice) -> rustix::io::Result<PathBuf> {
    let number = rustix::fs::statat(&device.pool, &device.node, AtFlags::SYMLINK_NOFOLLOW)?.st_rdev;
    let (major, minor) = (rustix::fs::major(number), rustix::fs::minor(number));
    let link = std::fs::read_link(format!("/sys/dev/block/{major}:{minor}")).unwrap_or_default();
    let named = Path::new("/dev").join(link.file_name().unwrap_or_default());
    match rustix::fs::stat(&named) {
        Ok(found) if found.st_rdev == number => Ok(named),
        _ => Ok(device.path()),
    }
}
