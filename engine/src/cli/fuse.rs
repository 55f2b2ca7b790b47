//! Programs of FUSE that mount images: which mounts what, who packages it, and what each can be told.
//!
//! Knows the programs, how to find and to wait for one, and whether what it has mounted answers. Does not
//! know where the image comes from, nor who asks.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use rustix::io::Errno;

use crate::loops::Answer;

/// How long a program may take to mount.
const MOUNT_MAX: Duration = Duration::from_secs(30);
/// How long it may take to show the root directory afterwards.
const ANSWER_MAX: Duration = Duration::from_secs(10);

/// Plain users' PATH often lacks these, and some programs are nowhere else.
const MORE_DIRS: [&str; 2] = ["/usr/sbin", "/sbin"];

/// How a program is told where in a file the file system begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Offset {
    /// It cannot be.
    None,
    /// `-o offset=BYTES`.
    Option,
    /// `--offset=BYTES`.
    Flag,
}

/// What is known of a program.
#[derive(Debug)]
pub(super) struct Program {
    pub(super) name: &'static str,
    /// Debian's package, if it has one.
    pub(super) package: Option<&'static str>,
    kinds: &'static [&'static str],
    pub(super) offset: Offset,
    /// It writes, and is trusted to.
    pub(super) writes: bool,
    /// It takes `fsname`, the name that df and findmnt show.
    pub(super) fsname: bool,
    /// It mounts block devices for plain users.
    pub(super) devices: bool,
    /// It shows the path that it got to df and findmnt, whatever `fsname` says.
    pub(super) shows_source: bool,
    /// It locks the image itself, and fails if that is locked already.
    pub(super) locks: bool,
    /// Options that it needs.
    pub(super) options: &'static [&'static str],
}

/// One that has nothing special.
const PLAIN: Program = Program {
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

/// For each file system the first that is installed counts.
const PROGRAMS: [Program; 10] = [
    Program {
        name: "fuse2fs",
        package: Some("fuse2fs"),
        kinds: &["ext2", "ext3", "ext4"],
        offset: Offset::Option,
        // The image is its user's, whoever the files in it belong to. And without the first two it would add
        // "allow_other,suid,dev", of which a plain user may have none, and root should not.
        options: &["fakeroot", "no_default_opts", "subtype=ext4", "attr_timeout=0"],
        ..PLAIN
    },
    Program {
        name: "squashfuse",
        package: Some("squashfuse"),
        kinds: &["squashfs"],
        offset: Offset::Option,
        writes: false,
        ..PLAIN
    },
    Program {
        name: "erofsfuse",
        package: Some("erofsfuse"),
        kinds: &["erofs"],
        offset: Offset::Flag,
        writes: false,
        ..PLAIN
    },
    Program { name: "fuseiso", package: Some("fuseiso"), kinds: &["iso9660"], writes: false, ..PLAIN },
    Program {
        name: "mount.exfat-fuse",
        package: Some("exfat-fuse"),
        kinds: &["exfat"],
        shows_source: true,
        ..PLAIN
    },
    // The authors of both say that writing is experimental.
    Program {
        name: "fusefatfs",
        package: Some("fusefat"),
        kinds: &["vfat", "exfat"],
        writes: false,
        ..PLAIN
    },
    Program { name: "fusefat", package: Some("fusefat"), kinds: &["vfat"], writes: false, ..PLAIN },
    Program {
        name: "ntfs-3g",
        package: Some("ntfs-3g"),
        kinds: &["ntfs"],
        fsname: false,
        // As "fuseblk", which is for root only.
        devices: false,
        locks: true,
        // Without it, "allow_other": everybody would see the files.
        options: &["no_def_opts"],
        ..PLAIN
    },
    Program { name: "xfs-fuse", kinds: &["xfs"], writes: false, ..PLAIN },
    Program { name: "xfuse", kinds: &["xfs"], writes: false, ..PLAIN },
];

/// What is known of the program that is called so, with or without a directory.
pub(super) fn known(program: &str) -> &'static Program {
    let name = Path::new(program).file_name();
    PROGRAMS.iter().find(|known| name.is_some_and(|name| name == known.name)).unwrap_or(&PLAIN)
}

