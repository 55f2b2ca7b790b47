// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The /sys of a pool's devices: the attributes of the kernel's loop driver, for a tree that is
//! mounted at /sys/block, /sys/dev/block and /sys/class/block. Writes nothing.
//!
//! ```text
//! block/loopN/…                     /sys/block/loopN
//! block/loopN/queue → ../../devices/virtual/block/ublkbK/queue
//! dev-block/M:m  → ../../block/…    /sys/dev/block/M:m
//! class-block/…  → ../../block/…    /sys/class/block/…
//! ```
//! Attributes of the disk itself (queue, statistics, holders) are links to the kernel's own, and
//! always current. The others are text files: libudev does not follow links of attributes. Disks of
//! the machine keep their links, except loop devices and ublk disks.

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use super::tree::{DEV_BLOCK, LOOPFS, TreeNode};
use crate::loops::{Bound, DeviceEntry, flag};

/// Directories of the tree, and the mount point of each.
pub const SYSFS_DIRS: [(&str, &str); 3] =
    [("block", "/sys/block"), ("dev-block", "/sys/dev/block"), ("class-block", "/sys/class/block")];

/// The environment variable with which libudev accepts the tree as a sysfs.
pub const LIBUDEV: (&str, &str) = ("SYSTEMD_DEVICE_VERIFY_SYSFS", "0");

/// The environment variables with which the tools of device mapper and md make nodes themselves:
/// udev makes nodes only in the machine's /dev.
pub const NO_UDEV: [(&str, &str); 2] = [("DM_DISABLE_UDEV", "1"), ("MDADM_NO_UDEV", "1")];

/// Maximum number of files of one device, for the size limit of the tree.
pub const FILES_PER_DEVICE: u64 = 64;

/// The directories of the tree, and links to the machine's other disks.
pub fn other_disks() -> Vec<(String, TreeNode)> {
    let mut nodes = Vec::new();
    for (dir, shown_at) in SYSFS_DIRS {
        nodes.push((dir.to_owned(), TreeNode::Dir));
        let names = fs::read_dir(shown_at).into_iter().flatten().flatten();
        for name in names.filter_map(|entry| entry.file_name().into_string().ok()) {
            let Ok(target) = fs::read_link(Path::new(shown_at).join(&name)) else { continue };
            let Some(target) = target.to_str() else { continue };
            if !is_private(target) {
                nodes.push((format!("{dir}/{name}"), TreeNode::Link(target.to_owned())));
            }
        }
    }
    nodes
}

/// udev's links by device number in /dev/block, for the machine's other disks.
pub fn other_numbers() -> Vec<(String, TreeNode)> {
    let dir = Path::new("/dev").join(DEV_BLOCK);
    let names = fs::read_dir(&dir).into_iter().flatten().flatten();
    let link = |name: String| {
        let target = fs::read_link(dir.join(&name)).ok()?.into_os_string().into_string().ok()?;
        (!is_private(&target)).then(|| (format!("{DEV_BLOCK}/{name}"), TreeNode::Link(target)))
    };
    names.filter_map(|entry| link(entry.file_name().into_string().ok()?)).collect()
}

/// Whether it is a loop device or a ublk disk: `../devices/virtual/block/loop0/loop0p1`.
fn is_private(target: &str) -> bool {
    target.split('/').any(|part| {
        ["loop", "ublkb"].iter().any(|kind| {
            part.strip_prefix(kind).is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
        })
    })
}

/// A disk in the kernel's own sysfs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SysfsDisk {
    /// Its directory, relative to /sys.
    pub path: String,
    /// The kernel's disk sequence number.
    pub sequence: Option<u64>,
}

