// SPDX-License-Identifier: Apache-2.0 OR MIT
//! FUSE drivers that mount images: their file systems, packages and options.
//!
//! Knows the drivers, how to find one, wait for it, and probe its mount. Does not know where the
//! image comes from, or who mounts.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use rustix::io::Errno;

use crate::loops::Answer;

/// Time for a driver to mount.
const MOUNT_MAX: Duration = Duration::from_secs(30);
/// Time for its root directory to answer afterwards.
const ANSWER_MAX: Duration = Duration::from_secs(10);

/// Directories that the PATH of plain users often lacks.
const MORE_DIRS: [&str; 2] = ["/usr/sbin", "/sbin"];

/// How a driver gets the offset of the file system in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Offset {
    /// Not supported.
    None,
    /// `-o offset=BYTES`.
    Option,
    /// `--offset=BYTES`.
    Flag,
}

/// Properties of a driver.
#[derive(Debug)]
pub(super) struct FuseDriver {
    pub(super) name: &'static str,
    /// Package in Debian, if any.
    pub(super) package: Option<&'static str>,
    kinds: &'static [&'static str],
    pub(super) offset: Offset,
    /// Writes reliably.
    pub(super) writes: bool,
    /// Accepts `fsname`, the source that df and findmnt show.
    pub(super) fsname: bool,
    /// Mounts block devices for plain users.
    pub(super) devices: bool,
    /// Shows its source path to df and findmnt, regardless of `fsname`.
    pub(super) shows_source: bool,
    /// Locks the image itself, and fails if it is locked.
    pub(super) locks: bool,
    /// Options that the driver needs.
    pub(super) options: &'static [&'static str],
}

/// A driver without special properties.
const PLAIN: FuseDriver = FuseDriver {
    name: "",
    package: None,
    kinds: &[],
    offset: Offset::None,
    writes: true,
    fsname: true,
    devices: true,
    shows_source: false,
    locks: false,
    options: &[],
};

/// For each file system, the first installed driver applies.
const DRIVERS: [FuseDriver; 10] = [
    FuseDriver {
        name: "fuse2fs",
        package: Some("fuse2fs"),
        kinds: &["ext2", "ext3", "ext4"],
        offset: Offset::Option,
        // The user may access all files in their image. Without the first two options fuse2fs adds
        // "allow_other,suid,dev": plain users may not use them, and root should not.
        options: &["fakeroot", "no_default_opts", "subtype=ext4", "attr_timeout=0"],
        ..PLAIN
    },
    FuseDriver {
        name: "squashfuse",
        package: Some("squashfuse"),
        kinds: &["squashfs"],
        offset: Offset::Option,
        writes: false,
        ..PLAIN
    },
    FuseDriver {
        name: "erofsfuse",
        package: Some("erofsfuse"),
        kinds: &["erofs"],
        offset: Offset::Flag,
        writes: false,
        ..PLAIN
    },
    FuseDriver { name: "fuseiso", package: Some("fuseiso"), kinds: &["iso9660"], writes: false, ..PLAIN },
    FuseDriver {
        name: "mount.exfat-fuse",
        package: Some("exfat-fuse"),
        kinds: &["exfat"],
        shows_source: true,
        ..PLAIN
    },
    // Its authors call write support experimental.
    FuseDriver {
        name: "fusefatfs",
        package: Some("fusefat"),
        kinds: &["vfat", "exfat"],
        writes: false,
        ..PLAIN
    },
    FuseDriver { name: "fusefat", package: Some("fusefat"), kinds: &["vfat"], writes: false, ..PLAIN },
    FuseDriver {
        name: "ntfs-3g",
        package: Some("ntfs-3g"),
        kinds: &["ntfs"],
        fsname: false,
        // It mounts devices as "fuseblk", which needs root.
        devices: false,
        locks: true,
        // Without it, "allow_other" makes the files visible to all users.
        options: &["no_def_opts"],
        ..PLAIN
    },
    FuseDriver { name: "xfs-fuse", kinds: &["xfs"], writes: false, ..PLAIN },
    FuseDriver { name: "xfuse", kinds: &["xfs"], writes: false, ..PLAIN },
];

