//! `loopengine mount --open`: what a desktop does when a disk image is opened.
//!
//! Knows where the directory is, and what shows it. What is mounted, and how, is the same as without.

use std::fs;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::{Args, image};
use crate::error::{Error, Kind, Result};

/// Below the directory of the user's session.
const HOME: &str = "loopengine-mounts";
const SHOWS: &str = "xdg-open";
/// How long that may take before it is left to itself.
const SHOWN_MAX: Duration = Duration::from_secs(5);

/// Mounts all that is in the image, and has it shown.
pub(super) fn mount(args: Args, run_dir: &Path) -> Result<()> {
    let home = home().ok_or_else(|| {
        Error::new(Kind::Unavailable, "no session of a user is running here: XDG_RUNTIME_DIR is not set")
            .hint("name a directory instead of --open")
    })?;
    let name = args
        .image
        .file_name()
        .ok_or_else(|| Error::new(Kind::Invalid, format!("{} is no file", args.image.display())))?;
    let dir = home.join(name);
    let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(&dir);
    made.map_err(|error| Error::os(error, format!("cannot make {}", dir.display())))?;
    let all = image::partitions(&args.image).is_ok();
    let args = Args { open: false, all, dir: Some(dir.clone()), ..args };
    args.run(run_dir).inspect_err(|_| forget(&dir))?;
    println!("{}", dir.display());
    match Command::new(SHOWS).arg(&dir).stdin(Stdio::null()).stdout(Stdio::null()).spawn() {
        Ok(mut shows) => {
            // Where there is no desktop it may be a program that stays.
            let until = Instant::now() + SHOWN_MAX;
            while matches!(shows.try_wait(), Ok(None)) && Instant::now() < until {
                std::thread::sleep(Duration::from_millis(20));
            }
        }
        Err(error) => eprintln!("loopengine: cannot run {SHOWS}: {error}"),
    }
    Ok(())
}

/// Removes a directory that `mount` has made, if nothing is in it.
pub(super) fn forget(dir: &Path) {
    if home().is_some_and(|home| dir.parent() == Some(&home)) {
        // One that is in use stays.
        let _ = fs::remove_dir(dir);
    }
}

fn home() -> Option<PathBuf> {
    let session = std::env::var_os("XDG_RUNTIME_DIR").filter(|dir| !dir.is_empty())?;
    Some(PathBuf::from(session).join(HOME))
}