impl SysfsDisk {
    /// The disk with this device number, if it is visible here.
    pub fn find(rdev: u64) -> Option<SysfsDisk> {
        let (major, minor) = numbers(rdev);
        let target = fs::read_link(format!("/sys/dev/block/{major}:{minor}")).ok()?;
        let path = target.to_str()?.strip_prefix("../../")?.to_owned();
        let sequence = fs::read_to_string(format!("/sys/{path}/diskseq")).ok();
        Some(SysfsDisk { sequence: sequence.and_then(|text| text.trim().parse().ok()), path })
    }
}

/// All files of a device; directories before their contents. `disk` finds disks by device number.
pub fn files_of(entry: &DeviceEntry, disk: impl Fn(u64) -> Option<SysfsDisk>) -> Vec<(String, TreeNode)> {
    let name = format!("loop{}", entry.number);
    let mut out = SysfsNodes { at: format!("block/{name}"), up: "../..", nodes: Vec::new() };
    let flags = entry.bound.as_ref().map_or(0, |bound| bound.flags);
    let read_only = flags & flag::READ_ONLY != 0;
    let its = disk(entry.rdev);
    let sequence = its.as_ref().and_then(|disk| disk.sequence);
    let more = sequence.map(|sequence| format!("\nDISKSEQ={sequence}")).unwrap_or_default();
    out.dir("");
    out.device(entry.rdev, entry.size, read_only);
    out.uevent(&name, "disk", entry.rdev, &more);
    out.disk(its.as_ref(), &["integrity", "queue", "mq"]);
    if its.is_none() {
        // losetup needs this attribute, which is known also without a sysfs.
        out.dir("queue");
        out.file("queue/logical_block_size", entry.block_size);
    }
    let (major, minor) = numbers(entry.rdev);
    out.link("bdi", &format!("devices/virtual/bdi/{major}:{minor}"));
    for (name, value) in
        [("removable", 0), ("range", 1), ("ext_range", 256), ("hidden", 0), ("capability", 0)]
    {
        out.file(name, value);
    }
    out.file("partscan", u8::from(flags & flag::PARTSCAN != 0));
    out.file("events", "media_change");
    out.bytes("events_async", Vec::new());
    out.file("events_poll_msecs", -1);
    if let Some(sequence) = sequence {
        out.file("diskseq", sequence);
    }
    out.dir("slaves");
    for partition in &entry.partitions {
        let name = format!("{name}p{}", partition.number);
        let mut part = SysfsNodes { at: format!("{}/{name}", out.at), up: "../../..", nodes: Vec::new() };
        part.dir("");
        part.device(partition.rdev, partition.size, read_only);
        part.uevent(&name, "partition", partition.rdev, &format!("{more}\nPARTN={}", partition.number));
        part.disk(disk(partition.rdev).as_ref(), &[]);
        part.file("partition", partition.number);
        part.file("start", partition.start);
        part.names(&name, partition.rdev);
        out.nodes.append(&mut part.nodes);
    }
    // Last, with backing_file at the end: a reader that finds it finds all others.
    if let Some(bound) = &entry.bound {
        out.bound(bound);
    }
    out.names(&name, entry.rdev);
    out.nodes
}

/// Links to a virtual disk that is not of the pool.
pub fn link_to_disk(name: &str, rdev: u64) -> Vec<(String, TreeNode)> {
    let (major, minor) = numbers(rdev);
    let link = |at: String, up: &str| (at, TreeNode::Link(format!("{up}/devices/virtual/block/{name}")));
    vec![
        link(format!("block/{name}"), ".."),
        link(format!("class-block/{name}"), "../.."),
        link(format!("dev-block/{major}:{minor}"), "../.."),
    ]
}

struct SysfsNodes {
    at: String,
    /// The path from there to /sys.
    up: &'static str,
    nodes: Vec<(String, TreeNode)>,
}

impl SysfsNodes {
    fn dir(&mut self, name: &str) {
        let path = if name.is_empty() { self.at.clone() } else { format!("{}/{name}", self.at) };
        self.nodes.push((path, TreeNode::Dir));
    }

