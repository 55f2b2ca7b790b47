//! `oci hook`: what a runtime runs in a container that is being made, for the names in its /dev.
//!
//! Knows the state that hooks are told, and links. The container's files may be anybody's: nothing is
//! looked up outside of them, and nothing but names in its /dev is changed. The daemon is given that /dev, to
//! keep the names of partitions in it, and is told why the hook fails: crun throws a hook's stderr away.

use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use rustix::mount::{UnmountFlags, unmount};
use serde::Deserialize;

use super::profile::read;
use crate::cli::{daemon, number};
use crate::control::PrivateClient;
use crate::error::{Error, Kind, Result};
use crate::instance::MAX_DEVICES;
use crate::private::LOOPFS;

/// Bytes of a state at the most.
const STATE_MAX: u64 = 1 << 20;
/// More nodes than any pool has.
const NODES_MAX: u32 = 4 * MAX_DEVICES;

/// Give a container names for its loop devices: a hook for container runtimes.
///
/// Runtimes run it, as a createContainer hook, with the container's state on standard input. It makes the
/// links /dev/loop-control and /dev/loopN to what is in /dev/loopfs. print-config and print-cdi name it.
#[derive(Debug, clap::Args)]
pub(in crate::cli) struct Hook {
    /// Devices of the pool.
    #[arg(long, value_name = "N", value_parser = number::within(1..=MAX_DEVICES))]
    devices: u32,

    /// The pool, whose daemon keeps names of partitions in the container's /dev.
    #[arg(long, value_name = "NAME")]
    pool: Option<String>,

    /// Nodes /dev/loopN that the runtime has made by itself, for their numbers: they make way.
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true,
        value_parser = number::within(0..=NODES_MAX))]
    nodes: u32,

    /// Numbers that no device of the pool has.
    #[arg(long, value_name = "N,…", value_delimiter = ',')]
    reserved: Vec<u32>,
}

#[derive(Deserialize)]
struct State {
    #[serde(default)]
    id: String,
    bundle: PathBuf,
}

impl Hook {
    pub(super) fn run(self, run_dir: &Path) -> Result<()> {
        let mut text = Vec::new();
        let cannot = |error| Error::os(error, "cannot read the container's state");
        std::io::stdin().take(STATE_MAX).read_to_end(&mut text).map_err(cannot)?;
        let state: State = serde_json::from_slice(&text).map_err(|error| {
            Error::new(Kind::Invalid, format!("there is no container's state on standard input: {error}"))
                .hint("have a container runtime run this, as a createContainer hook")
        })?;
        let linked = root(&state.bundle).and_then(|root| {
            self.link(&root).map_err(|error| Error::os(error, "cannot make names in the container's /dev"))
        });
        let Some(pool) = &self.pool else { return linked.map(drop) };
        let told = tell(run_dir, async |client| match &linked {
            Ok(dev) => client.show_in(pool, &state.id, dev.try_clone().map_err(cannot)?).await,
            Err(error) => client.report_container(pool, &state.id, &error.to_string()).await,
        });
        // Partitions are in /dev/loopfs all the same.
        if let Err(error) = told {
            eprintln!("loopengine: partitions will have no names in the container's /dev: {error}");
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

fn tell(run_dir: &Path, what: impl AsyncFnOnce(&mut PrivateClient) -> Result<()>) -> Result<()> {
    daemon::runtime()?.block_on(async { what(&mut PrivateClient::connect(run_dir).await?).await })
}

/// Takes a name away, whatever it is. In a user namespace nodes are mounts.
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

/// The container's root directory, which its config.json names.
fn root(bundle: &Path) -> Result<File> {
    let config = read(&bundle.join("config.json"))?;
    let Some(path) = config.pointer("/root/path").and_then(|path| path.as_str()) else {
        return Err(Error::new(Kind::Invalid, "the container's config.json names no root directory"));
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
    fn links_take_the_place_of_nodes() {
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
        assert_eq!(made(&hook, root.path()).unwrap(), want, "not the numbers of others");
    }

    #[test]
    fn an_image_cannot_lead_it_astray() {
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
