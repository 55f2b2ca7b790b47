//! Which inode number stands for which device, and whose it is.
//!
//! An inode stands for one device number for as long as the pool says that this device has it, and
//! for nothing ever after: numbers are not used again. So whoever kept an inode of a device that is
//! gone (a descriptor with O_PATH, a bind mount, a name in the kernel's cache) is refused, even root,
//! when its device number has become another's. Owners and modes belong to the name and stay when a
//! device is exchanged under it. Knows nothing of the kernel.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use super::Devices;
use super::wire::{Attr, Changes, ROOT};
use crate::loops::{Entry, Errno, PoolSpec};

/// The inode of loop-control.
pub(super) const CONTROL: u64 = 2;
/// What loop-control is called.
pub(super) const CONTROL_NAME: &str = "loop-control";

const DIRECTORY: u32 = 0o040000;
const BLOCK: u32 = 0o060000;
const REGULAR: u32 = 0o100000;
const CHARACTER: u32 = 0o020000;
/// /dev/null: where calls are intercepted, loop-control can be a character device as the kernel's is, which programs
/// test for. All that its driver is ever asked is to be open.
const NULL: (u32, u32) = (1, 3);
const PERMISSIONS: u32 = 0o777;

/// What a name stands for: the directory, loop-control, a device, a partition of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Key {
    Root,
    Control,
    Device(u32),
    Partition(u32, u32),
}

impl Key {
    /// What a name means, whether there is such a device or not.
    pub(super) fn of(name: &str) -> Option<Key> {
        if name == CONTROL_NAME {
            return Some(Key::Control);
        }
        let rest = name.strip_prefix("loop")?;
        match rest.split_once('p') {
            None => Some(Key::Device(number(rest)?)),
            Some((device, partition)) => Some(Key::Partition(number(device)?, number(partition)?)),
        }
    }

    pub(super) fn name(self) -> String {
        match self {
            Key::Root => ".".to_owned(),
            Key::Control => CONTROL_NAME.to_owned(),
            Key::Device(device) => format!("loop{device}"),
            Key::Partition(device, partition) => format!("loop{device}p{partition}"),
        }
    }
}

/// A number as names have it: decimal digits without a zero in front.
fn number(text: &str) -> Option<u32> {
    let plain = text.bytes().all(|byte| byte.is_ascii_digit()) && (text.len() == 1 || !text.starts_with('0'));
    if plain { text.parse().ok() } else { None }
}

/// One name's inode, and who may open it.
#[derive(Clone, Copy, Debug)]
struct Node {
    ino: u64,
    /// Device number and generation for which the inode stands.
    stands_for: (u64, u64),
    /// The inode before this one, and what it stands for: the name may stand for that once more.
    former: Option<(u64, (u64, u64))>,
    mode: u32,
    uid: u32,
    gid: u32,
    changed: u64,
}

#[derive(Debug)]
struct Table {
    nodes: BTreeMap<Key, Node>,
    keys: BTreeMap<u64, Key>,
    next: u64,
}

/// All inodes of a directory.
#[derive(Debug)]
pub(super) struct Nodes {
    devices: Arc<dyn Devices>,
    table: Mutex<Table>,
}

impl Nodes {
    pub(super) fn new(devices: Arc<dyn Devices>) -> Nodes {
        let spec = devices.spec();
        let node = |ino, mode, stands_for| {
            let (uid, gid) = (spec.uid, spec.gid);
            Node { ino, stands_for, former: None, mode, uid, gid, changed: now() }
        };
        let control = node(CONTROL, spec.mode & PERMISSIONS, control(spec));
        let fixed = [(Key::Root, node(ROOT, 0o755, (0, 0))), (Key::Control, control)];
        let table = Table {
            nodes: BTreeMap::from(fixed),
            keys: BTreeMap::from([(ROOT, Key::Root), (CONTROL, Key::Control)]),
            next: CONTROL + 1,
        };
        Nodes { devices, table: Mutex::new(table) }
    }