    fn file(&mut self, name: &str, value: impl std::fmt::Display) {
        self.bytes(name, format!("{value}\n").into_bytes());
    }

    fn bytes(&mut self, name: &str, bytes: Vec<u8>) {
        self.nodes.push((format!("{}/{name}", self.at), TreeNode::File(bytes)));
    }

    fn link(&mut self, name: &str, from_sys: &str) {
        self.nodes.push((format!("{}/{name}", self.at), TreeNode::Link(format!("{}/{from_sys}", self.up))));
    }

    /// The attributes that disks and partitions have in common.
    fn device(&mut self, rdev: u64, size: u64, read_only: bool) {
        let (major, minor) = numbers(rdev);
        self.file("dev", format_args!("{major}:{minor}"));
        self.file("size", size / 512);
        self.file("ro", u8::from(read_only));
        self.file("alignment_offset", 0);
        self.file("discard_alignment", 0);
        self.link("subsystem", "class/block");
    }

    fn uevent(&mut self, name: &str, kind: &str, rdev: u64, more: &str) {
        let (major, minor) = numbers(rdev);
        // The path of the node itself: libudev does not follow links.
        let node = format_args!("{LOOPFS}/{name}");
        self.file(
            "uevent",
            format_args!("MAJOR={major}\nMINOR={minor}\nDEVNAME={node}\nDEVTYPE={kind}{more}"),
        );
    }

    /// Links to the kernel's own attributes of the disk.
    fn disk(&mut self, disk: Option<&SysfsDisk>, more: &[&str]) {
        for name in ["holders", "inflight", "power", "stat", "trace"].iter().chain(more) {
            if let Some(disk) = disk {
                self.link(name, &format!("{}/{name}", disk.path));
            }
        }
    }

    fn bound(&mut self, bound: &Bound) {
        let set = |bit| u8::from(bound.flags & bit != 0);
        self.dir("loop");
        self.file("loop/offset", bound.offset);
        self.file("loop/sizelimit", bound.size_limit);
        self.file("loop/autoclear", set(flag::AUTOCLEAR));
        self.file("loop/partscan", set(flag::PARTSCAN));
        self.file("loop/dio", set(flag::DIRECT_IO));
        self.bytes("loop/backing_file", [bound.backing_file.as_os_str().as_bytes(), b"\n"].concat());
    }

    fn names(&mut self, name: &str, rdev: u64) {
        let (major, minor) = numbers(rdev);
        let target = TreeNode::Link(format!("../../{}", self.at));
        self.nodes.push((format!("class-block/{name}"), target.clone()));
        self.nodes.push((format!("dev-block/{major}:{minor}"), target));
    }
}

