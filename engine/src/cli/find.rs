// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `loopengine find`: list the devices of an image.

use std::path::{Path, PathBuf};

use super::list::{ImageQuery, ROOT_ONLY, gather, show};
use super::mount::FuseMount;
use crate::error::{Error, Kind, Result};

/// List the devices that are attached to an image.
///
/// Searches instances and private pools; for a plain user, only the pools of that user. Identifies
/// the image by device and inode, not by name. Exits with 3 if no device is attached to the image.
#[derive(Debug, clap::Args)]
pub(super) struct FindArgs {
    /// Image file or block device.
    image: PathBuf,

    /// Print JSON; loopengine-json(7) describes it.
    #[arg(long)]
    json: bool,
}

impl FindArgs {
    pub(super) fn run(self, run_dir: &Path) -> Result<()> {
        let found = gather(run_dir, Some(&ImageQuery::named(&self.image)?))?;
        if found.devices.is_empty() && found.pools.is_empty() {
            let shown = self.image.display();
            if let Some(mount) = FuseMount::of_image(&self.image) {
                let message = format!("{shown} has no device, but is mounted on {}", mount.dir.display());
                return Err(Error::new(Kind::NotFound, message)
                    .hint(format!("unmount it with 'loopengine umount {}'", mount.dir.display())));
            }
            let (what, hint) = match (self.image.exists(), rustix::process::geteuid().is_root()) {
                (true, true) => {
                    (format!("{shown} has no device"), "'loopengine list --all' lists all devices")
                }
                (true, false) => (format!("{shown} has no device that this user can see"), ROOT_ONLY),
                (false, _) => (
                    format!("{shown} does not exist, and no device is attached to it"),
                    "give the path of an image",
                ),
            };
            return Err(Error::new(Kind::NotFound, what).hint(hint));
        }
        show(&found, self.json)
    }
}
