// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The directory of a pool for containers: bind mounts, device numbers and a hook.
//!
//! Knows the layout that `instance mount --container` creates. Does not know output formats.

use std::path::{Path, PathBuf};

use rustix::fs::{major, minor};

use crate::cli::daemon;
use crate::config::RUN_DIR;
use crate::control::PrivateClient;
use crate::error::{Error, Kind, Result};
use crate::private::{DEV, LOOPFS, PoolInfo, SYSFS_DIRS};
use crate::sys::mntns::mounted;

/// A pool for containers and its directory.
#[derive(Debug)]
pub(super) struct PoolDir {
    pub name: String,
    /// Maximum number of devices.
    pub max: u32,
    /// Device numbers that the pool omits.
    pub reserved: Vec<u32>,
    /// True if the kernel mounts for its containers.
    pub mounting: bool,
    /// Device numbers of the pool's disks, major and minor.
    pub numbers: Vec<(u32, u32)>,
    /// Bind mounts: source, target and options.
    pub mounts: Vec<(String, String, Vec<&'static str>)>,
    /// Path of this program.
    pub program: String,
    /// Run directory of the daemon, if it is not the default.
    pub run_dir: Option<String>,
}

impl PoolDir {
    /// Finds a pool by name.
    pub fn find(run_dir: &Path, name: &str) -> Result<PoolDir> {
        let pools =
            daemon::runtime()?.block_on(async { PrivateClient::connect(run_dir).await?.list().await })?;
        let pool = pools.into_iter().find(|pool| pool.name == name);
        let pool = pool.ok_or_else(|| {
            Error::new(Kind::NotFound, format!("there is no private pool {name:?}"))
                .hint(format!("create it with 'loopengine instance mount --container --name {name} DIR'"))
        })?;
        let program = std::env::current_exe()
            .map_err(|error| Error::os(error, "cannot find the path of this program"))?;
        let run_dir = (run_dir != Path::new(RUN_DIR)).then(|| text(run_dir)).transpose()?;
        Ok(PoolDir { run_dir, ..PoolDir::of(&pool, mounted("fuse.loop", name), &program)? })
    }

    fn of(pool: &PoolInfo, seen: Vec<PathBuf>, program: &Path) -> Result<PoolDir> {
        if pool.device_numbers.is_empty() {
            return Err(Error::new(
                Kind::Invalid,
                format!("private pool {} is not for containers", pool.name),
            )
            .hint("create one with 'loopengine instance mount --container'"));
        }
        // It may be visible in a container too; bind mounts need the original mount point.
        let home =
            seen.into_iter().filter(|at| at.ends_with(DEV)).find_map(|at| at.parent().map(Path::to_owned));
        let Some(home) = home else {
            let message = format!("private pool {} is not mounted here", pool.name);
            return Err(Error::new(Kind::NotFound, message)
                .hint("run this in the mount namespace in which it was mounted"));
        };
        let dev = (DEV, format!("/dev/{LOOPFS}"), vec!["bind", "nosuid", "noexec"]);
        let sys = SYSFS_DIRS
            .map(|(part, dir)| (part, dir.to_owned(), vec!["bind", "ro", "nosuid", "noexec", "nodev"]));
        let mounts = std::iter::once(dev)
            .chain(sys)
            .map(|(part, to, options)| Ok((text(&home.join(part))?, to, options)));
        Ok(PoolDir {
            name: pool.name.clone(),
            max: pool.max,
            reserved: pool.reserved.clone(),
            mounting: !pool.kernel_mounts.is_empty(),
            numbers: pool.device_numbers.iter().map(|rdev| (major(*rdev), minor(*rdev))).collect(),
            mounts: mounts.collect::<Result<_>>()?,
            program: text(program)?,
            run_dir: None,
        })
    }

    /// The command line of the hook; the runtime creates `nodes` nodes itself.
    pub fn hook(&self, nodes: usize) -> Vec<String> {
        let mut words = vec!["loopengine".to_owned()];
        if let Some(run_dir) = &self.run_dir {
            words.extend(["--run-dir".to_owned(), run_dir.clone()]);
        }
        let (max, name) = (self.max.to_string(), self.name.as_str());
        words.extend(["oci", "hook", "--devices", &max, "--pool", name].map(str::to_owned));
        if nodes > 0 {
            words.extend(["--nodes".to_owned(), nodes.to_string()]);
        }
        if !self.reserved.is_empty() {
            let numbers: Vec<String> = self.reserved.iter().map(u32::to_string).collect();
            words.extend(["--reserved".to_owned(), numbers.join(",")]);
        }
        words
    }
}

fn text(path: &Path) -> Result<String> {
    path.to_str().map(str::to_owned).ok_or_else(|| {
        Error::new(Kind::Invalid, format!("'{}' is not valid in JSON", path.display()))
            .hint("use a directory whose name is UTF-8")
    })
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub fn info() -> PoolInfo {
        PoolInfo {
            name: "ci".to_owned(),
            uid: 0,
            max: 2,
            devices: 2,
            device_numbers: vec![rustix::fs::makedev(259, 7), rustix::fs::makedev(259, 300)],
            ..PoolInfo::default()
        }
    }

    pub fn pool_dir() -> PoolDir {
        let seen = vec!["/srv/c/rootfs/dev/loopfs".into(), "/srv/ci/dev".into()];
        PoolDir::of(&info(), seen, Path::new("/usr/bin/loopengine")).unwrap()
    }

    #[test]
    fn finds_the_original_mount_point() {
        let dir = pool_dir();
        assert_eq!(dir.numbers, [(259, 7), (259, 300)]);
        let bound: Vec<_> = dir.mounts.iter().map(|(from, to, _)| (from.as_str(), to.as_str())).collect();
        assert_eq!(bound[0], ("/srv/ci/dev", "/dev/loopfs"));
        assert_eq!(bound[2], ("/srv/ci/dev-block", "/sys/dev/block"));
        assert!(!dir.mounts[0].2.contains(&"nodev") && dir.mounts[1].2.contains(&"ro"));
        let program = Path::new("/bin/x");
        assert_eq!(
            PoolDir::of(&info(), vec!["/dev/loopfs".into()], program).unwrap_err().kind(),
            Kind::NotFound
        );
        let other = PoolInfo { device_numbers: Vec::new(), ..info() };
        assert_eq!(
            PoolDir::of(&other, vec!["/srv/ci/dev".into()], program).unwrap_err().kind(),
            Kind::Invalid
        );
    }
}