/// The programs for a file system.
pub(super) fn programs_for(kind: &str) -> impl Iterator<Item = &'static Program> {
    PROGRAMS.iter().filter(move |program| program.kinds.contains(&kind))
}

/// Every file system with every program that is here and mounts devices.
pub(super) fn for_devices() -> Vec<(String, String)> {
    let here = PROGRAMS.iter().filter(|program| program.devices && is_here(program.name));
    let ways = here.flat_map(|program| program.kinds.iter().map(|kind| (*kind, program.name)));
    ways.map(|(kind, program)| (kind.to_owned(), program.to_owned())).collect()
}

/// Whether a program is installed.
pub(super) fn is_here(program: &str) -> bool {
    find(program).is_some()
}

/// Where a program without a directory is.
fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let dirs = std::env::split_paths(&path).chain(MORE_DIRS.map(PathBuf::from));
    dirs.map(|dir| dir.join(program)).find(|path| path.is_file())
}

/// The program, to be run.
pub(super) fn command(program: &str) -> Command {
    // execvp(3) is not to look for it again: where $PATH has a directory that may not be searched, it says EACCES.
    let nowhere =
        || if program.contains('/') { program.into() } else { Path::new(MORE_DIRS[0]).join(program) };
    Command::new(find(program).unwrap_or_else(nowhere))
}

/// Waits until a program of FUSE leaves its parent, which it does when it has mounted.
pub(super) fn finish(child: &mut Child) -> Answer<()> {
    match wait(child, MOUNT_MAX)? {
        status if status.success() => Ok(()),
        // It looked at the image, and did not like it.
        status => Err(if status.code().is_none() { Errno::IO } else { Errno::INVAL }),
    }
}

/// Waits for the end of a program, which is killed if that takes longer.
pub(super) fn wait(child: &mut Child, at_most: Duration) -> Answer<ExitStatus> {
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

/// The device number of the directory's file system, if that answers. A program may die when it has said
/// that all went well (fuse2fs 1.47 does), or never answer.
pub(super) fn answers(dir: &Path) -> Answer<u64> {
    let (done, told) = mpsc::sync_channel(1);
    let dir = dir.to_owned();
    // Its own, because it may wait for ever: it ends with this process.
    let ask = move || {
        // Nobody waits any more, if it took too long.
        let _ = done.send(rustix::fs::stat(&dir).map(|stat| stat.st_dev));
    };
    std::thread::Builder::new().spawn(ask).map_err(|_| Errno::AGAIN)?;
    told.recv_timeout(ANSWER_MAX).unwrap_or(Err(Errno::TIMEDOUT))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_is_known_with_its_directory() {
        assert_eq!(known("/opt/bin/ntfs-3g").name, "ntfs-3g");
        assert_eq!(known("/opt/fuse2fs/").name, "fuse2fs");
        assert_eq!((known("other").name, known("..").name), ("", ""));
    }

    #[test]
    fn every_file_system_has_its_programs() {
        let names = |kind| programs_for(kind).map(|program| program.name).collect::<Vec<_>>();
        assert_eq!(names("ext3"), ["fuse2fs"]);
        assert_eq!(names("vfat"), ["fusefatfs", "fusefat"]);
        assert!(names("btrfs").is_empty());
    }

    #[test]
    fn who_does_not_end_is_killed() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        assert_eq!(wait(&mut child, Duration::from_millis(20)), Err(Errno::TIMEDOUT));
        assert!(child.try_wait().unwrap().is_some());
    }

    #[test]
    fn a_directory_answers() {
        assert!(answers(Path::new("/")).is_ok());
        assert_eq!(answers(Path::new("/nowhere/at/all")), Err(Errno::NOENT));
    }
}
