// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The lab's directory for downloads.
//!
//! Knows nothing of the directory's contents.

use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use loopbench::sh;

/// Environment variable that names the directory.
const VARIABLE: &str = "LOOPLAB_CACHE";

/// A set-up takes about two minutes.
const LOCK_LIMIT: Duration = Duration::from_secs(1200);

/// Directories that a guest replaces: their contents are not visible in the VM.
const HIDDEN_IN_GUEST: [&str; 7] = ["/run", "/dev", "/proc", "/sys", "/var/cache", "/var/log", "/var/tmp"];

/// `$LOOPLAB_CACHE`, else `$XDG_CACHE_HOME/loopengine-lab`, else `~/.cache/loopengine-lab`; created
/// if missing.
pub(crate) fn directory() -> Result<PathBuf> {
    let from =
        |variable: &str| std::env::var_os(variable).filter(|value| !value.is_empty()).map(PathBuf::from);
    let wanted = from(VARIABLE)
        .or_else(|| from("XDG_CACHE_HOME").map(|base| base.join("loopengine-lab")))
        .or_else(|| from("HOME").map(|home| home.join(".cache/loopengine-lab")))
        .with_context(|| format!("no directory for the lab's files: set {VARIABLE}"))?;
    std::fs::create_dir_all(&wanted)
        .with_context(|| format!("cannot make {}: set {VARIABLE} to another directory", wanted.display()))?;
    let directory = wanted.canonicalize().with_context(|| format!("cannot open {}", wanted.display()))?;
    if hidden_in_guest(&directory) {
        bail!("{} is not visible inside a VM: set {VARIABLE} to another directory", directory.display());
    }
    Ok(directory)
}

/// Takes the lock for changes of `cache`; dropping the value releases it.
pub(crate) fn lock(cache: &Path) -> Result<File> {
    let path = cache.join("lock");
    let file = File::create(&path).with_context(|| format!("cannot write {}", path.display()))?;
    sh::wait_for("waiting for another set-up of the lab", LOCK_LIMIT, || match file.try_lock() {
        Ok(()) => Ok(Some(())),
        Err(TryLockError::WouldBlock) => Ok(None),
        Err(TryLockError::Error(error)) => {
            Err(error).with_context(|| format!("cannot lock {}", path.display()))
        }
    })?;
    Ok(file)
}

/// Whether `path` is not visible in a guest.
pub(crate) fn hidden_in_guest(path: &Path) -> bool {
    HIDDEN_IN_GUEST.iter().any(|hidden| path.starts_with(hidden))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_directories_that_the_guest_replaces() {
        assert!(hidden_in_guest(Path::new("/var/cache/x")));
        assert!(!hidden_in_guest(Path::new("/var/cached")));
        assert!(!hidden_in_guest(Path::new("/home/me/.cache/loopengine-lab")));
    }
}
