//! `loopengine find`: which devices an image has.

use std::path::{Path, PathBuf};

use super::list::{Image, gather, show};
use crate::error::{Error, Kind, Result};

/// Find the devices of an image.
///
/// Of instances and of private pools; a plain user finds those of his own pools. The image is known by what it
/// is, whatever name it has. Exits with 3 if it has no device.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Image file or block device.
    image: PathBuf,

    /// Print JSON; loopengine-json(7) describes it.
    #[arg(long)]
    json: bool,
}

impl Args {
    pub(super) fn run(self, run_dir: &Path) -> Result<()> {
        let found = gather(run_dir, Some(&Image::named(&self.image)?))?;
        if found.devices.is_empty() && found.pools.is_empty() {
            let shown = self.image.display();
            let (what, hint) = match self.image.exists() {
                true => (format!("{shown} has no device"), "'loopengine list --all' shows all devices"),
                false => (format!("there is no {shown}, and no device had it"), "give the path of an image"),
            };
            let whose = if rustix::process::geteuid().is_root() { "" } else { " that this user may see" };
            return Err(Error::new(Kind::NotFound, format!("{what}{whose}")).hint(hint));
        }
        show(&found, self.json)
    }
}