    pub(super) fn devices(&self) -> &dyn Devices {
        &*self.devices
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What a name stands for now.
    pub(super) fn named(&self, name: &str) -> Result<Attr, Errno> {
        let key = Key::of(name).ok_or(Errno::NOENT)?;
        let stands_for = self.stands_for(key).ok_or(Errno::NOENT)?;
        Ok(self.table().attr(key, stands_for, self.devices.spec().mode, self.owner()))
    }

    /// What an inode is; ESTALE if it no longer stands for what it always did.
    pub(super) fn attr(&self, ino: u64) -> Result<Attr, Errno> {
        self.with(ino, |key, node| node.attr(key))
    }

    /// Who an inode is; ESTALE if nobody any more.
    pub(super) fn key(&self, ino: u64) -> Result<Key, Errno> {
        self.with(ino, |key, _| key)
    }

    /// Changes owner or mode. Who may was decided by the kernel.
    pub(super) fn change(&self, ino: u64, changes: Changes) -> Result<Attr, Errno> {
        self.with(ino, |key, node| {
            node.mode = changes.mode.map_or(node.mode, |mode| mode & PERMISSIONS);
            node.uid = changes.uid.unwrap_or(node.uid);
            node.gid = changes.gid.unwrap_or(node.gid);
            node.changed = now();
            node.attr(key)
        })
    }

    /// Does it to the node that has this inode and stands for what the pool has now. The pool is
    /// asked once, and never while the table is locked.
    fn with<T>(&self, ino: u64, does: impl FnOnce(Key, &mut Node) -> T) -> Result<T, Errno> {
        let key = self.table().keys.get(&ino).copied().ok_or(Errno::STALE)?;
        let now = self.stands_for(key).ok_or(Errno::STALE)?;
        let mut table = self.table();
        let mut node = table.nodes.get_mut(&key);
        if let Some(node) = node.as_mut().filter(|node| node.former == Some((ino, now))) {
            node.swap();
        }
        let node = node.filter(|node| node.ino == ino && node.stands_for == now);
        node.map(|node| does(key, node)).ok_or(Errno::STALE)
    }

    /// Forgets what is no more of a device; its next holder of the number starts anew.
    pub(super) fn forget_gone(&self, device: u32) {
        let entry = self.devices.shown(device);
        let is_left = |key: &Key| match *key {
            Key::Device(number) if number == device => entry.is_some(),
            Key::Partition(number, _) if number == device => {
                entry.as_ref().is_some_and(|entry| stands_for(entry, *key).is_some())
            }
            _ => true,
        };
        let mut table = self.table();
        table.nodes.retain(|key, _| is_left(key));
        table.keys.retain(|_, key| is_left(key));
    }

    /// All names behind `after`, in order, each with its place in that order.
    pub(super) fn list(&self, after: u64) -> Vec<(u64, Attr, String)> {
        let mut keys = vec![(Key::Root, (0, 0)), (Key::Control, control(self.devices.spec()))];
        for entry in self.devices.entries() {
            let partitions = entry.partitions.iter().map(|part| Key::Partition(entry.number, part.number));
            let all = std::iter::once(Key::Device(entry.number)).chain(partitions);
            keys.extend(all.filter_map(|key| Some((key, stands_for(&entry, key)?))));
        }
        let (mode, owner) = (self.devices.spec().mode, self.owner());
        let mut table = self.table();
        let placed = keys.into_iter().filter_map(|(key, stands_for)| Some((place(key)?, key, stands_for)));
        let behind = placed.filter(|(place, ..)| *place > after);
        let mut list: Vec<_> = behind
            .map(|(place, key, stands_for)| (place, table.attr(key, stands_for, mode, owner), key.name()))
            .collect();
        list.sort_by_key(|(place, ..)| *place);
        list
    }

    fn owner(&self) -> (u32, u32) {
        let spec = self.devices.spec();
        (spec.uid, spec.gid)
    }

    /// Device number and generation that a key has now; none if there is no such device.
    fn stands_for(&self, key: Key) -> Option<(u64, u64)> {
        match key {
            Key::Root => Some((0, 0)),
            Key::Control => Some(control(self.devices.spec())),
            Key::Device(number) | Key::Partition(number, _) => stands_for(&self.devices.entry(number)?, key),
        }
    }
}

/// Device number of loop-control; 0: a regular file, or what is asked of it would not reach the daemon.
fn control(spec: &PoolSpec) -> (u64, u64) {
    (if spec.intercepted { rustix::fs::makedev(NULL.0, NULL.1) } else { 0 }, 0)
}

/// The part of a listing's order that is a key's: it does not move when others come or go.
fn place(key: Key) -> Option<u64> {
    match key {
        // 1 and 2: the directory and its parent.
        Key::Root => Some(2),
        Key::Control => Some(3),
        Key::Device(device) => Some(4 + (u64::from(device) << 16)),
        Key::Partition(device, partition) => {
            let partition = u16::try_from(partition).ok().filter(|&number| number != 0)?;
            Some(4 + (u64::from(device) << 16) + u64::from(partition))
        }
    }
}

fn stands_for(entry: &Entry, key: Key) -> Option<(u64, u64)> {
    match key {
        Key::Partition(_, wanted) => {
            let found = entry.partitions.iter().find(|partition| partition.number == wanted)?;
            Some((found.rdev, found.generation))
        }
        _ => Some((entry.rdev, entry.generation)),
    }
}

impl Table {
    /// The attributes of a key that stands for this now: with another inode if it has changed.
    fn attr(&mut self, key: Key, stands_for: (u64, u64), mode: u32, (uid, gid): (u32, u32)) -> Attr {
        let mode = mode & PERMISSIONS;
        let fresh = Node { ino: self.next, stands_for, former: None, mode, uid, gid, changed: now() };
        let node = self.nodes.entry(key).or_insert(fresh);
        if node.former.is_some_and(|(_, stood_for)| stood_for == stands_for) {
            node.swap();
        } else if node.stands_for != stands_for {
            if let Some((ino, _)) = node.former {
                self.keys.remove(&ino);
            }
            let former = Some((node.ino, node.stands_for));
            *node = Node { ino: self.next, stands_for, former, ..*node };
        }
        if node.ino == self.next {
            self.next += 1;
            self.keys.insert(node.ino, key);
        }
        node.attr(key)
    }
}

impl Node {
    /// It is the inode before this one again.
    fn swap(&mut self) {
        if let Some((ino, stands_for)) = self.former.replace((self.ino, self.stands_for)) {
            (self.ino, self.stands_for) = (ino, stands_for);
        }
    }

    fn attr(&self, key: Key) -> Attr {
        let (kind, links, rdev) = match key {
            Key::Root => (DIRECTORY, 2, 0),
            Key::Control if self.stands_for.0 == 0 => (REGULAR, 1, 0),
            Key::Control => (CHARACTER, 1, self.stands_for.0),
            Key::Device(_) | Key::Partition(..) => (BLOCK, 1, self.stands_for.0),
        };
        let Node { ino, mode, uid, gid, changed, .. } = *self;
        Attr { ino, mode: kind | mode, links, uid, gid, rdev, changed }
    }
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
