// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Where devices are mounted and which processes have them open, in all mount namespaces.
//!
//! One look at /proc for any number of devices. Knows names and numbers of devices; does not know whose they are.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use super::mntns::Mount;
use crate::sys::printable;

use super::processes::{self, Open, Process};
use super::usage::Disks;

/// What the processes of the machine mount and have open, as far as the caller may see it.
#[derive(Debug)]
pub struct Uses {
    mounts: Vec<Mount>,
    open: Vec<Open>,
}

/// The names and numbers by which a device is known to its users.
#[derive(Debug, Default)]
pub struct Names {
    /// "259:0", of the device, its partitions and what is stacked upon it.
    numbers: BTreeSet<String>,
    nodes: Vec<PathBuf>,
    /// The device's own.
    rdev: Option<u64>,
}

impl Names {
    /// Of the device with this node, or of this file of FUSE.
    pub fn of_node(node: &Path) -> Names {
        use std::os::unix::fs::MetadataExt;
        let rdev =
            node.starts_with("/dev").then(|| fs::metadata(node).ok()).flatten().map(|meta| meta.rdev());
        let mut names = Names::of(&Disks::of(node));
        names.nodes.push(node.to_owned());
        names.numbers.extend(rdev.map(shown));
        Names { rdev, ..names }
    }

    /// Of the device with this number, and of its partitions with these.
    pub fn of_number(rdev: u64, partitions: impl Iterator<Item = u64>) -> Names {
        let mut names = Names::of(&Disks::numbered(rdev));
        names.numbers.extend(partitions.chain([rdev]).map(shown));
        Names { rdev: Some(rdev), ..names }
    }

    fn of(disks: &Disks) -> Names {
        let nodes = disks.nodes();
        let number = |node: &PathBuf| {
            let file = Path::new("/sys/class/block").join(node.file_name()?).join("dev");
            Some(fs::read_to_string(file).ok()?.trim().to_owned())
        };
        Names { numbers: nodes.iter().filter_map(number).collect(), nodes, rdev: None }
    }
}

fn shown(rdev: u64) -> String {
    format!("{}:{}", rustix::fs::major(rdev), rustix::fs::minor(rdev))
}

impl Uses {
    /// Looks.
    pub fn look() -> Uses {
        let is_named = |name: &Path| {
            let last = name.file_name().unwrap_or_default().as_encoded_bytes();
            last.starts_with(b"loop") || last.starts_with(b"ublkb")
        };
        Uses { mounts: processes::mounts(), open: processes::open_devices(is_named) }
    }

    /// The directories that a device is mounted on, each once.
    pub fn mounted_on(&self, names: &Names) -> Vec<String> {
        // These have a number of their own and name the node. Of others anybody can name any.
        let is_it = |mount: &&Mount| {
            let by_node = || {
                ["btrfs", "bcachefs"].contains(&mount.kind.as_str()) && names.nodes.contains(&mount.source)
            };
            names.numbers.contains(&mount.number) || by_node()
        };
        let mut found: Vec<String> = Vec::new();
        for mount in self.mounts.iter().filter(is_it) {
            let target = printable(&mount.target.display().to_string());
            if !found.contains(&target) {
                found.push(target);
            }
        }
        found
    }

    /// The processes that have a device open, each once.
    pub fn open_in(&self, names: &Names) -> Vec<Process> {
        let is_it = |open: &&Open| match open.rdev {
            Some(_) => open.rdev == names.rdev,
            None => names.nodes.contains(&open.name),
        };
        let pids: BTreeSet<u32> = self.open.iter().filter(is_it).map(|open| open.pid).collect();
        pids.into_iter().filter_map(Process::of).collect()
    }
}
