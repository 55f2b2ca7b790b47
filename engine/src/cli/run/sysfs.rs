// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The /sys of a command with private loop devices: three directories are covered by those of the
//! pool, which the daemon updates.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::fs::CWD;
use rustix::io::Errno;
use rustix::mount::{OpenTreeFlags, open_tree};

use super::attach;
use crate::error::{Error, Result};
use crate::private::SYSFS_DIRS;

/// Mounts the directories of `tree` over those of /sys. Does nothing without /sys.
pub(super) fn mount(tree: OwnedFd) -> Result<()> {
    let cannot = |error: Errno| Error::os(error, "cannot set up a private /sys/block");
    let present: Vec<_> = SYSFS_DIRS.iter().filter(|(_, place)| Path::new(place).is_dir()).collect();
    let Some((_, first)) = present.first() else { return Ok(()) };
    // open_tree(2) needs an attached tree; the last mount covers it.
    attach(tree.as_fd(), CWD, first).map_err(cannot)?;
    for (part, place) in present {
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        let part = open_tree(&tree, *part, flags).map_err(cannot)?;
        attach(part.as_fd(), CWD, place).map_err(cannot)?;
    }
    Ok(())
}
