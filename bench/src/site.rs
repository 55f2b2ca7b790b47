// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The environment of a run: a store for images, a scratch directory, and targets.
//!
//! Dropping it tears everything down in reverse order.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::kernel_module::{Module, NULL_BLK};
use crate::outcome::{TargetInfo, Warning};
use crate::store::{DEFAULTS, Fs, Store};
use crate::target::{Environment, LIMIT, Loops, Opened, Target};
use crate::{check, sh};

/// Size of the store for the images of all targets; memory is allocated on write.
const STORE_MB: u32 = 6144;
const NO_STORE: &str = "cannot make a file system in memory: give a directory with --images";

/// A store and a scratch directory.
pub struct Site {
    // Fields drop in this order.
    _store: Option<Store>,
    _images: Option<tempfile::TempDir>,
    pub place: Environment,
    home: tempfile::TempDir,
}

impl Site {
    /// Puts images below `images`; without it, on a file system in memory with these mount options.
    pub fn new(images: Option<&Path>, store_options: &str, image_mb: u32, many_mb: u32) -> Result<Site> {
        let home = tempfile::Builder::new().prefix("loopbench-").tempdir_in("/run").or_else(|_| {
            tempfile::Builder::new().prefix("loopbench-").tempdir().context("no directory to work in")
        })?;
        let (store, kept, path) = match images {
            Some(directory) => {
                let kept = tempfile::Builder::new()
                    .prefix("loopbench-")
                    .tempdir_in(directory)
                    .with_context(|| format!("cannot put images into {}", directory.display()))?;
                let path = kept.path().to_owned();
                (None, Some(kept), path)
            }
            None => {
                let path = home.path().join("store");
                let store = Store::new(Fs::Xfs, STORE_MB, store_options, &path).context(NO_STORE)?;
                (Some(store), None, path)
            }
        };
        let place = Environment {
            images: path,
            scratch: home.path().to_owned(),
            image_mb,
            many_mb,
            loops: Loops::default(),
        };
        Ok(Site { _store: store, _images: kept, place, home })
    }

    /// Directory for everything but images.
    pub fn scratch(&self) -> PathBuf {
        self.home.path().to_owned()
    }
}

/// Describes the directory of the images and its file system, or says why there can be none.
pub fn describe(images: Option<&Path>, store_options: &str) -> Result<String> {
    let Some(directory) = images else {
        NULL_BLK.check().context(NO_STORE)?;
        let mounted = match store_options {
            DEFAULTS => String::new(),
            options => format!(", mounted with {options}"),
        };
        return Ok(format!("XFS on a memory-backed null_blk device{mounted}"));
    };
    if !directory.is_dir() {
        bail!("there is no directory {}: give another with --images", directory.display());
    }
    let mut findmnt = Command::new(sh::which("findmnt")?);
    findmnt.args(["--noheadings", "--first-only", "--output", "FSTYPE,SOURCE", "--target"]).arg(directory);
    let said = sh::capture(&mut findmnt, LIMIT)
        .with_context(|| format!("cannot determine the file system of {}", directory.display()))?;
    let said: Vec<&str> = said.split_whitespace().collect();
    Ok(format!("{} ({})", directory.display(), said.join(" on ")))
}

/// A target and its state.
pub struct Set {
    target: Box<dyn Target>,
    pub info: TargetInfo,
    /// `None` if it is unavailable; `info` says why.
    pub opened: Option<Opened>,
}

impl Set {
    /// Sets `target` up, or records why that fails.
    pub fn up(mut target: Box<dyn Target>, place: &Environment) -> Result<(Set, Vec<Warning>)> {
        let (name, about) = (target.name(), target.about());
        let version = target.version();
        let opened = match &version {
            Ok(_) => target.module().map_or(Ok(()), Module::load).and_then(|()| target.set_up(place)),
            Err(error) => Err(anyhow::anyhow!("{error:#}")),
        };
        let unavailable = opened.as_ref().err().map(|error| format!("{error:#}"));
        let info = TargetInfo { name, about, version: version.unwrap_or_default(), unavailable };
        let mut set = Set { target, info, opened: opened.ok() };
        let warnings =
            set.opened.as_ref().map_or_else(Vec::new, |opened| check::target(&set.info.name, opened));
        if set.opened.is_none() {
            set.down();
        }
        // Not earlier: dropping `set` tears the target down.
        sh::interrupted()?;
        Ok((set, warnings))
    }

    /// See `Target::punts`.
    pub fn punts(&self) -> Option<u64> {
        self.target.punts()
    }

    fn down(&mut self) {
        if let Err(error) = sh::uninterrupted(|| self.target.tear_down()) {
            eprintln!("{}: {error:#}", self.info.name);
        }
    }
}

impl Drop for Set {
    fn drop(&mut self) {
        if self.opened.is_some() {
            self.down();
        }
    }
}
