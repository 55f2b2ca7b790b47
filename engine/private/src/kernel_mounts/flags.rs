// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Translates the flags of mount(2) for the new mount API.

use rustix::io::Errno;
use rustix::mount::MountAttrFlags;

use crate::loops::Answer;

/// Only the kernel sets it.
const MS_NOUSER: u64 = 1 << 31;
const MS_NOSYMFOLLOW: u64 = 256;

/// The flags of the file system, and the attributes of the mount.
///
/// nosuid and nodev are always set. Flags that mount(2) ignores today (mand, iversion, …) are
/// ignored, and so are unknown ones.
pub fn translate(flags: u64) -> Answer<(Vec<&'static str>, MountAttrFlags)> {
    let has = |bit: u64| flags & bit != 0;
    if has(MS_NOUSER) {
        return Err(Errno::INVAL);
    }
    let words = [
        (libc::MS_RDONLY, "ro"),
        (libc::MS_SYNCHRONOUS, "sync"),
        (libc::MS_DIRSYNC, "dirsync"),
        (libc::MS_LAZYTIME, "lazytime"),
    ];
    let words = words.into_iter().filter(|(bit, _)| has(*bit)).map(|(_, word)| word).collect();
    let mut of_mount = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV;
    let bits = [
        (libc::MS_RDONLY, MountAttrFlags::MOUNT_ATTR_RDONLY),
        (libc::MS_NOEXEC, MountAttrFlags::MOUNT_ATTR_NOEXEC),
        (libc::MS_NODIRATIME, MountAttrFlags::MOUNT_ATTR_NODIRATIME),
        (MS_NOSYMFOLLOW, MountAttrFlags::MOUNT_ATTR_NOSYMFOLLOW),
    ];
    of_mount.extend(bits.into_iter().filter(|(bit, _)| has(*bit)).map(|(_, attribute)| attribute));
    // As in the kernel: strict wins, and relatime is the default.
    if has(libc::MS_STRICTATIME) {
        of_mount |= MountAttrFlags::MOUNT_ATTR_STRICTATIME;
    } else if has(libc::MS_NOATIME) {
        of_mount |= MountAttrFlags::MOUNT_ATTR_NOATIME;
    }
    Ok((words, of_mount))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn translates_as_the_kernel_does() {
        let always = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV;
        assert_eq!(translate(0), Ok((vec![], always)));
        // MS_SILENT, MS_MANDLOCK, MS_I_VERSION, MS_RELATIME.
        assert_eq!(translate(0x8000 | 64 | 1 << 23 | 1 << 21), Ok((vec![], always)));
        let (words, of_mount) = translate(1 | 8 | 16 | 1024 | 2048).unwrap();
        assert_eq!(words, ["ro", "sync"]);
        let more = MountAttrFlags::MOUNT_ATTR_RDONLY
            | MountAttrFlags::MOUNT_ATTR_NOEXEC
            | MountAttrFlags::MOUNT_ATTR_NOATIME
            | MountAttrFlags::MOUNT_ATTR_NODIRATIME;
        assert_eq!(of_mount, always | more);
        let (_, strict) = translate(1024 | libc::MS_STRICTATIME).unwrap();
        assert_eq!(strict, always | MountAttrFlags::MOUNT_ATTR_STRICTATIME);
        assert_eq!(translate(MS_NOUSER), Err(Errno::INVAL));
    }
}
