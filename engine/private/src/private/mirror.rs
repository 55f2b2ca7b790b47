//! The names of a pool's devices in the /dev and the /sys of a tenant, kept as the pool is.
//!
//! Only what has changed is written. What cannot be written is logged and left: it is the tenant's
//! own view. Knows what is to be seen where; does not know who changes it.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::{Mutex, PoisonError};

use super::sysfs;
use super::tree::{Node, Shape, Tree};
use crate::error::{Error, Result};
use crate::loops::Entry;
use crate::sys::stack::Stack;

/// The directory in the tenant's /dev on which the pool's own file system is mounted. Never `loop`:
/// libloop would look for the devices in there.
pub const LOOPFS: &str = "loopfs";

/// What a tenant may put into its /dev besides.
const DEV_BYTES: u64 = 4 << 20;
const DEV_NODES: u64 = 1 << 14;
/// The smallest unit of a tmpfs.
const PAGE: u64 = 4096;
/// Partitions that are counted for the bound of a tree.
const PARTITIONS: u64 = 4;
/// Links to the machine's own disks that are shown at the most.
const OTHERS_MAX: usize = 4096;

type Nodes = Vec<(String, Node)>;

/// See the module.
#[derive(Debug)]
pub struct Mirror {
    dev: Tree,
    sys: Tree,
    shown: Mutex<HashMap<u32, (Nodes, Nodes)>>,
    /// The /dev of a container, whose runtime has made it: only names of partitions are put there.
    container: Mutex<Option<Tree>>,
    stacks: Mutex<HashMap<String, (Nodes, Nodes)>>,
}

impl Mirror {
    /// For a pool of `max` devices; `uid` and `gid` may write to their /dev, nobody to their /sys.
    pub fn make(max: u32, uid: u32, gid: u32) -> Result<Mirror> {
        let cannot = |error| Error::os(error, "cannot make the pool's part of /dev and /sys");
        let dev = Tree::make(Shape {
            size: DEV_BYTES,
            nodes: DEV_NODES + u64::from(max) * (1 + PARTITIONS),
            uid,
            gid,
        });
        let nodes = 3 * OTHERS_MAX as u64 + u64::from(max) * sysfs::NODES_PER_DEVICE * (1 + PARTITIONS / 2);
        let sys = Tree::make(Shape { size: nodes * PAGE, nodes, uid: 0, gid: 0 });
        let (dev, sys) = (dev.map_err(cannot)?, sys.map_err(cannot)?);
        let mirror = Mirror {
            dev,
            sys,
            shown: Mutex::default(),
            container: Mutex::default(),
            stacks: Mutex::default(),
        };
        let control = Node::Link(format!("{LOOPFS}/loop-control"));
        for (path, node) in [(LOOPFS, Node::Dir), ("loop-control", control)] {
            mirror.dev.put(path, &node).map_err(cannot)?;
        }
        for (path, node) in sysfs::others().iter().take(3 * OTHERS_MAX) {
            mirror.sys.put(path, node).map_err(cannot)?;
        }
        Ok(mirror)
    }

    /// Makes a directory beside those for /sys, for who has one mount for all.
    pub fn add_directory(&self, name: &str) -> Result<()> {
        let made = self.sys.put(name, &Node::Dir);
        made.map_err(|error| Error::os(error, "cannot make the pool's part of /dev and /sys"))
    }

    /// The mounts to give away: of /dev, and of the directories for /sys.
    pub fn mounts(&self) -> Result<[OwnedFd; 2]> {
        let cannot = |error| Error::os(error, "cannot give the mounts of a pool away");
        Ok([self.dev.mount().map_err(cannot)?, self.sys.mount().map_err(cannot)?])
    }

    /// Has names for devices that will be there when somebody looks them up.
    pub fn promise(&self, numbers: &[u32]) {
        let mut shown = self.shown.lock().unwrap_or_else(PoisonError::into_inner);
        let new: Vec<u32> = numbers.iter().copied().filter(|number| !shown.contains_key(number)).collect();
        for number in new {
            let name = format!("loop{number}");
            let link = Node::Link(format!("{LOOPFS}/{name}"));
            let dev = vec![(name, link)];
            update(&self.dev, &Nodes::new(), &dev);
            shown.insert(number, (dev, Nodes::new()));
        }
    }

    /// Names of partitions are kept in this /dev from now on, and in no other container's.
    pub fn show_in(&self, container: Option<Tree>) {
        let shown = self.shown.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(tree) = &container {
            shown.values().for_each(|(dev, _)| update(tree, &Nodes::new(), &partitions(dev)));
        }
        *self.container.lock().unwrap_or_else(PoisonError::into_inner) = container;
    }

    fn update_container(&self, old: &Nodes, new: &Nodes) {
        if let Some(tree) = &*self.container.lock().unwrap_or_else(PoisonError::into_inner) {
            update(tree, &partitions(old), &partitions(new));
        }
    }

