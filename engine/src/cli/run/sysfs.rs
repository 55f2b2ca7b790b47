//! The /sys of a command with loop devices of its own: three directories of it are covered by those
//! that the daemon keeps as the pool is.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::fs::CWD;
use rustix::io::Errno;
use rustix::mount::{OpenTreeFlags, open_tree};

use super::attach;
use crate::error::{Error, Result};
use crate::private::SYSFS_DIRS;

/// Covers the directories with those in `tree`. Without a /sys there is nothing to cover.
pub(super) fn show(tree: OwnedFd) -> Result<()> {
    let cannot = |error: Errno| Error::os(error, "cannot make a /sys/block of its own");
    let present: Vec<_> = SYSFS_DIRS.iter().filter(|(_, place)| Path::new(place).is_dir()).collect();
    let Some((_, first)) = present.first() else { return Ok(()) };
    // A part of a tree can be taken only where the tree is mounted; the last mount covers the whole.
    attach(tree.as_fd(), CWD, first).map_err(cannot)?;
    for (part, place) in present {
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        let part = open_tree(&tree, *part, flags).map_err(cannot)?;
        attach(part.as_fd(), CWD, place).map_err(cannot)?;
    }
    Ok(())
}
