// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The inodes of a directory: their numbers, owners and modes.
//!
//! An inode belongs to one disk of a device, and is never reused. So a kept inode of a removed
//! device (a descriptor with O_PATH, a bind mount, a cached name) is refused, also for root, when
//! another device has the device number. Owners and modes belong to the name, and stay when the
//! device gets another disk. Knows nothing of the kernel.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use super::DeviceSource;
use super::wire::{Attr, AttrChanges, CONTROL, ROOT};
use crate::loops::{DeviceEntry, Errno, PoolSpec};

/// The name of loop-control.
pub(super) const CONTROL_NAME: &str = "loop-control";

const DIRECTORY: u32 = 0o040000;
const BLOCK: u32 = 0o060000;
const REGULAR: u32 = 0o100000;
const CHARACTER: u32 = 0o020000;
/// /dev/null. Where calls are intercepted, loop-control can be a character device as the kernel's
/// is, which some programs check. The node is only opened.
const NULL: (u32, u32) = (1, 3);
const PERMISSIONS: u32 = 0o777;

/// What a name refers to: the directory, loop-control, a device, or a partition of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum NodeKey {
    Root,
    Control,
    Device(u32),
    Partition(u32, u32),
}

impl NodeKey {
    /// Parses a name, whether the device exists or not.
    pub(super) fn of(name: &str) -> Option<NodeKey> {
        if name == CONTROL_NAME {
            return Some(NodeKey::Control);
        }
        let rest = name.strip_prefix("loop")?;
        match rest.split_once('p') {
            None => Some(NodeKey::Device(number(rest)?)),
            Some((device, partition)) => Some(NodeKey::Partition(number(device)?, number(partition)?)),
        }
    }

    pub(super) fn name(self) -> String {
        match self {
            NodeKey::Root => ".".to_owned(),
            NodeKey::Control => CONTROL_NAME.to_owned(),
            NodeKey::Device(device) => format!("loop{device}"),
            NodeKey::Partition(device, partition) => format!("loop{device}p{partition}"),
        }
    }
}

/// Parses a number in a name: decimal digits without a leading zero.
fn number(text: &str) -> Option<u32> {
    let plain = text.bytes().all(|byte| byte.is_ascii_digit()) && (text.len() == 1 || !text.starts_with('0'));
    if plain { text.parse().ok() } else { None }
}

/// The inode of a name, with owner and mode.
#[derive(Clone, Copy, Debug)]
struct Inode {
    ino: u64,
    /// Device number and generation of the disk that the inode belongs to.
    disk_id: (u64, u64),
    /// The previous inode and its disk: the device may get that disk again.
    former: Option<(u64, (u64, u64))>,
    mode: u32,
    uid: u32,
    gid: u32,
    changed: u64,
}

#[derive(Debug)]
struct InodeMaps {
    nodes: BTreeMap<NodeKey, Inode>,
    keys: BTreeMap<u64, NodeKey>,
    next: u64,
}

/// All inodes of a directory.
#[derive(Debug)]
pub(super) struct InodeTable {
    devices: Arc<dyn DeviceSource>,
    table: Mutex<InodeMaps>,
}

impl InodeTable {
    pub(super) fn new(devices: Arc<dyn DeviceSource>) -> InodeTable {
        let spec = devices.spec();
        let node = |ino, mode, disk_id| {
            let (uid, gid) = (spec.uid, spec.gid);
            Inode { ino, disk_id, former: None, mode, uid, gid, changed: now() }
        };
        let control = node(CONTROL, spec.mode & PERMISSIONS, control(spec));
        let fixed = [(NodeKey::Root, node(ROOT, 0o755, (0, 0))), (NodeKey::Control, control)];
        let table = InodeMaps {
            nodes: BTreeMap::from(fixed),
            keys: BTreeMap::from([(ROOT, NodeKey::Root), (CONTROL, NodeKey::Control)]),
            next: CONTROL + 1,
        };
        InodeTable { devices, table: Mutex::new(table) }
    }

