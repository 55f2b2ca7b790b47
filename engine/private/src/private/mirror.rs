// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Keeps the names of a pool's devices in a tenant's /dev and /sys up to date.
//!
//! Writes only changes. Logs failures and continues: a tenant can damage only its own view. Knows
//! which names belong where. Does not know what causes a change.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::{Mutex, PoisonError};

use super::sysfs;
use super::tree::{DEV_BLOCK, LOOPFS, Tree, TreeNode, TreeOptions};
use crate::error::{Error, Result};
use crate::loops::DeviceEntry;
use crate::sys::stack::Stack;

/// Space in /dev for the tenant's own files.
const DEV_BYTES: u64 = 4 << 20;
const DEV_NODES: u64 = 1 << 14;
/// The allocation unit of tmpfs.
const PAGE: u64 = 4096;
/// Partitions per device in the size limit of a tree.
const PARTITIONS: u64 = 4;
/// Maximum number of links to the machine's own disks.
const OTHER_DISKS_MAX: usize = 4096;

type FileList = Vec<(String, TreeNode)>;

/// The trees of a tenant.
#[derive(Debug)]
pub struct Mirror {
    dev: Tree,
    sys: Tree,
    written: Mutex<HashMap<u32, (FileList, FileList)>>,
    /// The /dev of a container, which its runtime creates: gets only names of partitions.
    container: Mutex<Option<Tree>>,
    stacks: Mutex<HashMap<String, (FileList, FileList)>>,
}

impl Mirror {
    /// For a pool of `max` devices. `uid` and `gid` may write to /dev, nobody to /sys.
    pub fn make(max: u32, uid: u32, gid: u32) -> Result<Mirror> {
        let cannot = |error| Error::os(error, "cannot create the pool's part of /dev and /sys");
        let dev = Tree::make(TreeOptions {
            size: DEV_BYTES,
            nodes: DEV_NODES + OTHER_DISKS_MAX as u64 + u64::from(max) * 2 * (1 + PARTITIONS),
            uid,
            gid,
        });
        let nodes =
            3 * OTHER_DISKS_MAX as u64 + u64::from(max) * sysfs::FILES_PER_DEVICE * (1 + PARTITIONS / 2);
        let sys = Tree::make(TreeOptions { size: nodes * PAGE, nodes, uid: 0, gid: 0 });
        let (dev, sys) = (dev.map_err(cannot)?, sys.map_err(cannot)?);
        let mirror = Mirror {
            dev,
            sys,
            written: Mutex::default(),
            container: Mutex::default(),
            stacks: Mutex::default(),
        };
        let control = TreeNode::Link(format!("{LOOPFS}/loop-control"));
        for (path, node) in [(LOOPFS, TreeNode::Dir), (DEV_BLOCK, TreeNode::Dir), ("loop-control", control)] {
            mirror.dev.put(path, &node).map_err(cannot)?;
        }
        for (path, node) in sysfs::other_numbers().iter().take(OTHER_DISKS_MAX) {
            mirror.dev.put(path, node).map_err(cannot)?;
        }
        for (path, node) in sysfs::other_disks().iter().take(3 * OTHER_DISKS_MAX) {
            mirror.sys.put(path, node).map_err(cannot)?;
        }
        Ok(mirror)
    }

    /// Creates a directory beside those for /sys, for a client that attaches one mount for all.
    pub fn add_directory(&self, name: &str) -> Result<()> {
        let made = self.sys.put(name, &TreeNode::Dir);
        made.map_err(|error| Error::os(error, "cannot create the pool's part of /dev and /sys"))
    }

    /// The mounts for the client: of /dev, and of the directories for /sys.
    pub fn mounts(&self) -> Result<[OwnedFd; 2]> {
        let cannot = |error| Error::os(error, "cannot duplicate the mounts of a pool");
        Ok([self.dev.mount().map_err(cannot)?, self.sys.mount().map_err(cannot)?])
    }

    /// Creates names of devices that their first lookup creates.
    pub fn preallocate(&self, numbers: &[u32]) {
        let mut written = self.written.lock().unwrap_or_else(PoisonError::into_inner);
        let new: Vec<u32> = numbers.iter().copied().filter(|number| !written.contains_key(number)).collect();
        for number in new {
            let name = format!("loop{number}");
            let link = TreeNode::Link(format!("{LOOPFS}/{name}"));
            let dev = vec![(name, link)];
            update(&self.dev, &FileList::new(), &dev);
            written.insert(number, (dev, FileList::new()));
        }
    }

    /// Keeps names of partitions in this /dev from now on, and in no other container's.
    pub fn set_container_dev(&self, container: Option<Tree>) {
        let written = self.written.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(tree) = &container {
            written.values().for_each(|(dev, _)| update(tree, &FileList::new(), &partitions(dev)));
        }
        *self.container.lock().unwrap_or_else(PoisonError::into_inner) = container;
    }

    fn update_container(&self, old: &FileList, new: &FileList) {
        if let Some(tree) = &*self.container.lock().unwrap_or_else(PoisonError::into_inner) {
            update(tree, &partitions(old), &partitions(new));
        }
    }

