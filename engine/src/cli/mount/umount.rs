// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `loopengine umount`: ends a mount and its device.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::mount::{UnmountFlags, unmount};

use super::fuse::{self, is_without_devices};
use super::mounted::{FuseMount, MountPool, is_image, wait_gone};
use super::{all, open};
use crate::error::{Error, Kind, Result};
use crate::sys::{mntns, processes};

/// Time for the driver to write back and for the daemon to remove the device.
const END_MAX: Duration = Duration::from_secs(60);

/// Time after which it looks for copies of the mount.
const COPIED_MIN: Duration = Duration::from_secs(2);

/// Unmount images that 'loopengine mount' mounted.
///
/// Returns when all data is written and the device is gone. The image is then complete.
#[derive(Debug, clap::Args)]
pub(in crate::cli) struct UmountArgs {
    /// Mount point or image.
    #[arg(value_name = "DIR|IMAGE")]
    what: PathBuf,

    /// Unmount DIR/1, DIR/2 and so on, which 'mount --all' mounted, and remove these directories.
    #[arg(short, long)]
    all: bool,
}

impl UmountArgs {
    pub(in crate::cli) fn run(self, run_dir: &Path) -> Result<()> {
        let named = full(&self.what);
        let inner = if self.all { all::directories(&named) } else { Vec::new() };
        let names: Vec<&Path> = inner.iter().chain([&named]).map(PathBuf::as_path).collect();
        let is_named = |one: &FuseMount| names.iter().any(|name| one.is(name));
        let fuse_mounts: Vec<FuseMount> = FuseMount::all().into_iter().filter(is_named).collect();
        let known = !fuse_mounts.is_empty() || mntns::kind_at(&named).is_some();
        let found = match pools(&names, run_dir) {
            Err(error) if known && is_without_devices(error.kind()) => Vec::new(),
            found => found?,
        };
        if found.is_empty() && fuse_mounts.is_empty() {
            return Err(self.unknown(&named));
        }
        let mut dirs: Vec<PathBuf> = fuse_mounts.iter().map(|one| one.dir.clone()).collect();
        for mounted in &found {
            dirs.extend(
                mounted.dirs()?.into_iter().filter(|dir| !fuse_mounts.iter().any(|one| one.dir == *dir)),
            );
        }
        let numbers: Vec<String> = dirs.iter().filter_map(|dir| mntns::number_at(dir)).collect();
        dirs.iter().try_for_each(|dir| unmount_dir(dir, false))?;
        let ended_within = |at_most: Duration| -> Result<bool> {
            let until = Instant::now() + at_most;
            let ended = found.is_empty() || wait_gone(run_dir, &found, at_most)?;
            Ok(ended && fuse_mounts.iter().all(|one| one.wait_gone(until)))
        };
        if !ended_within(COPIED_MIN)? {
            self.check_not_copied(&numbers)?;
        }
        if !ended_within(END_MAX)? {
            let message = format!("{} is unmounted, but its device is still in use", self.what.display());
            return Err(Error::new(Kind::Deadline, message)
                .hint("wait for the FUSE driver, or find other users of the device with 'loopengine find'"));
        }
        for dir in dirs.iter().filter(|dir| self.all && all::is_of_partition(dir)) {
            // A directory that is in use or not empty stays.
            let _ = std::fs::remove_dir(dir);
        }
        let parents = dirs.iter().filter_map(|dir| dir.parent());
        dirs.iter().map(PathBuf::as_path).chain(parents).chain([&*named]).for_each(open::remove_dir);
        Ok(())
    }

    /// A mount namespace that was made meanwhile may have a copy of the mount, if mounts here are
    /// private.
    fn check_not_copied(&self, numbers: &[String]) -> Result<()> {
        let Some(process) = numbers.iter().find_map(|number| processes::with_mount(number)) else {
            return Ok(());
        };
        let shown = self.what.display();
        let message = format!("{shown} is unmounted, but {process} has a copy of the mount");
        Err(Error::new(Kind::Busy, message).hint("the image is in use until that process ends"))
    }

    fn unknown(&self, named: &Path) -> Error {
        let shown = self.what.display();
        let is_mount = mntns::kind_at(named);
        let hint = match is_mount {
            None if !all::directories(named).is_empty() => {
                format!("unmount its partitions with 'loopengine umount --all {shown}'")
            }
            Some(kind) if kind.starts_with("fuse") => format!("unmount it with 'fusermount3 -u {shown}'"),
            Some(_) => format!("unmount it with 'umount {shown}'"),
            None => "'findmnt' lists all mounts".to_owned(),
        };
        Error::new(
            Kind::NotFound,
            format!("{shown} is not a mount of 'loopengine mount', or another user mounted it"),
        )
        .hint(hint)
    }
}

/// The full path, even of a directory whose FUSE driver has died.
fn full(path: &Path) -> PathBuf {
    path.canonicalize().unwrap_or_else(|_| {
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        match (parent.canonicalize(), path.file_name()) {
            (Ok(parent), Some(name)) => parent.join(name),
            _ => path.to_owned(),
        }
    })
}

/// The pools of mounts on these directories, or of these images.
fn pools(names: &[&Path], run_dir: &Path) -> Result<Vec<MountPool>> {
    let mut found = Vec::new();
    for mounted in MountPool::all(run_dir)? {
        for name in names {
            if mounted.is_on(name)? || is_of(&mounted, name, run_dir)? {
                found.push(mounted);
                break;
            }
        }
    }
    Ok(found)
}

fn is_of(mounted: &MountPool, image: &Path, run_dir: &Path) -> Result<bool> {
    let Ok(meta) = image.metadata() else { return Ok(false) };
    Ok(is_image(&meta) && !mounted.bound_ranges(&meta, run_dir)?.is_empty())
}

/// Unmounts one directory. `dead`: detach it even if it is in use.
pub(super) fn unmount_dir(dir: &Path, dead: bool) -> Result<()> {
    let shown = dir.display();
    let cannot = |error: Errno| {
        let error = Error::os(error, format!("cannot unmount {shown}"));
        if error.kind() == Kind::Busy { error.hint(busy(dir)) } else { error }
    };
    let fuse = mntns::kind_at(dir).is_some_and(|kind| kind.starts_with("fuse"));
    if rustix::process::geteuid().is_root() || !fuse {
        let lazily = if dead { UnmountFlags::DETACH } else { UnmountFlags::empty() };
        return unmount(dir, UnmountFlags::NOFOLLOW | lazily).map_err(cannot);
    }
    let Some(fusermount) = fuse::fusermount() else {
        return Err(Error::new(
            Kind::Unavailable,
            "cannot unmount as this user: fusermount3 is not installed",
        )
        .hint("install it ('apt install fuse3')"));
    };
    let done = Command::new(fusermount)
        .args([if dead { "-uz" } else { "-u" }, "--"])
        .arg(dir)
        .stdin(Stdio::null())
        .output();
    let done = done.map_err(|error| Error::os(error, format!("cannot run {fusermount}")))?;
    if done.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&done.stderr);
    let said: String = said.trim().chars().filter(|letter| !letter.is_control()).collect();
    let is_busy = said.contains("busy");
    let error = Error::new(
        if is_busy { Kind::Busy } else { Kind::Denied },
        format!("cannot unmount {shown}: {said}"),
    );
    Err(if is_busy { error.hint(busy(dir)) } else { error })
}

fn busy(dir: &Path) -> String {
    format!("list its users with 'fuser -vm {}', and end them", dir.display())
}