    pub(super) fn devices(&self) -> &dyn DeviceSource {
        &*self.devices
    }

    fn table(&self) -> MutexGuard<'_, InodeMaps> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Looks a name up.
    pub(super) fn lookup(&self, name: &str) -> Result<Attr, Errno> {
        let key = NodeKey::of(name).ok_or(Errno::NOENT)?;
        let disk_id = self.disk_id(key).ok_or(Errno::NOENT)?;
        Ok(self.table().attr(key, disk_id, self.devices.spec().mode, self.owner()))
    }

    /// The attributes of an inode; ESTALE if its disk is no longer the device's.
    pub(super) fn attr(&self, ino: u64) -> Result<Attr, Errno> {
        self.with(ino, |key, node| node.attr(key))
    }

    /// The key of an inode; ESTALE likewise.
    pub(super) fn key(&self, ino: u64) -> Result<NodeKey, Errno> {
        self.with(ino, |key, _| key)
    }

    /// AttrChanges owner or mode. The kernel has checked permissions.
    pub(super) fn change(&self, ino: u64, changes: AttrChanges) -> Result<Attr, Errno> {
        self.with(ino, |key, node| {
            node.mode = changes.mode.map_or(node.mode, |mode| mode & PERMISSIONS);
            node.uid = changes.uid.unwrap_or(node.uid);
            node.gid = changes.gid.unwrap_or(node.gid);
            node.changed = now();
            node.attr(key)
        })
    }

    /// Runs `does` on this inode, if its disk is the present one. Asks the pool once, and never
    /// while the table is locked.
    fn with<T>(&self, ino: u64, does: impl FnOnce(NodeKey, &mut Inode) -> T) -> Result<T, Errno> {
        let key = self.table().keys.get(&ino).copied().ok_or(Errno::STALE)?;
        let now = self.disk_id(key).ok_or(Errno::STALE)?;
        let mut table = self.table();
        let mut node = table.nodes.get_mut(&key);
        if let Some(node) = node.as_mut().filter(|node| node.former == Some((ino, now))) {
            node.swap();
        }
        let node = node.filter(|node| node.ino == ino && node.disk_id == now);
        node.map(|node| does(key, node)).ok_or(Errno::STALE)
    }

    /// Removes the inodes of a removed device or partition. A later one of its number gets new
    /// ones.
    pub(super) fn remove_gone(&self, device: u32) {
        let entry = self.devices.snapshot(device);
        let is_left = |key: &NodeKey| match *key {
            NodeKey::Device(number) if number == device => entry.is_some(),
            NodeKey::Partition(number, _) if number == device => {
                entry.as_ref().is_some_and(|entry| disk_id(entry, *key).is_some())
            }
            _ => true,
        };
        let mut table = self.table();
        table.nodes.retain(|key, _| is_left(key));
        table.keys.retain(|_, key| is_left(key));
    }

    /// All names after the offset `after`, in order, each with its offset.
    pub(super) fn list(&self, after: u64) -> Vec<(u64, Attr, String)> {
        let mut keys = vec![(NodeKey::Root, (0, 0)), (NodeKey::Control, control(self.devices.spec()))];
        for entry in self.devices.entries() {
            let partitions =
                entry.partitions.iter().map(|part| NodeKey::Partition(entry.number, part.number));
            let all = std::iter::once(NodeKey::Device(entry.number)).chain(partitions);
            keys.extend(all.filter_map(|key| Some((key, disk_id(&entry, key)?))));
        }
        let (mode, owner) = (self.devices.spec().mode, self.owner());
        let mut table = self.table();
        let placed = keys.into_iter().filter_map(|(key, disk_id)| Some((dir_offset(key)?, key, disk_id)));
        let behind = placed.filter(|(offset, ..)| *offset > after);
        let mut list: Vec<_> = behind
            .map(|(offset, key, disk_id)| (offset, table.attr(key, disk_id, mode, owner), key.name()))
            .collect();
        list.sort_by_key(|(offset, ..)| *offset);
        list
    }