    /// Shows the device with this number as `now` tells that it is; none: it is gone. Asks while it holds
    /// the lock: of two changes told at once, the later one to be shown is what is true then.
    pub fn show(&self, number: u32, now: impl FnOnce() -> Option<Entry>) {
        let mut shown = self.shown.lock().unwrap_or_else(PoisonError::into_inner);
        let entry = now();
        let (dev, sys) = entry
            .as_ref()
            .map(|entry| (links(entry), sysfs::of(entry, sysfs::Disk::find)))
            .unwrap_or_default();
        let (old_dev, old_sys) = shown.remove(&number).unwrap_or_default();
        // A new device is described before it has a name, and an old one has none before it is not.
        if entry.is_some() {
            update(&self.sys, &old_sys, &sys);
            update(&self.dev, &old_dev, &dev);
            self.update_container(&old_dev, &dev);
            shown.insert(number, (dev, sys));
        } else {
            self.update_container(&old_dev, &dev);
            update(&self.dev, &old_dev, &dev);
            update(&self.sys, &old_sys, &sys);
        }
    }

    /// Shows a disk that lies upon the devices, or shows it no longer. Its tenant makes the node that is opened, so that
    /// dm-N is a link to that.
    pub fn show_stack(&self, stack: &Stack, is_there: bool) {
        let mut shown = self.stacks.lock().unwrap_or_else(PoisonError::into_inner);
        let (old_dev, old_sys) = shown.remove(&stack.name).unwrap_or_default();
        let (dev, sys) = if is_there { stack_nodes(stack) } else { (Nodes::new(), Nodes::new()) };
        update(&self.sys, &old_sys, &sys);
        update(&self.dev, &old_dev, &dev);
        if is_there {
            shown.insert(stack.name.clone(), (dev, sys));
            return;
        }
        // As devtmpfs does. Where the tenant has made none, or has removed it, there is nothing to do.
        let _ = self.dev.remove_node(&stack.name, stack.rdev);
        for (_, node) in old_dev {
            if let Node::Link(made) = node {
                let _ = self.dev.remove_node(&made, stack.rdev);
            }
        }
    }
}

fn stack_nodes(stack: &Stack) -> (Nodes, Nodes) {
    let mapping = stack.mapping().map(|name| (stack.name.clone(), Node::Link(format!("mapper/{name}"))));
    (mapping.into_iter().collect(), sysfs::link_to_disk(&stack.name, stack.rdev))
}

fn links(entry: &Entry) -> Nodes {
    let disk = format!("loop{}", entry.number);
    let partitions = entry.partitions.iter().map(|partition| format!("{disk}p{}", partition.number));
    let names = std::iter::once(disk.clone()).chain(partitions);
    names.map(|name| (name.clone(), Node::Link(format!("{LOOPFS}/{name}")))).collect()
}

fn partitions(names: &Nodes) -> Nodes {
    let is_partition = |name: &str| name.strip_prefix("loop").is_some_and(|rest| rest.contains('p'));
    names.iter().filter(|(name, _)| is_partition(name)).cloned().collect()
}

fn update(tree: &Tree, old: &Nodes, new: &Nodes) {
    let have: HashMap<&str, &Node> = old.iter().map(|(path, node)| (path.as_str(), node)).collect();
    let want: HashMap<&str, &Node> = new.iter().map(|(path, node)| (path.as_str(), node)).collect();
    let mut failed = None;
    // First what has changed: who sees that a device is unbound, since what tells of its file is gone, sees the rest.
    for (path, node) in new.iter().filter(|(path, node)| have.get(path.as_str()) != Some(&node)) {
        failed = failed.or(tree.put(path, node).err());
    }
    for (path, node) in old.iter().rev().filter(|(path, _)| !want.contains_key(path.as_str())) {
        failed = failed.or(tree.remove(path, node).err());
    }
    if let Some(error) = failed {
        tracing::debug!("a tenant does not see all of its devices: {error}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::loops::Partition;
    use std::sync::mpsc::channel;
    use std::time::Duration;

    fn entry(partitions: Vec<Partition>) -> Entry {
        let rdev = rustix::fs::makedev(259, 17);
        Entry { number: 0, rdev, generation: 1, size: 1 << 20, block_size: 512, bound: None, partitions }
    }

    /// As when the reaper's news of an unbound device comes after the caller's of the next binding.
    #[test]
    fn old_news_does_not_come_last() {
        let Ok(mirror) = Mirror::make(4, 0, 0) else {
            eprintln!("skipped: no tmpfs of its own here");
            return;
        };
        let rdev = rustix::fs::makedev(259, 18);
        let partition = Partition { number: 1, rdev, generation: 1, start: 8, size: 4096 };
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
                mirror.show(0, now);
            });
            is_asked.recv().unwrap();
            std::thread::sleep(Duration::from_millis(10));
            *is.lock().unwrap() = entry(vec![partition]);
            mirror.show(0, || Some(is.lock().unwrap().clone()));
        });
        let shown = mirror.shown.lock().unwrap();
        assert!(shown[&0].0.iter().any(|(name, _)| name == "loop0p1"));
    }
}
