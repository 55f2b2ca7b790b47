// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `loopengine recover`: recover a stuck device with a given image.

use std::path::{Path, PathBuf};

use crate::error::{Error, Kind, Result};
use crate::instance::Selector;
use crate::instance::spec::{AttachSpec, RecoverSpec};

use super::{complete, daemon, detach, image, out, size};

/// Recover a stuck device with a given image.
///
/// A device is stuck if the daemon could not recover it at its start: the image was moved, or the
/// state file was not readable. 'loopengine list' shows the reason. I/O to the device waits, and
/// continues on the given image. The daemon checks only that the image is large enough; make sure
/// that it is the right image. Prints the path of the device.
#[derive(Debug, clap::Args)]
pub(super) struct RecoverArgs {
    /// Device: a path, NAME/loopN, or loopN of the instance 'default'.
    #[arg(add = complete::devices())]
    device: String,

    /// Image file or block device.
    #[arg(long, value_name = "PATH")]
    image: PathBuf,

    /// First byte of the image [default: the recorded offset, or 0].
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    offset: Option<u64>,

    /// Size limit for a later resize [default: the recorded limit].
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    size_limit: Option<u64>,

    /// Read and write the image through the page cache [default: as recorded].
    #[arg(long)]
    buffered: bool,
}

impl RecoverArgs {
    pub(super) fn run(self, run_dir: &Path) -> Result<()> {
        let which = detach::device(self.device);
        let Selector::Device(device) = &which else { return Err(Error::new(Kind::Internal, "not a device")) };
        let device = device.clone();
        let known = daemon::ask(run_dir, async |client| client.devices(&which).await)?;
        let known = known.first().ok_or_else(|| Error::new(Kind::NotFound, format!("no device {device}")))?;
        let mut opened = AttachSpec { read_only: known.read_only, ..AttachSpec::default() };
        let file = image::open(&self.image, &mut opened).map_err(|error| match error.kind() {
            Kind::NotFound => error.hint("give the image that the device had"),
            _ => error,
        })?;
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
