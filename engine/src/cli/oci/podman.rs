// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `loopengine podman-setup`: sets up a pool for Podman in one step.
//!
//! Knows Podman's directories and options. The neighbouring files know their contents.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::mount::{UnmountFlags, unmount};
use serde::Serialize;

use super::cdi::{CDI_DIR, CDI_KIND, of_pool};
use super::pool_dir::PoolDir;
use super::profile::{OTHER_BASE, PrintProfile, read};
use crate::cli::instance_mount::mount_for_containers;
use crate::cli::pool_options::PoolOptions;
use crate::cli::run::parse_file_system;
use crate::cli::{complete, daemon, number, out};
use crate::control::PrivateClient;
use crate::error::{Error, Kind, Result};
use crate::instance::MAX_DEVICES;
use crate::private::PoolInfo;
use crate::sys::mntns;

/// Directory of mounted pools and their seccomp profiles.
const POOLS: &str = "/run/loopengine-pools";
/// Default seccomp profiles of Podman.
const PROFILES: [&str; 2] = ["/etc/containers/seccomp.json", "/usr/share/containers/seccomp.json"];
/// Time for a pool to end after its unmount.
const GONE: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_millis(20);

/// Create a pool for Podman, and print the options for 'podman run'.
///
/// Mounts the pool at /run/loopengine-pools/POOL unless it exists, writes a CDI specification to
/// /run/cdi, and adds rules to a copy of Podman's seccomp profile. Prints the options for 'podman
/// run' on one line. Only one container can use a pool at a time. Run this again after a restart of
/// the daemon. Needs root.
#[derive(Debug, clap::Args)]
pub(in crate::cli) struct PodmanArgs {
    /// Name of the pool.
    #[arg(add = complete::pools())]
    pool: String,

    /// Maximum number of devices [default: 8].
    #[arg(long, value_name = "N", value_parser = number::within(1..=MAX_DEVICES))]
    max: Option<u32>,

    /// File systems that the kernel mounts for the container: ext2, ext3, ext4, xfs, squashfs,
    /// erofs, vfat [default: none].
    #[arg(long, value_name = "FS,…", value_delimiter = ',', value_parser = parse_file_system)]
    mount: Vec<String>,

    /// Seccomp profile to extend [default: Podman's own].
    #[arg(long, value_name = "FILE")]
    base: Option<PathBuf>,

    /// Remove the pool and its files. Its container must have ended.
    #[arg(long, conflicts_with_all = ["max", "mount", "base"])]
    remove: bool,
}

impl PodmanArgs {
    pub(in crate::cli) fn run(self, run_dir: &Path) -> Result<()> {
        if !rustix::process::geteuid().is_root() {
            return Err(Error::new(Kind::Denied, "only root can create pools for containers")
                .hint("run this as root, or use 'loopengine run -- CMD', which needs no root"));
        }
        // Check the name before it becomes part of a path.
        crate::instance::check_instance_name(&self.pool)?;
        match self.remove {
            true => self.remove_pool(run_dir),
            false => self.set_up(run_dir),
        }
    }

    fn home(&self) -> PathBuf {
        Path::new(POOLS).join(&self.pool)
    }

    fn profile(&self) -> PathBuf {
        Path::new(POOLS).join(format!("{}.seccomp.json", self.pool))
    }

    fn description(&self) -> PathBuf {
        Path::new(CDI_DIR).join(format!("loopengine-{}.json", self.pool))
    }

    fn set_up(&self, run_dir: &Path) -> Result<()> {
        let base = read(&self.base()?, OTHER_BASE)?;
        let created = match find(run_dir, &self.pool)? {
            Some(pool) => self.check_options(&pool).map(|()| false)?,
            None => self.make(run_dir).map(|()| true)?,
        };
        let described = self.describe(run_dir, base);
        if described.is_err() && created {
            let _ = self.unmount();
        }
        described?;
        let profile = self.profile();
        out::print(&format!(
            "--device {CDI_KIND}={} --security-opt seccomp={} --security-opt unmask=/sys/dev/block\n",
            self.pool,
            profile.display()
        ))
        .map(drop)
    }

    fn base(&self) -> Result<PathBuf> {
        let found = PROFILES.into_iter().map(PathBuf::from).find(|profile| profile.exists());
        self.base.clone().or(found).ok_or_else(|| {
            Error::new(Kind::NotFound, format!("there is no {}: Podman is not installed", PROFILES[1]))
                .hint("install Podman, or give its seccomp profile with --base")
        })
    }

