//! `loopengine recover`: a device that is stuck goes on with the image that it is given.

use std::path::{Path, PathBuf};

use crate::error::{Error, Kind, Result};
use crate::instance::Selector;
use crate::instance::spec::{AttachSpec, DEFAULT_INSTANCE, RecoverSpec};

use super::{attach, complete, daemon, detach, image, out, size};

/// Recover a device that is stuck, with an image that you name.
///
/// For a device that the daemon did not recover by itself when it was started: its image was moved, or its
/// state was not read ('loopengine list' shows why). Its users wait, and go on with this image. That it is
/// the right one is for you to know; the daemon checks only that it is large enough. Prints the path of the
/// device.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Device: a path that leads to it, NAME/loopN, or loopN of the instance 'default'.
    #[arg(add = complete::devices())]
    device: String,

    /// Image file or block device.
    #[arg(long, value_name = "PATH")]
    image: PathBuf,

    /// First byte of the image that the device shows [default: as it was attached, 0 if that is not known].
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    offset: Option<u64>,

    /// Bytes that the device shows at most if it is resized [default: as it was attached].
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    size_limit: Option<u64>,

    /// Go through the page cache [default: as it was attached].
    #[arg(long)]
    buffered: bool,
}

impl Args {
    pub(super) fn run(self, run_dir: &Path) -> Result<()> {
        let which = detach::device(self.device);
        let Selector::Device(device) = &which else { return Err(Error::new(Kind::Internal, "not a device")) };
        let device = device.clone();
        let known = daemon::ask(run_dir, async |client| client.devices(&which).await)?;
        let known = known.first().ok_or_else(|| Error::new(Kind::NotFound, format!("no device {device}")))?;
        let mut opened = AttachSpec { read_only: known.read_only, ..attach::plain(DEFAULT_INSTANCE) };
        let file = image::open(&self.image, &mut opened)?;
        let spec = RecoverSpec {
            device,
            path: opened.path,
            offset: self.offset,
            size_limit: self.size_limit,
            buffered: self.buffered.then_some(true),
        };
        let device = daemon::ask(run_dir, async |client| client.recover(&spec, file).await)?;
        out::print(&format!("{}\n", device.path)).map(drop)
    }
}
