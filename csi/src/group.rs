// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The group that may write to a volume.

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt, lchown};
use std::path::Path;

/// Gives `group` all files below `root`, if it does not have `root`. Runs before a pod gets the volume,
/// and follows no link.
pub fn give(root: &Path, group: u32) -> io::Result<()> {
    let meta = fs::symlink_metadata(root)?;
    match meta.gid() == group && meta.mode() & 0o2070 == 0o2070 {
        true => Ok(()),
        false => below(root, group, meta.dev()),
    }
}

/// The root comes last: with it, all is done.
fn below(path: &Path, group: u32, device: u64) -> io::Result<()> {
    let meta = fs::symlink_metadata(path)?;
    if meta.dev() != device {
        return Ok(());
    }
    if meta.is_dir() {
        for entry in fs::read_dir(path)? {
            below(&entry?.path(), group, device)?;
        }
    }
    lchown(path, None, Some(group))?;
    let more = match () {
        () if meta.is_dir() => 0o2070,
        () if meta.is_file() => 0o060,
        () => return Ok(()),
    };
    fs::set_permissions(path, Permissions::from_mode(meta.mode() & 0o7777 | more))
}
