//! `loopengine resize`: the image has another size now, or is to have one.

use std::path::Path;

use crate::error::{Error, Kind, Result};
use crate::instance::Selector;
use crate::instance::spec::ResizeSpec;

use super::{complete, daemon, detach, out, size};

/// Adapt a device to the present size of its image, or give both another size.
///
/// With '--size' the image file grows with its device; the new part takes no space until it is written to.
/// Grow the file system on the device afterwards; to make the device smaller, shrink the file system
/// first. A device becomes smaller only with '--shrink', and while it is in use only with '--force', too.
/// Prints the new size in bytes.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Device: a path that leads to it, NAME/loopN, or loopN of the instance 'default'.
    #[arg(add = complete::devices())]
    device: String,

    /// Size of the device, with a unit as in 20G or 20GiB [default: what its image has now].
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    size: Option<u64>,

    /// Also if the device becomes smaller. What lies behind its new end is lost.
    #[arg(long)]
    shrink: bool,

    /// With '--shrink': also while the device is in use.
    #[arg(short, long, requires = "shrink")]
    force: bool,

    /// Print the device as JSON; loopengine-json(7) describes it.
    #[arg(long)]
    json: bool,
}

impl Args {
    pub(super) fn run(self, run_dir: &Path) -> Result<()> {
        let Selector::Device(device) = detach::device(self.device) else {
            return Err(Error::new(Kind::Internal, "not a device"));
        };
        let spec = ResizeSpec { device, size: self.size, shrink: self.shrink, force: self.force };
        let device = daemon::ask(run_dir, async |client| client.resize(&spec).await)?;
        if self.json {
            return out::json(&device).map(drop);
        }
        out::print(&format!("{}\n", device.size)).map(drop)
    }
}
