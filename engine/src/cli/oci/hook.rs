// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `oci hook`: a hook that links the loop devices in the /dev of a new container.
//!
//! Knows the container state that a hook receives, and links. The files of the container may be
//! hostile: the hook resolves no path outside of them, and changes only links in /dev. It passes
//! this /dev to the daemon, which keeps partition names in it. It also reports failures to the
//! daemon, because crun discards the stderr of a hook.

use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use rustix::mount::{UnmountFlags, unmount};
use serde::Deserialize;

use super::config::SPEC;
use super::profile::read;
use crate::cli::{daemon, number, out};
use crate::control::PrivateClient;
use crate::error::{Error, Kind, Result};
use crate::instance::MAX_DEVICES;
use crate::private::LOOPFS;

/// Maximum size of a container state.
const STATE_MAX: u64 = 1 << 20;
/// Maximum number of nodes.
const NODES_MAX: u32 = 4 * MAX_DEVICES;

/// Link loop devices in the /dev of a container; a hook for container runtimes.
///
/// Container runtimes run it as createContainer hook, with the container state on standard input.
/// It links /dev/loop-control and /dev/loopN to the nodes in /dev/loopfs. 'print-config' and
/// 'print-cdi' configure it.
#[derive(Debug, clap::Args)]
pub(in crate::cli) struct Hook {
    /// Number of devices in the pool.
    #[arg(long, value_name = "N", value_parser = number::within(1..=MAX_DEVICES))]
    devices: u32,

    /// Pool; its daemon keeps partition names in the /dev of the container.
    #[arg(long, value_name = "NAME")]
    pool: Option<String>,

    /// Number of nodes /dev/loopN that the runtime created; the hook replaces them.
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true,
        value_parser = number::within(0..=NODES_MAX))]
    nodes: u32,

    /// Device numbers that the pool omits.
    #[arg(long, value_name = "N,…", value_delimiter = ',')]
    reserved: Vec<u32>,
}

#[derive(Deserialize)]
struct HookState {
    #[serde(default)]
    id: String,
    bundle: PathBuf,
}

impl Hook {
    pub(super) fn run(self, run_dir: &Path) -> Result<()> {
        let mut text = Vec::new();
        let cannot = |error| Error::os(error, "cannot read the container state");
        std::io::stdin().take(STATE_MAX).read_to_end(&mut text).map_err(cannot)?;
        let state: HookState = serde_json::from_slice(&text).map_err(|error| {
            Error::new(Kind::Invalid, format!("standard input is not a container state: {error}"))
                .hint("configure this as createContainer hook of a container runtime")
        })?;
        let linked = root(&state.bundle).and_then(|root| {
            self.link(&root)
                .map_err(|error| Error::os(error, "cannot create links in the /dev of the container"))
        });
        let Some(pool) = &self.pool else { return linked.map(drop) };
        let reported = report(run_dir, async |client| match &linked {
            Ok(dev) => client.set_container_dev(pool, &state.id, dev.try_clone().map_err(cannot)?).await,
            Err(error) => client.report_container(pool, &state.id, &error.to_string()).await,
        });
        // Without names, partitions are still in /dev/loopfs.
        if let Err(error) = reported {
            out::message(format_args!("partitions get no names in the /dev of the container: {error}"));
        }
        linked.map(drop)
    }

    fn link(&self, root: &File) -> rustix::io::Result<OwnedFd> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let within = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        let dev = rustix::fs::openat2(root, "dev", flags, Mode::empty(), within)?;
        for number in 0..self.nodes {
            clear(&dev, &format!("loop{number}"))?;
        }
        let numbers = (0..).filter(|number: &u32| !self.reserved.contains(number));
        let names = numbers.take(self.devices as usize).map(|number| format!("loop{number}"));
        for name in names.chain(["loop-control".to_owned()]) {
            clear(&dev, &name)?;
            rustix::fs::symlinkat(format!("{LOOPFS}/{name}"), &dev, &name)?;
        }
        Ok(dev)
    }
}

fn report(run_dir: &Path, what: impl AsyncFnOnce(&mut PrivateClient) -> Result<()>) -> Result<()> {
    daemon::runtime()?.block_on(async { what(&mut PrivateClient::connect(run_dir).await?).await })
}

/// Removes a name of any type. In a user namespace, nodes are bind mounts.
fn clear(dev: &OwnedFd, name: &str) -> rustix::io::Result<()> {
    let unlink = || rustix::fs::unlinkat(dev, name, AtFlags::empty());
    match unlink() {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(Errno::BUSY) => {
            rustix::process::fchdir(dev)?;
            unmount(name, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW)?;
            unlink()
        }
        Err(error) => Err(error),
    }
}

/// The root directory in the config.json of the container.
fn root(bundle: &Path) -> Result<File> {
    let config = read(&bundle.join("config.json"), SPEC)?;
    let Some(path) = config.pointer("/root/path").and_then(|path| path.as_str()) else {
        return Err(Error::new(Kind::Invalid, "the config.json of the container has no root directory"));
    };
    let path = bundle.join(path);
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    match rustix::fs::openat(CWD, &path, flags, Mode::empty()) {
        Ok(root) => Ok(root.into()),
        Err(error) => Err(Error::os(error, format!("cannot open {}", path.display()))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn made(hook: &Hook, root: &Path) -> rustix::io::Result<Vec<(String, String)>> {
        hook.link(&File::open(root).unwrap())?;
        let entries = std::fs::read_dir(root.join("dev")).unwrap().map(|entry| entry.unwrap());
        let mut links: Vec<_> = entries
            .map(|entry| {
                let to = std::fs::read_link(entry.path()).unwrap_or_default();
                (entry.file_name().into_string().unwrap(), to.display().to_string())
            })
            .collect();
        links.sort();
        Ok(links)
    }

    #[test]
    fn replaces_nodes_with_links() {
        let root = tempfile::tempdir().unwrap();
        let dev = root.path().join("dev");
        std::fs::create_dir(&dev).unwrap();
        for name in ["loop0", "loop1", "loop3", "loop-control"] {
            std::fs::write(dev.join(name), "").unwrap();
        }
        let link = |name: &str| (name.to_owned(), format!("loopfs/{name}"));
        let hook = Hook { devices: 2, pool: None, nodes: 4, reserved: Vec::new() };
        let want = [link("loop-control"), link("loop0"), link("loop1")];
        assert_eq!(made(&hook, root.path()).unwrap(), want);
        assert_eq!(made(&hook, root.path()).unwrap(), want, "again");
        let hook = Hook { devices: 2, pool: None, nodes: 4, reserved: vec![0, 2] };
        let want = [link("loop-control"), link("loop1"), link("loop3")];
        assert_eq!(made(&hook, root.path()).unwrap(), want, "omits reserved numbers");
    }

    #[test]
    fn ignores_links_out_of_the_container() {
        let (root, outside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        std::fs::write(outside.path().join("loop0"), "safe").unwrap();
        symlink(outside.path(), root.path().join("dev")).unwrap();
        assert!(
            Hook { devices: 1, pool: None, nodes: 0, reserved: Vec::new() }
                .link(&File::open(root.path()).unwrap())
                .is_err()
        );
        assert_eq!(std::fs::read_to_string(outside.path().join("loop0")).unwrap(), "safe");
    }
}
