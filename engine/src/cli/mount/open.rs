// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `loopengine mount --open`: opens an image as a desktop does.
//!
//! Knows the directory and the program that opens it. Mounts as without the option.

use std::fs;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::{MountArgs, image};
use crate::cli::out;
use crate::error::{Error, Kind, Result};

/// Directory below the user's session directory.
const HOME: &str = "loopengine-mounts";
const OPENER: &str = "xdg-open";
/// Time to wait for the program.
const OPEN_MAX: Duration = Duration::from_secs(5);

/// Mounts all partitions of the image and opens the directory.
pub(super) fn mount(args: MountArgs, run_dir: &Path) -> Result<()> {
    let home = home().ok_or_else(|| {
        Error::new(Kind::Unavailable, "there is no user session: XDG_RUNTIME_DIR is not set")
            .hint("give a directory instead of --open")
    })?;
    let name = args
        .image
        .file_name()
        .ok_or_else(|| Error::new(Kind::Invalid, format!("{} is not a file", args.image.display())))?;
    let dir = home.join(name);
    let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(&dir);
    made.map_err(|error| Error::os(error, format!("cannot create {}", dir.display())))?;
    let all = image::partitions(&args.image).is_ok();
    let args = MountArgs { open: false, all, dir: Some(dir.clone()), ..args };
    args.run(run_dir).inspect_err(|_| remove_dir(&dir))?;
    out::print(&format!("{}\n", dir.display()))?;
    match Command::new(OPENER).arg(&dir).stdin(Stdio::null()).stdout(Stdio::null()).spawn() {
        Ok(mut opener) => {
            // Without a desktop, the program may stay in the foreground.
            let until = Instant::now() + OPEN_MAX;
            while matches!(opener.try_wait(), Ok(None)) && Instant::now() < until {
                std::thread::sleep(Duration::from_millis(20));
            }
        }
        Err(error) => out::message(format_args!("cannot run {OPENER}: {error}")),
    }
    Ok(())
}

/// Removes a directory that `mount` created, if it is empty.
pub(super) fn remove_dir(dir: &Path) {
    if home().is_some_and(|home| dir.parent() == Some(&home)) {
        // A directory in use stays.
        let _ = fs::remove_dir(dir);
    }
}

fn home() -> Option<PathBuf> {
    let session = std::env::var_os("XDG_RUNTIME_DIR").filter(|dir| !dir.is_empty())?;
    Some(PathBuf::from(session).join(HOME))
}