/// The properties of a driver, given by name or path.
pub(super) fn driver(program: &str) -> &'static FuseDriver {
    let name = Path::new(program).file_name();
    DRIVERS.iter().find(|known| name.is_some_and(|name| name == known.name)).unwrap_or(&PLAIN)
}

/// The drivers of a file system.
pub(super) fn drivers_for(kind: &str) -> impl Iterator<Item = &'static FuseDriver> {
    DRIVERS.iter().filter(move |program| program.kinds.contains(&kind))
}

/// All pairs of file system and installed driver that mounts devices.
pub(super) fn installed_for_devices() -> Vec<(String, String)> {
    let here = DRIVERS.iter().filter(|program| program.devices && is_installed(program.name));
    let rules = here.flat_map(|program| program.kinds.iter().map(|kind| (*kind, program.name)));
    rules.map(|(kind, program)| (kind.to_owned(), program.to_owned())).collect()
}

/// True if a program is installed.
pub(super) fn is_installed(program: &str) -> bool {
    find(program).is_some()
}

/// The path of a program given by name.
fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let dirs = std::env::split_paths(&path).chain(MORE_DIRS.map(PathBuf::from));
    dirs.map(|dir| dir.join(program)).find(|path| path.is_file())
}

/// The command that runs a program.
pub(super) fn command(program: &str) -> Command {
    // Use a full path: execvp(3) reports EACCES if $PATH has an inaccessible directory.
    let nowhere =
        || if program.contains('/') { program.into() } else { Path::new(MORE_DIRS[0]).join(program) };
    Command::new(find(program).unwrap_or_else(nowhere))
}

/// Waits until a FUSE driver daemonizes, which it does after mounting.
pub(super) fn wait_mounted(child: &mut Child) -> Answer<()> {
    match wait_exit(child, MOUNT_MAX)? {
        status if status.success() => Ok(()),
        // The driver refused the image.
        status => Err(if status.code().is_none() { Errno::IO } else { Errno::INVAL }),
    }
}

/// Waits until a program exits; kills it after `at_most`.
pub(super) fn wait_exit(child: &mut Child, at_most: Duration) -> Answer<ExitStatus> {
    let until = Instant::now() + at_most;
    loop {
        match child.try_wait() {
            Ok(Some(status)) => return Ok(status),
            Ok(None) if Instant::now() < until => std::thread::sleep(Duration::from_millis(5)),
            _ => {
                let _ = child.kill();
                let _ = child.wait();
                return Err(Errno::TIMEDOUT);
            }
        }
    }
}

/// The device number of the directory's file system. A driver may die after it reported success
/// (fuse2fs 1.47), or never answer.
pub(super) fn probe(dir: &Path) -> Answer<u64> {
    let (done, finished) = mpsc::sync_channel(1);
    let dir = dir.to_owned();
    // On a thread of its own, which may block forever: it ends with this process.
    let ask = move || {
        // The receiver is gone after a timeout.
        let _ = done.send(rustix::fs::stat(&dir).map(|stat| stat.st_dev));
    };
    std::thread::Builder::new().spawn(ask).map_err(|_| Errno::AGAIN)?;
    finished.recv_timeout(ANSWER_MAX).unwrap_or(Err(Errno::TIMEDOUT))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn recognizes_drivers_by_path() {
        assert_eq!(driver("/opt/bin/ntfs-3g").name, "ntfs-3g");
        assert_eq!(driver("/opt/fuse2fs/").name, "fuse2fs");
        assert_eq!((driver("other").name, driver("..").name), ("", ""));
    }

    #[test]
    fn lists_drivers_per_file_system() {
        let names = |kind| drivers_for(kind).map(|program| program.name).collect::<Vec<_>>();
        assert_eq!(names("ext3"), ["fuse2fs"]);
        assert_eq!(names("vfat"), ["fusefatfs", "fusefat"]);
        assert!(names("btrfs").is_empty());
    }

    #[test]
    fn kills_a_program_after_the_timeout() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        assert_eq!(wait_exit(&mut child, Duration::from_millis(20)), Err(Errno::TIMEDOUT));
        assert!(child.try_wait().unwrap().is_some());
    }

    #[test]
    fn probes_a_directory() {
        assert!(probe(Path::new("/")).is_ok());
        assert_eq!(probe(Path::new("/nowhere/at/all")), Err(Errno::NOENT));
    }
}
