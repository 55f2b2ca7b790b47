//! `loopengine create`: makes an image file.

use std::fs::{self, File, OpenOptions};
use std::io::ErrorKind;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use tokio::signal::unix::{SignalKind, signal};

use crate::control::reason;
use crate::error::{Error, Kind, Result};

use super::size;

/// One step of the preallocation, so that it can be watched and interrupted.
const STEP: u64 = 1 << 30;

/// Make an image file.
///
/// The file is sparse unless '--preallocate' is given, readable and writable by its owner only,
/// and must not exist yet. Nothing is left behind when it cannot be made.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// File to make.
    image: PathBuf,

    /// Its size: bytes, or a number and K, M, G or T.
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    size: u64,

    /// Reserve all space now. Writes then never fail for want of space, and are faster.
    #[arg(long)]
    preallocate: bool,
}

impl Args {
    pub(super) fn run(self) -> Result<()> {
        if self.size == 0 || !self.size.is_multiple_of(512) {
            let message = format!("the size {} is not a multiple of 512 above 0", self.size);
            return Err(Error::new(Kind::Invalid, message).hint("give another --size"));
        }
        let file = create(&self.image)?;
        let made = self.fill(file);
        if made.is_err() {
            let _ = fs::remove_file(&self.image);
        }
        made
    }

    fn fill(&self, file: File) -> Result<()> {
        let shown = self.image.display();
        file.set_len(self.size).map_err(|error| {
            let message = format!("cannot give {shown} a size of {} bytes", self.size);
            match error.kind() {
                ErrorKind::FileTooLarge => Error::os(error, message).with_kind(Kind::Invalid)
                    .hint("give a smaller --size, or use another file system"),
                _ => Error::os(error, message),
            }
        })?;
        if self.preallocate {
            preallocate(file, self.size, &self.image)?;
        }
        Ok(())
    }
}

fn create(path: &Path) -> Result<File> {
    let shown = path.display();
    let made = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
    made.map_err(|error| {
        let message = format!("cannot create {shown}: {}", reason(&error));
        match error.kind() {
            ErrorKind::AlreadyExists => Error::new(Kind::Exists, message)
                .hint("remove it first, or give another name"),
            ErrorKind::NotFound => Error::new(Kind::NotFound, message)
                .hint("make its directory first"),
            _ => Error::os(error, format!("cannot create {shown}")),
        }
    })
}

/// An image job: runs on the io_uring runtime, where allocation does not block the thread that
/// listens for Ctrl-C.
fn preallocate(file: File, size: u64, path: &Path) -> Result<()> {
    let shown = path.display();
    let cannot_start = |error| Error::os(error, "cannot start io_uring").hint("run 'loopengine doctor'");
    let runtime = tokio_uring::Runtime::new(tokio_uring::builder().entries(8)).map_err(cannot_start)?;
    runtime.block_on(async {
        let mut interrupt = signal(SignalKind::interrupt()).map_err(cannot_start)?;
        let mut terminate = signal(SignalKind::terminate()).map_err(cannot_start)?;
        let file = tokio_uring::fs::File::from_std(file);
        let outcome = tokio::select! {
            done = allocate(&file, size) => done.map_err(|error| match error.kind() {
                ErrorKind::Unsupported => {
                    let message = format!("the file system of {shown} cannot reserve space");
                    Error::new(Kind::Unsupported, message).hint("leave out --preallocate")
                }
                ErrorKind::StorageFull => {
                    let message = format!("no space for {} bytes of {shown}", size);
                    Error::new(Kind::Quota, message).hint("free some, or give a smaller --size")
                }
                _ => Error::os(error, format!("cannot reserve space for {shown}")),
            }),
            _ = interrupt.recv() => Err(Error::new(Kind::Io, "interrupted")),
            _ = terminate.recv() => Err(Error::new(Kind::Io, "interrupted")),
        };
        // An interrupted step still runs in the kernel; it holds the file until it ends.
        let _ = file.close().await;
        outcome
    })
}

async fn allocate(file: &tokio_uring::fs::File, size: u64) -> std::io::Result<()> {
    let bar = ProgressBar::new(size);
    if let Ok(style) = ProgressStyle::with_template("{wide_bar} {bytes}/{total_bytes} {eta}") {
        bar.set_style(style);
    }
    bar.enable_steady_tick(Duration::from_millis(200));
    let mut at = 0;
    while at < size {
        let len = STEP.min(size - at);
        file.fallocate(at, len, 0).await?;
        at += len;
        bar.set_position(at);
    }
    file.sync_all().await?;
    bar.finish_and_clear();
    Ok(())
}