    /// Updates the names of a device. `now` returns its state; none: it is removed. Calls `now`
    /// under the lock, so that of two concurrent updates the last one writes the present state.
    pub fn update_device(&self, number: u32, now: impl FnOnce() -> Option<DeviceEntry>) {
        let mut written = self.written.lock().unwrap_or_else(PoisonError::into_inner);
        let entry = now();
        let (dev, sys) = entry
            .as_ref()
            .map(|entry| (device_links(entry), sysfs::files_of(entry, sysfs::SysfsDisk::find)))
            .unwrap_or_default();
        let (old_dev, old_sys) = written.remove(&number).unwrap_or_default();
        // A new device gets its /sys before its name in /dev, and a removed one loses its name
        // first.
        if entry.is_some() {
            update(&self.sys, &old_sys, &sys);
            update(&self.dev, &old_dev, &dev);
            self.update_container(&old_dev, &dev);
            written.insert(number, (dev, sys));
        } else {
            self.update_container(&old_dev, &dev);
            update(&self.dev, &old_dev, &dev);
            update(&self.sys, &old_sys, &sys);
        }
    }

    /// Adds or removes the names of a stacked disk. The tenant makes the node; dm-N is a link to
    /// it.
    pub fn update_stack(&self, stack: &Stack, is_there: bool) {
        let mut written = self.stacks.lock().unwrap_or_else(PoisonError::into_inner);
        let (old_dev, old_sys) = written.remove(&stack.name).unwrap_or_default();
        let (dev, sys) = if is_there { stack_nodes(stack) } else { (FileList::new(), FileList::new()) };
        update(&self.sys, &old_sys, &sys);
        update(&self.dev, &old_dev, &dev);
        if is_there {
            written.insert(stack.name.clone(), (dev, sys));
            return;
        }
        // As devtmpfs does. The tenant may have made none, or removed it.
        let _ = self.dev.remove_node(&stack.name, stack.rdev);
        for (path, node) in old_dev {
            if let (true, TreeNode::Link(made)) = (path == stack.name, node) {
                let _ = self.dev.remove_node(&made, stack.rdev);
            }
        }
    }
}

fn stack_nodes(stack: &Stack) -> (FileList, FileList) {
    let mapping = stack.mapping().map(|name| (stack.name.clone(), TreeNode::Link(format!("mapper/{name}"))));
    let names = mapping.into_iter().chain([link_by_number(&stack.name, stack.rdev)]);
    (names.collect(), sysfs::link_to_disk(&stack.name, stack.rdev))
}

fn device_links(entry: &DeviceEntry) -> FileList {
    let disk = format!("loop{}", entry.number);
    let partitions = entry.partitions.iter();
    let partitions = partitions.map(|partition| (format!("{disk}p{}", partition.number), partition.rdev));
    let names = std::iter::once((disk.clone(), entry.rdev)).chain(partitions);
    let links = |(name, rdev): (String, u64)| {
        [link_by_number(&name, rdev), (name.clone(), TreeNode::Link(format!("{LOOPFS}/{name}")))]
    };
    names.flat_map(links).collect()
}

/// As udev makes it.
fn link_by_number(name: &str, rdev: u64) -> (String, TreeNode) {
    let (major, minor) = (rustix::fs::major(rdev), rustix::fs::minor(rdev));
    (format!("{DEV_BLOCK}/{major}:{minor}"), TreeNode::Link(format!("../{name}")))
}

fn partitions(names: &FileList) -> FileList {
    let is_partition = |name: &str| name.strip_prefix("loop").is_some_and(|rest| rest.contains('p'));
    names.iter().filter(|(name, _)| is_partition(name)).cloned().collect()
}

fn update(tree: &Tree, old: &FileList, new: &FileList) {
    let have: HashMap<&str, &TreeNode> = old.iter().map(|(path, node)| (path.as_str(), node)).collect();
    let want: HashMap<&str, &TreeNode> = new.iter().map(|(path, node)| (path.as_str(), node)).collect();
    let (mut failed, mut tree) = (None, tree.update());
    // First the changes, then the removals: a reader that misses the `loop` directory of an unbound
    // device sees the other changes.
    for (path, node) in new.iter().filter(|(path, node)| have.get(path.as_str()) != Some(&node)) {
        failed = failed.or(tree.put(path, node).err());
    }
    for (path, node) in old.iter().rev().filter(|(path, _)| !want.contains_key(path.as_str())) {
        failed = failed.or(tree.remove(path, node).err());
    }
    if let Some(error) = failed {
        tracing::debug!("cannot update the /dev and /sys of a tenant: {error}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::loops::PartitionEntry;
    use std::sync::mpsc::channel;
    use std::time::Duration;

    fn entry(partitions: Vec<PartitionEntry>) -> DeviceEntry {
        let rdev = rustix::fs::makedev(259, 17);
        DeviceEntry {
            number: 0,
            rdev,
            generation: 1,
            size: 1 << 20,
            block_size: 512,
            bound: None,
            partitions,
        }
    }

    /// For instance, the close watcher's update after an unbind comes after that of the next bind.
    #[test]
    fn writes_the_present_state_last() {
        let Ok(mirror) = Mirror::make(4, 0, 0) else {
            eprintln!("skipped: no tmpfs of its own here");
            return;
        };
        let rdev = rustix::fs::makedev(259, 18);
        let partition = PartitionEntry { number: 1, rdev, generation: 1, start: 8, size: 4096 };
        let is = Mutex::new(entry(Vec::new()));
        let (asked, is_asked) = channel();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let now = || {
                    asked.send(()).unwrap();
                    let now = is.lock().unwrap().clone();
                    std::thread::sleep(Duration::from_millis(50));
                    Some(now)
                };
                mirror.update_device(0, now);
            });
            is_asked.recv().unwrap();
            std::thread::sleep(Duration::from_millis(10));
            *is.lock().unwrap() = entry(vec![partition]);
            mirror.update_device(0, || Some(is.lock().unwrap().clone()));
        });
        let written = mirror.written.lock().unwrap();
        assert!(written[&0].0.iter().any(|(name, _)| name == "loop0p1"));
    }
}
