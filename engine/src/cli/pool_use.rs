// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What uses an image outside instances, for messages: a device of a private pool, or a mount by a FUSE
//! driver without a device. Names the user, the process and the mount point, and how the use ends.

use std::path::Path;

use super::list::{ImageQuery, ListedPool, gather};
use super::mount::{FuseMount, MountPool};
use super::run::user_name;
use crate::error::{Error, Kind, Result};
use crate::private::PoolInfo;
use crate::sys::processes::{self, Process};

/// A use of an image, and the next step for who needs the image.
pub(super) struct PoolUse {
    pub(super) who: String,
    pub(super) next_step: String,
}

impl PoolUse {
    /// The first use that the caller can see.
    pub(super) fn of_image(image: &Path, run_dir: &Path) -> Result<Option<PoolUse>> {
        let found = gather(run_dir, Some(&ImageQuery::named(image)?))?;
        Ok(PoolUse::first(&found.pools, image))
    }

    /// The first of these pools, or else a mount without a device.
    pub(super) fn first(pools: &[ListedPool], image: &Path) -> Option<PoolUse> {
        pools.first().map(PoolUse::by).or_else(|| {
            let dir = FuseMount::of_image(image)?.dir;
            let who = format!("mounted already on {} by 'loopengine mount'", dir.display());
            Some(PoolUse { who, next_step: format!("unmount it with 'loopengine umount {}'", dir.display()) })
        })
    }

    /// By this pool, whose devices are all of one image.
    pub(super) fn by(pool: &ListedPool) -> PoolUse {
        let device = pool.devices.first();
        let number = device.map_or(0, |device| device.number);
        let process = pool.process.as_ref().or_else(|| device?.open_in.first());
        let user_of_it = process.cloned();
        let process = process.map_or(String::new(), |process| format!(", {process}"));
        let user = pool.user.clone().unwrap_or_else(|| pool.uid.to_string());
        let dirs = device.map_or(&[][..], |device| &device.mounted_on);
        let name = &pool.name;
        if MountPool::named(name).is_mount() {
            let place = dirs.first().map_or(String::new(), |dir| format!(" on {dir}"));
            let who = format!("mounted already{place} by 'loopengine mount' (user {user}{process})");
            let dir = dirs.first().map_or("DIR", String::as_str);
            return PoolUse { who, next_step: format!("unmount it with 'loopengine umount {dir}'") };
        }
        let next_step = match (dirs.first(), &user_of_it) {
            // Unbinding waits for the unmount.
            (Some(dir), Some(process)) => format!("unmount {dir} there, or end {process}"),
            (Some(dir), None) => format!("unmount {dir} there"),
            _ => format!("unbind it there: 'loopengine losetup --pool {name} --detach loop{number}'"),
        };
        let place = if dirs.is_empty() { String::new() } else { format!(", mounted on {}", dirs.join(", ")) };
        PoolUse {
            who: format!("loop{number} of private pool {name} (user {user}{process}{place})"),
            next_step,
        }
    }

    /// The owner of a pool: "user alice, pid 123 (bash)".
    pub(super) fn owner(pool: &PoolInfo) -> String {
        let user = user_name(pool.uid).unwrap_or_else(|| pool.uid.to_string());
        let of_start = |pid: &u32| processes::started(*pid) == pool.pid_start_ticks;
        let process = pool.pid.filter(of_start).and_then(Process::of).map(|process| format!(", {process}"));
        let container = pool.container.as_ref().map(|id| format!(", container {id}"));
        format!("user {user}{}", process.or(container).unwrap_or_default())
    }

    /// As the error for `image`, which is in use.
    pub(super) fn error(self, image: &Path) -> Error {
        Error::new(Kind::Busy, format!("{} is {}", image.display(), self.who)).hint(self.next_step)
    }
}