    fn owner(&self) -> (u32, u32) {
        let spec = self.devices.spec();
        (spec.uid, spec.gid)
    }

    /// Device number and generation of the present disk; none if there is no such device.
    fn disk_id(&self, key: NodeKey) -> Option<(u64, u64)> {
        match key {
            NodeKey::Root => Some((0, 0)),
            NodeKey::Control => Some(control(self.devices.spec())),
            NodeKey::Device(number) | NodeKey::Partition(number, _) => {
                disk_id(&self.devices.entry(number)?, key).filter(|(rdev, _)| self.devices.is_intact(*rdev))
            }
        }
    }
}

/// Device number of loop-control. 0: a regular file, since ioctls of a device would not reach the
/// daemon.
fn control(spec: &PoolSpec) -> (u64, u64) {
    (if spec.intercepted { rustix::fs::makedev(NULL.0, NULL.1) } else { 0 }, 0)
}

/// The directory offset of a key. It does not depend on other entries.
fn dir_offset(key: NodeKey) -> Option<u64> {
    match key {
        // 1 and 2: the directory and its parent.
        NodeKey::Root => Some(2),
        NodeKey::Control => Some(3),
        NodeKey::Device(device) => Some(4 + (u64::from(device) << 16)),
        NodeKey::Partition(device, partition) => {
            let partition = u16::try_from(partition).ok().filter(|&number| number != 0)?;
            Some(4 + (u64::from(device) << 16) + u64::from(partition))
        }
    }
}

fn disk_id(entry: &DeviceEntry, key: NodeKey) -> Option<(u64, u64)> {
    match key {
        NodeKey::Partition(_, wanted) => {
            let found = entry.partitions.iter().find(|partition| partition.number == wanted)?;
            Some((found.rdev, found.generation))
        }
        _ => Some((entry.rdev, entry.generation)),
    }
}

impl InodeMaps {
    /// The attributes of a key with this disk. Allocates another inode if the disk has changed.
    fn attr(&mut self, key: NodeKey, disk_id: (u64, u64), mode: u32, (uid, gid): (u32, u32)) -> Attr {
        let mode = mode & PERMISSIONS;
        let new = Inode { ino: self.next, disk_id, former: None, mode, uid, gid, changed: now() };
        let node = self.nodes.entry(key).or_insert(new);
        if node.former.is_some_and(|(_, former_id)| former_id == disk_id) {
            node.swap();
        } else if node.disk_id != disk_id {
            if let Some((ino, _)) = node.former {
                self.keys.remove(&ino);
            }
            let former = Some((node.ino, node.disk_id));
            *node = Inode { ino: self.next, disk_id, former, ..*node };
        }
        if node.ino == self.next {
            self.next += 1;
            self.keys.insert(node.ino, key);
        }
        node.attr(key)
    }
}

impl Inode {
    /// Restores the previous inode.
    fn swap(&mut self) {
        if let Some((ino, disk_id)) = self.former.replace((self.ino, self.disk_id)) {
            (self.ino, self.disk_id) = (ino, disk_id);
        }
    }

    fn attr(&self, key: NodeKey) -> Attr {
        let (kind, links, rdev) = match key {
            NodeKey::Root => (DIRECTORY, 2, 0),
            NodeKey::Control if self.disk_id.0 == 0 => (REGULAR, 1, 0),
            NodeKey::Control => (CHARACTER, 1, self.disk_id.0),
            NodeKey::Device(_) | NodeKey::Partition(..) => (BLOCK, 1, self.disk_id.0),
        };
        let Inode { ino, mode, uid, gid, changed, .. } = *self;
        Attr { ino, mode: kind | mode, links, uid, gid, rdev, changed }
    }
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
