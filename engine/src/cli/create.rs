// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `loopengine create`: create an image file, with a progress bar. An interrupt leaves no file.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use tokio::signal::unix::{SignalKind, signal};
use zlink::introspect::CustomType;

use crate::error::{Error, Kind, Result};
use crate::image;

use super::{out, size};

/// How long an interrupt waits for the creation of the file: its file system may not answer.
const CREATE_MAX: Duration = Duration::from_secs(2);

/// Create an image file.
///
/// The file is sparse unless '--preallocate' is given. Fails if the file exists. Leaves no file
/// behind when it fails.
#[derive(Debug, clap::Args)]
pub(super) struct CreateArgs {
    /// Path of the new image.
    image: PathBuf,

    /// Size in bytes, or with a unit: K, M, G, T (or KiB, MiB, …) are powers of 1024; KB, MB, … are
    /// powers of 1000.
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    size: u64,

    /// Allocate all blocks now. Writes are then faster and cannot fail with ENOSPC.
    #[arg(long)]
    preallocate: bool,

    /// Print the image as JSON; loopengine-json(7) describes it.
    #[arg(long)]
    json: bool,
}

/// A new image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, CustomType)]
#[serde(rename_all = "camelCase")]
#[zlink(rename_all = "camelCase")]
pub(super) struct ImageInfo {
    /// Path as given by the caller.
    path: String,
    /// Size in bytes.
    size_bytes: u64,
}

impl CreateArgs {
    pub(super) fn run(self) -> Result<()> {
        let cannot_start = |error| Error::os(error, "cannot start io_uring").hint("run 'loopengine doctor'");
        let runtime = tokio_uring::Runtime::new(tokio_uring::builder().entries(8)).map_err(cannot_start)?;
        let (path, bar) = (self.image.clone(), bar(self.size)?);
        let info = self.json.then(|| ImageInfo { path: path.display().to_string(), size_bytes: self.size });
        let stage = Arc::new(Mutex::new(Stage::Waiting));
        let ours = Arc::clone(&stage);
        let outcome = runtime.block_on(async {
            let mut interrupt = signal(SignalKind::interrupt()).map_err(cannot_start)?;
            let mut terminate = signal(SignalKind::terminate()).map_err(cannot_start)?;
            let job = tokio::task::spawn_blocking(move || {
                let stage = ours.lock().unwrap_or_else(PoisonError::into_inner);
                if *stage == Stage::Cancelled {
                    return Err(interrupted());
                }
                // Held until the file exists.
                let mut creating = Some(stage);
                image::create(&self.image, self.size, self.preallocate, |done, _| {
                    creating.take().into_iter().for_each(|mut stage| *stage = Stage::Created);
                    bar.set_position(done);
                })
            });
            let stopped = tokio::select! {
                done = job => return done.unwrap_or_else(|_| Err(interrupted())),
                _ = interrupt.recv() => interrupted(),
                _ = terminate.recv() => interrupted(),
            };
            // The job continues until the process ends, on an unlinked file.
            if cancel(&stage) {
                let _ = std::fs::remove_file(&path);
            }
            Err(stopped)
        });
        // Dropping the runtime would wait for an interrupted job.
        std::mem::forget(runtime);
        outcome?;
        info.map_or(Ok(()), |info| out::json(&info).map(drop))
    }
}

/// Whether the job may create the file, and has.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    Waiting,
    Created,
    Cancelled,
}

/// Keeps the job from creating the file; true: it has created it.
fn cancel(stage: &Mutex<Stage>) -> bool {
    let until = Instant::now() + CREATE_MAX;
    loop {
        match stage.try_lock() {
            Ok(stage) if *stage == Stage::Created => return true,
            Ok(mut stage) => *stage = Stage::Cancelled,
            // It is being created.
            Err(TryLockError::WouldBlock) if Instant::now() < until => {
                std::thread::sleep(Duration::from_millis(1));
                continue;
            }
            Err(_) => {}
        }
        return false;
    }
}

fn interrupted() -> Error {
    Error::new(Kind::Io, "interrupted: the image was not created")
}

/// A bar that is hidden without a terminal, and when it is dropped.
fn bar(size: u64) -> Result<ProgressBar> {
    let style = ProgressStyle::with_template("{wide_bar} {bytes}/{total_bytes} {eta}");
    let style = style.map_err(|error| Error::new(Kind::Internal, format!("bad template: {error}")))?;
    let bar = ProgressBar::new(size).with_style(style);
    bar.enable_steady_tick(Duration::from_millis(200));
    Ok(bar.with_finish(indicatif::ProgressFinish::AndClear))
}
