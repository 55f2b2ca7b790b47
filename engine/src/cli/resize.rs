// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `loopengine resize`: resize a device, and its image.

use std::path::Path;

use crate::error::{Error, Kind, Result};
use crate::instance::Selector;
use crate::instance::spec::ResizeSpec;

use super::{complete, daemon, detach, out, size};

/// Resize a device, or a device and its image.
///
/// Without '--size', the device takes the current size of its image. With '--size', the image file
/// grows with the device; the new range stays sparse until it is written. Then grow the file system
/// on the device.
///
/// To shrink a device, shrink its file system first, then use '--shrink'. A device in use also
/// needs '--force'. Prints the new size in bytes.
#[derive(Debug, clap::Args)]
pub(super) struct ResizeArgs {
    /// Device: a path, NAME/loopN, or loopN of the instance 'default'. Or an image with one device.
    #[arg(value_name = "DEVICE|IMAGE", add = complete::devices())]
    device: String,

    /// New size of the device, for example 20G or 20GiB [default: the current size of its image].
    #[arg(long, value_name = "SIZE", value_parser = size::parse, add = complete::sizes())]
    size: Option<u64>,

    /// Allow the device to shrink. Data beyond the new end is lost.
    #[arg(long)]
    shrink: bool,

    /// With '--shrink': shrink a device that is in use.
    #[arg(short, long, requires = "shrink")]
    force: bool,

    /// Print the device as JSON; loopengine-json(7) describes it.
    #[arg(long)]
    json: bool,
}

impl ResizeArgs {
    pub(super) fn run(self, run_dir: &Path) -> Result<()> {
        let Selector::Device(device) = detach::target(self.device, run_dir)? else {
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
