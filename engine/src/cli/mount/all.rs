// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `loopengine mount --all`: mounts every partition of an image in a directory of its own.
//!
//! Knows which partitions to mount and where. Mounts each as if it had been selected.

use std::fs;
use std::path::{Path, PathBuf};

use super::{MountArgs, directory, image};
use crate::cli::out;
use crate::error::{Error, Kind, Result};

/// Mounts partition N on DIR/N. Continues after a failure.
pub(super) fn mount(args: &MountArgs, dir: &Path, run_dir: &Path) -> Result<()> {
    let shown = args.image.display();
    let (table, read_only) = (image::partitions(&args.image)?, args.read_only);
    let dir = directory(dir)?;
    let (mut mounted, mut failed) = (0, None);
    for (number, kind) in table {
        match kind.filter(|kind| image::is_mountable(kind)) {
            None => {
                let kind = kind.unwrap_or("no known file system");
                out::message(format_args!(
                    "partition {number} of {shown} is not mounted: it contains {kind}"
                ));
            }
            Some(_) => match one(args, run_dir, number, read_only, &dir.join(number.to_string())) {
                Ok(()) => mounted += 1,
                Err(error) => {
                    let message = format!("partition {number}: {}", error.message());
                    let next = error.next_step().unwrap_or_default();
                    let error = Error::new(error.kind(), message);
                    let error = if next.is_empty() { error } else { error.hint(next) };
                    if let Some(before) = failed.replace(error) {
                        out::message(before);
                    }
                }
            },
        }
    }
    match failed {
        Some(error) => Err(error),
        None if mounted == 0 => {
            let message = format!("no partition of {shown} has a mountable file system");
            Err(Error::new(Kind::NotFound, message))
        }
        None => Ok(()),
    }
}

fn one(args: &MountArgs, run_dir: &Path, number: u32, read_only: bool, dir: &Path) -> Result<()> {
    let part = image::PartitionSpec { number: Some(number), offset: 0, size_limit: 0 };
    let image = image::inspect(&args.image, &part, read_only)?;
    let made = match fs::create_dir(dir) {
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => false,
        done => {
            done.map_err(|error| Error::os(error, format!("cannot create {}", dir.display())))?;
            true
        }
    };
    args.mount(run_dir, image, dir).inspect_err(|_| {
        if made {
            // Ignore a failure: the user gets the first error.
            let _ = fs::remove_dir(dir);
        }
    })
}

/// The directories in `dir` that `mount` may have created.
pub(super) fn directories(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).filter(|dir| is_of_partition(dir)).collect()
}

/// Whether the last part of a path is a number.
pub(super) fn is_of_partition(dir: &Path) -> bool {
    let name = dir.file_name().and_then(|name| name.to_str());
    name.is_some_and(|name| name.parse().is_ok_and(|number: u32| number.to_string() == name))
}
