//! `loopengine umount`: the end of a mount, and of all that belonged to it.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::mount::{UnmountFlags, unmount};

use super::found::{ByProgram, Mounted, is_image, wait_gone};
use super::program::{self, is_without_devices};
use super::{all, open};
use crate::error::{Error, Kind, Result};
use crate::sys::mntns;

/// How long a program may take to write what it holds, and the daemon to take the device away.
const END_MAX: Duration = Duration::from_secs(60);

/// Unmount what 'loopengine mount' has mounted.
///
/// Comes back when all is written and the device is gone: the image is then complete.
#[derive(Debug, clap::Args)]
pub(in crate::cli) struct Args {
    /// The directory, or the image.
    #[arg(value_name = "DIR|IMAGE")]
    what: PathBuf,

    /// Unmount DIR/1, DIR/2 and so on, and remove these directories: what 'mount --all' has mounted.
    #[arg(short, long)]
    all: bool,
}

impl Args {
    pub(in crate::cli) fn run(self, run_dir: &Path) -> Result<()> {
        let named = full(&self.what);
        let inner = if self.all { all::directories(&named) } else { Vec::new() };
        let names: Vec<&Path> = inner.iter().chain([&named]).map(PathBuf::as_path).collect();
        let is_named = |one: &ByProgram| names.iter().any(|name| one.is(name));
        let by_program: Vec<ByProgram> = ByProgram::all().into_iter().filter(is_named).collect();
        let known = !by_program.is_empty() || mntns::kind_at(&named).is_some();
        let found = match pools(&names, run_dir) {
            Err(error) if known && is_without_devices(error.kind()) => Vec::new(),
            found => found?,
        };
        if found.is_empty() && by_program.is_empty() {
            return Err(self.unknown(&named));
        }
        let mut dirs: Vec<PathBuf> = by_program.iter().map(|one| one.dir.clone()).collect();
        for mounted in &found {
            dirs.extend(
                mounted.dirs()?.into_iter().filter(|dir| !by_program.iter().any(|one| one.dir == *dir)),
            );
        }
        dirs.iter().try_for_each(|dir| leave(dir, false))?;
        let until = Instant::now() + END_MAX;
        let ended = found.is_empty() || wait_gone(run_dir, &found, END_MAX)?;
        if !ended || !by_program.iter().all(|one| one.wait_gone(until)) {
            let message = format!("{} is unmounted, but its device is still in use", self.what.display());
            return Err(Error::new(Kind::Deadline, message)
                .hint("wait for the program that mounted it, or see who else has the directory open"));
        }
        // One that has more in it, or is in use, stays.
        inner.iter().filter(|dir| dirs.contains(dir)).for_each(|dir| drop(std::fs::remove_dir(dir)));
        open::forget(&named);
        Ok(())
    }

    fn unknown(&self, named: &Path) -> Error {
        let shown = self.what.display();
        let is_mount = mntns::kind_at(named);
        let hint = match is_mount {
            Some(kind) if kind.starts_with("fuse") => format!("unmount it with 'fusermount3 -u {shown}'"),
            Some(_) => format!("unmount it with 'umount {shown}'"),
            None => "'findmnt' lists what is mounted".to_owned(),
        };
        Error::new(
            Kind::NotFound,
            format!("{shown} is not mounted by 'loopengine mount', or by another user"),
        )
        .hint(hint)
    }
}

/// The full name, also of a directory that nobody can look at any more since its server has died.
fn full(path: &Path) -> PathBuf {
    path.canonicalize().unwrap_or_else(|_| {
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        match (parent.canonicalize(), path.file_name()) {
            (Ok(parent), Some(name)) => parent.join(name),
            _ => path.to_owned(),
        }
    })
}

/// The pools of what is mounted on these directories, or from these images.
fn pools(names: &[&Path], run_dir: &Path) -> Result<Vec<Mounted>> {
    let mut found = Vec::new();
    for mounted in Mounted::all(run_dir)? {
        for name in names {
            if mounted.is_on(name)? || is_of(&mounted, name, run_dir)? {
                found.push(mounted);
                break;
            }
        }
    }
    Ok(found)
}

fn is_of(mounted: &Mounted, image: &Path, run_dir: &Path) -> Result<bool> {
    let Ok(meta) = image.metadata() else { return Ok(false) };
    Ok(is_image(&meta) && !mounted.shows(&meta, run_dir)?.is_empty())
}

/// Unmounts one directory; `dead`: whoever has it open gets nothing from it any more.
pub(super) fn leave(dir: &Path, dead: bool) -> Result<()> {
    let shown = dir.display();
    let cannot = |error: Errno| {
        let error = Error::os(error, format!("cannot unmount {shown}"));
        if error.kind() == Kind::Busy { error.hint(BUSY) } else { error }
    };
    let fuse = mntns::kind_at(dir).is_some_and(|kind| kind.starts_with("fuse"));
    if rustix::process::geteuid().is_root() || !fuse {
        let lazily = if dead { UnmountFlags::DETACH } else { UnmountFlags::empty() };
        return unmount(dir, UnmountFlags::NOFOLLOW | lazily).map_err(cannot);
    }
    let Some(fusermount) = program::fusermount() else {
        return Err(Error::new(Kind::Unavailable, "fusermount3, by which users unmount, is not installed")
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
    let busy = said.contains("busy");
    let error =
        Error::new(if busy { Kind::Busy } else { Kind::Denied }, format!("cannot unmount {shown}: {said}"));
    Err(if busy { error.hint(BUSY) } else { error })
}

const BUSY: &str = "see who uses it with 'fuser -vm', and end that";