    fn check_options(&self, pool: &PoolInfo) -> Result<()> {
        let wanted: BTreeSet<_> = self.mount.iter().collect();
        let mounting: BTreeSet<_> = pool.kernel_mounts.iter().collect();
        let other = match self.max {
            Some(max) if max != pool.max => Some(format!("has {} devices", pool.max)),
            _ if wanted.is_empty() || wanted == mounting => None,
            _ if mounting.is_empty() => Some("mounts nothing".to_owned()),
            _ => Some(format!("mounts {}", pool.kernel_mounts.join(","))),
        };
        other.map_or(Ok(()), |other| {
            Err(Error::new(Kind::Exists, format!("the pool {} already exists and {other}", self.pool))
                .hint(format!("remove it with 'loopengine podman-setup {} --remove'", self.pool)))
        })
    }

    fn make(&self, run_dir: &Path) -> Result<()> {
        let home = self.home();
        let cannot = |error: std::io::Error| Error::os(error, format!("cannot create {}", home.display()));
        // Unmounts the directory of a pool that ended with its daemon.
        self.unmount()?;
        fs::DirBuilder::new().recursive(true).mode(0o755).create(&home).map_err(cannot)?;
        let options = PoolOptions { name: Some(self.pool.clone()), max: self.max, ..PoolOptions::default() };
        mount_for_containers(run_dir, &options, &self.mount, &home)
            .map(drop)
            .inspect_err(|_| drop(fs::remove_dir(&home)))
    }

    fn describe(&self, run_dir: &Path, base: serde_json::Value) -> Result<()> {
        let dir = PoolDir::find(run_dir, &self.pool)?;
        let profile = PrintProfile {
            base: None,
            listener: None,
            metadata: Some(format!("pool={}", dir.name)),
            mount: dir.mounting,
            wait_killable: false,
        };
        write(&self.profile(), &profile.make(Some(base), run_dir)?)?;
        write(&self.description(), &of_pool(&dir)?)
    }

    fn remove_pool(&self, run_dir: &Path) -> Result<()> {
        let there = find(run_dir, &self.pool).unwrap_or_default().is_some();
        let files = [self.description(), self.profile()];
        if !there && !files.iter().any(|file| file.exists()) {
            return Err(Error::new(Kind::NotFound, format!("there is no private pool {:?}", self.pool))
                .hint("'loopengine list --all' lists all pools"));
        }
        self.unmount()?;
        let deadline = Instant::now() + GONE;
        while there && find(run_dir, &self.pool).is_ok_and(|pool| pool.is_some()) {
            if Instant::now() > deadline {
                let message = format!("the pool {} is still in use, and ends with its last user", self.pool);
                return Err(
                    Error::new(Kind::Busy, message).hint("end its container, and unmount its other mounts")
                );
            }
            std::thread::sleep(PAUSE);
        }
        files.iter().for_each(|file| drop(fs::remove_file(file)));
        let _ = fs::remove_dir(self.home());
        let _ = fs::remove_dir(POOLS);
        Ok(())
    }

    /// Unmounts everything at and below the directory of the pool.
    fn unmount(&self) -> Result<()> {
        let home = self.home();
        let mut targets = mntns::targets();
        targets.retain(|target| target.starts_with(&home));
        // Deepest first: inner mounts may be older.
        targets.sort_by_key(|target| std::cmp::Reverse(target.components().count()));
        for target in targets {
            unmount(&target, UnmountFlags::NOFOLLOW)
                .map_err(|error| Error::os(error, format!("cannot unmount {}", target.display())))?;
        }
        Ok(())
    }
}

fn find(run_dir: &Path, name: &str) -> Result<Option<PoolInfo>> {
    let pools = daemon::runtime()?.block_on(async { PrivateClient::connect(run_dir).await?.list().await })?;
    Ok(pools.into_iter().find(|pool| pool.name == name))
}

/// Replaces a file atomically: Podman may be reading it.
fn write(path: &Path, value: &impl Serialize) -> Result<()> {
    let cannot = |error: std::io::Error| Error::os(error, format!("cannot write {}", path.display()));
    let text = serde_json::to_vec_pretty(value).map_err(|error| cannot(error.into()))?;
    let temporary = path.with_extension("new");
    path.parent().map_or(Ok(()), fs::create_dir_all).map_err(cannot)?;
    fs::write(&temporary, text).and_then(|()| fs::rename(&temporary, path)).map_err(cannot)
}