fn numbers(rdev: u64) -> (u32, u32) {
    (rustix::fs::major(rdev), rustix::fs::minor(rdev))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::loops::PartitionEntry;
    use std::ffi::OsStr;

    fn find<'a>(nodes: &'a [(String, TreeNode)], path: &str) -> Option<&'a TreeNode> {
        nodes.iter().find(|(at, _)| at == path).map(|(_, node)| node)
    }

    fn entry() -> DeviceEntry {
        DeviceEntry {
            number: 3,
            rdev: rustix::fs::makedev(259, 17),
            generation: 1,
            size: 1 << 20,
            block_size: 4096,
            bound: None,
            partitions: Vec::new(),
        }
    }

    fn disk(rdev: u64) -> Option<SysfsDisk> {
        let path = format!("devices/virtual/block/ublkb{}", rustix::fs::minor(rdev));
        Some(SysfsDisk { path, sequence: Some(7) })
    }

    #[test]
    fn has_loop_attributes_while_bound() {
        let mut entry = entry();
        let nodes = files_of(&entry, disk);
        assert!(find(&nodes, "block/loop3/loop").is_none());
        assert_eq!(find(&nodes, "block/loop3/dev"), Some(&TreeNode::File("259:17\n".into())));
        assert_eq!(find(&nodes, "block/loop3/size"), Some(&TreeNode::File("2048\n".into())));
        assert_eq!(find(&nodes, "dev-block/259:17"), Some(&TreeNode::Link("../../block/loop3".into())));
        let flags = flag::READ_ONLY | flag::AUTOCLEAR;
        let backing_file = b"/a b\n\xff(deleted)";
        entry.bound = Some(Bound {
            backing_file: OsStr::from_bytes(backing_file).into(),
            image_device: 1,
            image_inode: 2,
            offset: 512,
            size_limit: 0,
            flags,
        });
        let nodes = files_of(&entry, disk);
        let shown = TreeNode::File([backing_file.as_slice(), b"\n"].concat());
        assert_eq!(find(&nodes, "block/loop3/loop/backing_file"), Some(&shown));
        assert_eq!(find(&nodes, "block/loop3/loop/offset"), Some(&TreeNode::File("512\n".into())));
        assert_eq!(find(&nodes, "block/loop3/loop/autoclear"), Some(&TreeNode::File("1\n".into())));
        assert_eq!(find(&nodes, "block/loop3/loop/partscan"), Some(&TreeNode::File("0\n".into())));
        assert_eq!(find(&nodes, "block/loop3/ro"), Some(&TreeNode::File("1\n".into())));
    }

    #[test]
    fn lists_partitions_below_their_disk() {
        let rdev = rustix::fs::makedev(259, 18);
        let partition = PartitionEntry { number: 2, rdev, generation: 1, start: 2048, size: 4096 };
        let nodes = files_of(&DeviceEntry { partitions: vec![partition], ..entry() }, disk);
        assert_eq!(find(&nodes, "block/loop3/loop3p2/start"), Some(&TreeNode::File("2048\n".into())));
        assert_eq!(find(&nodes, "block/loop3/loop3p2/size"), Some(&TreeNode::File("8\n".into())));
        let of_disk = TreeNode::Link("../../../devices/virtual/block/ublkb18/stat".into());
        assert_eq!(find(&nodes, "block/loop3/loop3p2/stat"), Some(&of_disk));
        let uevent = "MAJOR=259\nMINOR=18\nDEVNAME=loopfs/loop3p2\nDEVTYPE=partition\nDISKSEQ=7\nPARTN=2\n";
        assert_eq!(find(&nodes, "block/loop3/loop3p2/uevent"), Some(&TreeNode::File(uevent.into())));
        let queue = TreeNode::Link("../../devices/virtual/block/ublkb17/queue".into());
        assert_eq!(find(&nodes, "block/loop3/queue"), Some(&queue));
        let link = TreeNode::Link("../../block/loop3/loop3p2".into());
        assert_eq!(find(&nodes, "dev-block/259:18"), Some(&link));
        assert_eq!(find(&nodes, "class-block/loop3p2"), Some(&link));
        assert!(nodes.len() as u64 <= FILES_PER_DEVICE);
    }

    #[test]
    fn lists_directories_before_their_contents() {
        let nodes = files_of(&entry(), disk);
        for (at, (path, _)) in nodes.iter().enumerate() {
            let Some((parent, _)) = path.rsplit_once('/') else { continue };
            let root = SYSFS_DIRS.iter().any(|(dir, _)| dir == &parent);
            assert!(
                root || nodes[..at].iter().any(|(path, node)| path == parent && *node == TreeNode::Dir),
                "{path}"
            );
        }
    }

    #[test]
    fn recognises_loop_devices_and_ublk_disks() {
        assert!(is_private("../../devices/virtual/block/loop0/loop0p1"));
        assert!(is_private("../devices/virtual/block/ublkb12"));
        assert!(!is_private("../devices/pci0000:00/virtio0/block/vda"));
        assert!(!is_private("../devices/virtual/block/dm-0"));
        assert!(!is_private("../devices/loopback/block/sda"));
    }
}
