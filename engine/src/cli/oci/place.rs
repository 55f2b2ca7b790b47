//! A pool for containers, as what makes containers has to know it: directories to be bound, device
//! numbers to be allowed, a hook.
//!
//! Knows where `instance mount --container` puts what. Does not know in which format it is written down.

use std::path::{Path, PathBuf};

use rustix::fs::{major, minor};

use crate::cli::daemon;
use crate::config::RUN_DIR;
use crate::control::PrivateClient;
use crate::error::{Error, Kind, Result};
use crate::private::{DEV, LOOPFS, PLACES, PoolInfo};
use crate::sys::mntns::mounted;

/// See the module.
#[derive(Debug)]
pub(super) struct Place {
    pub name: String,
    /// Devices.
    pub max: u32,
    /// Numbers that none of them has.
    pub reserved: Vec<u32>,
    /// The kernel mounts for its containers.
    pub mounting: bool,
    /// Device numbers of the pool's disks, major and minor.
    pub numbers: Vec<(u32, u32)>,
    /// What is bound: from, to, and with which options.
    pub mounts: Vec<(String, String, Vec<&'static str>)>,
    /// This program.
    pub program: String,
    /// The daemon's run directory, if it is not the usual one.
    pub run_dir: Option<String>,
}

impl Place {
    /// Looks a pool up.
    pub fn find(run_dir: &Path, name: &str) -> Result<Place> {
        let pools =
            daemon::runtime()?.block_on(async { PrivateClient::connect(run_dir).await?.list().await })?;
        let pool = pools.into_iter().find(|pool| pool.name == name);
        let pool = pool.ok_or_else(|| {
            Error::new(Kind::NotFound, format!("there is no private pool {name:?}"))
                .hint(format!("make it with 'loopengine instance mount --container --name {name} DIR'"))
        })?;
        let program =
            std::env::current_exe().map_err(|error| Error::os(error, "cannot find this program"))?;
        let run_dir = (run_dir != Path::new(RUN_DIR)).then(|| text(run_dir)).transpose()?;
        Ok(Place { run_dir, ..Place::of(&pool, mounted("fuse.loop", name), &program)? })
    }

    fn of(pool: &PoolInfo, seen: Vec<PathBuf>, program: &Path) -> Result<Place> {
        if pool.device_numbers.is_empty() {
            return Err(Error::new(
                Kind::Invalid,
                format!("private pool {} is not for containers", pool.name),
            )
            .hint("make one with 'loopengine instance mount --container'"));
        }
        // It may be seen in a container, too; what is bound is where it was mounted.
        let home =
            seen.into_iter().filter(|at| at.ends_with(DEV)).find_map(|at| at.parent().map(Path::to_owned));
        let Some(home) = home else {
            let message = format!("private pool {} is not mounted here", pool.name);
            return Err(Error::new(Kind::NotFound, message).hint("run this where it was mounted"));
        };
        let dev = (DEV, format!("/dev/{LOOPFS}"), vec!["bind", "nosuid", "noexec"]);
        let sys = PLACES
            .map(|(part, place)| (part, place.to_owned(), vec!["bind", "ro", "nosuid", "noexec", "nodev"]));
        let mounts = std::iter::once(dev)
            .chain(sys)
            .map(|(part, to, options)| Ok((text(&home.join(part))?, to, options)));
        Ok(Place {
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

    /// The words of the hook that makes the names in /dev; `nodes` are there already.
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
        Error::new(Kind::Invalid, format!("'{}' cannot be written as JSON", path.display()))
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

    pub fn place() -> Place {
        let seen = vec!["/srv/c/rootfs/dev/loopfs".into(), "/srv/ci/dev".into()];
        Place::of(&info(), seen, Path::new("/usr/bin/loopengine")).unwrap()
    }

    #[test]
    fn where_it_was_mounted() {
        let place = place();
        assert_eq!(place.numbers, [(259, 7), (259, 300)]);
        let bound: Vec<_> = place.mounts.iter().map(|(from, to, _)| (from.as_str(), to.as_str())).collect();
        assert_eq!(bound[0], ("/srv/ci/dev", "/dev/loopfs"));
        assert_eq!(bound[2], ("/srv/ci/dev-block", "/sys/dev/block"));
        assert!(!place.mounts[0].2.contains(&"nodev") && place.mounts[1].2.contains(&"ro"));
        let program = Path::new("/bin/x");
        assert_eq!(
            Place::of(&info(), vec!["/dev/loopfs".into()], program).unwrap_err().kind(),
            Kind::NotFound
        );
        let other = PoolInfo { device_numbers: Vec::new(), ..info() };
        assert_eq!(Place::of(&other, vec!["/srv/ci/dev".into()], program).unwrap_err().kind(), Kind::Invalid);
    }
}
