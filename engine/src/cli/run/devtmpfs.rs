// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A bind mount of the command's /dev, in place of a devtmpfs that the command mounts.
//!
//! The bind mount omits the mounts in /dev, so that one umount removes it. It has the nodes of the
//! pool's devices (`covered_nodes`) and the command's mappings. Only for root of the host: no other
//! user may mount a devtmpfs.

use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{MountAttrFlags, MoveMountFlags, OpenTreeFlags, move_mount, open_tree};

use super::caller_root::{enter_caller_namespace, in_root_of_caller};
use crate::intercept::mounts::MounterRequest;
use crate::loops::Answer;
use crate::sys;

/// The command's /dev.
pub(super) struct OwnDev(OwnedFd);

impl OwnDev {
    /// Opens the present /dev. The command may cover it later.
    pub(super) fn open() -> rustix::io::Result<OwnDev> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        rustix::fs::open("/dev", flags, Mode::empty()).map(OwnDev)
    }

    /// Serves a mount of devtmpfs. `Ok(false)`: the command has unmounted its /dev. Runs on a
    /// separate thread, whose namespace it changes.
    pub(super) fn bind(&self, request: &MounterRequest) -> Answer<bool> {
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        let tree = match open_tree(&self.0, "", flags | OpenTreeFlags::AT_EMPTY_PATH) {
            Err(Errno::INVAL) => return Ok(false),
            tree => tree?,
        };
        // Options of the file system are ignored: they would change /dev itself.
        sys::mount::add_attributes(tree.as_fd(), attributes(request.mount.flags))?;
        let target = in_root_of_caller(request, || {
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            rustix::fs::openat(CWD, &*request.mount.target, flags, Mode::empty())
        })?;
        enter_caller_namespace(request)?;
        let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
        move_mount(&tree, "", &target, "", flags)?;
        Ok(true)
    }
}

/// The attributes of a mount that these flags of mount(2) add.
fn attributes(flags: u64) -> MountAttrFlags {
    let bits = [
        (libc::MS_RDONLY, MountAttrFlags::MOUNT_ATTR_RDONLY),
        (libc::MS_NOSUID, MountAttrFlags::MOUNT_ATTR_NOSUID),
        (libc::MS_NODEV, MountAttrFlags::MOUNT_ATTR_NODEV),
        (libc::MS_NOEXEC, MountAttrFlags::MOUNT_ATTR_NOEXEC),
    ];
    bits.into_iter().filter(|(bit, _)| flags & bit != 0).map(|(_, attribute)| attribute).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn translates_flags_of_the_mount() {
        assert_eq!(attributes(0), MountAttrFlags::empty());
        let both = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NOEXEC;
        assert_eq!(attributes(libc::MS_NOSUID | libc::MS_NOEXEC | libc::MS_NOATIME), both);
    }
}
