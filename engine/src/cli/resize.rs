//! `loopengine resize`: the image has another size now.

use std::path::Path;

use crate::error::{Error, Kind, Result};
use crate::instance::Selector;

use super::{daemon, detach, out};

/// Adapt a device to the present size of its image.
///
/// Grow the image first, then the device, then the file system on it; shrink the other way round.
/// Prints the new size in bytes.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Device: a path that leads to it, NAME/loopN, or loopN of the instance 'default'.
    device: String,
}

impl Args {
    pub(super) fn run(self, run_dir: &Path) -> Result<()> {
        let Selector::Device(name) = detach::device(self.device) else {
            return Err(Error::new(Kind::Internal, "not a device"));
        };
        let device = daemon::ask(run_dir, async |client| client.resize(&name).await)?;
        out::print(&format!("{}\n", device.size)).map(drop)
    }
}
