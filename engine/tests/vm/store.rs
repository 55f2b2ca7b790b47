// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The file system for the images of a case, on a device of its own: its direct I/O is real, and it
//! has no other users.
//!
//! Knows mkfs and mount. Dropping a store unmounts it and frees its device.

use std::time::Duration;

pub(crate) use crate::below::{Disk, Shape};
use crate::harness::{At, Ctx, Res};
use crate::tools;

/// A file system that is mounted until this is dropped.
pub(crate) struct Mount {
    /// The mount point.
    pub(crate) dir: String,
    mounted: bool,
}

impl Mount {
    /// Mounts `device`; `options` are words for mount(8).
    pub(crate) fn new(device: &str, dir: &str, options: &[&str]) -> Res<Mount> {
        std::fs::create_dir_all(dir).at(dir)?;
        tools::ok(&[&["mount"], options, &[device, dir]].concat())?;
        Ok(Mount { dir: dir.to_string(), mounted: true })
    }

    /// Unmounts; unlike a drop, returns failures.
    pub(crate) fn umount(mut self) -> Res {
        self.mounted = false;
        tools::ok(&["umount", &self.dir])?;
        Ok(())
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        if self.mounted
            && tools::ok(&["umount", &self.dir]).is_err()
            && let Err(error) = tools::ok(&["umount", "--lazy", &self.dir])
        {
            eprintln!("  {} not unmounted: {error:?}", self.dir);
        }
    }
}

/// A file system on a device of its own. Fields are dropped in this order.
pub(crate) struct Store {
    mount: Mount,
    /// The device below.
    pub(crate) disk: Disk,
}

impl Store {
    /// An XFS store.
    pub(crate) fn xfs(ctx: &Ctx) -> Res<Store> {
        Store::new(ctx, "xfs", &Shape::default())
    }

    /// An ext4 store.
    pub(crate) fn ext4(ctx: &Ctx) -> Res<Store> {
        Store::new(ctx, "ext4", &Shape::default())
    }

    /// A store of either kind on a device of the given shape.
    pub(crate) fn new(ctx: &Ctx, kind: &str, shape: &Shape) -> Res<Store> {
        let disk = Disk::new(shape)?;
        mkfs(kind, &disk.node())?;
        let mount = Mount::new(&disk.node(), &ctx.path("store"), &[])?;
        Ok(Store { mount, disk })
    }

    /// The path of a file in the store.
    pub(crate) fn path(&self, name: &str) -> String {
        format!("{}/{name}", self.mount.dir)
    }

    /// A sparse image.
    pub(crate) fn sparse(&self, name: &str, bytes: u64) -> Res<String> {
        let path = self.path(name);
        std::fs::File::create(&path).and_then(|file| file.set_len(bytes)).at(&path)?;
        Ok(path)
    }

    /// An allocated image of zeroes.
    pub(crate) fn allocated(&self, name: &str, bytes: u64) -> Res<String> {
        let path = self.path(name);
        tools::ok(&["fallocate", "-l", &bytes.to_string(), &path])?;
        Ok(path)
    }

    /// Unmounts, and returns the device.
    pub(crate) fn into_disk(self) -> Res<Disk> {
        self.mount.umount()?;
        Ok(self.disk)
    }
}

/// Makes a file system.
pub(crate) fn mkfs(kind: &str, device: &str) -> Res {
    let words: &[&str] = match kind {
        "xfs" => &["mkfs.xfs", "-q", "-f", device],
        // Without lazy initialization: no kernel thread writes to the device during a case.
        _ => &["mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0", device],
    };
    tools::ok(words)?;
    Ok(())
}

/// Checks an unmounted file system without changes to it.
pub(crate) fn fsck(kind: &str, device: &str) -> Res {
    let words: &[&str] = match kind {
        "xfs" => &["xfs_repair", "-n", device],
        _ => &["e2fsck", "-f", "-n", device],
    };
    tools::run_for(Duration::from_secs(120), words)?.ok()?;
    Ok(())
}
