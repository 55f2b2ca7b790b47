//! What /sys says of a pool's devices: the names and texts of the kernel's loop driver, for a tree
//! that is shown at /sys/block, /sys/dev/block and /sys/class/block. Writes nothing.
//!
//! ```text
//! block/loopN/…                     /sys/block/loopN
//! block/loopN/queue → ../../devices/virtual/block/ublkbK/queue
//! dev-block/M:m  → ../../block/…    /sys/dev/block/M:m
//! class-block/…  → ../../block/…    /sys/class/block/…
//! ```
//! What is true of the disk only (its queue, its counters, who holds it) is the kernel's own directory or
//! file, by a link: it is what it says at any moment. The rest is text of ours: libudev takes no link for an
//! attribute. Disks of the machine keep their links, except loop devices and the disks of ublk.

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use super::mirror::LOOPFS;
use super::tree::Node;
use crate::loops::{Bound, Entry, flag};

/// Directories of the tree, and where each is shown.
pub const PLACES: [(&str, &str); 3] =
    [("block", "/sys/block"), ("dev-block", "/sys/dev/block"), ("class-block", "/sys/class/block")];

/// The environment in which libudev takes the tree for a sysfs.
pub const LIBUDEV: (&str, &str) = ("SYSTEMD_DEVICE_VERIFY_SYSFS", "0");

/// In this one device mapper's tools and mdadm make nodes themselves: udev makes them where the machine looks.
pub const OWN_NODES: [(&str, &str); 2] = [("DM_DISABLE_UDEV", "1"), ("MDADM_NO_UDEV", "1")];

/// Names below which nodes of one device may be in number, for the tree's bound.
pub const NODES_PER_DEVICE: u64 = 64;

/// What the tree starts with: its directories, and the machine's other disks.
pub fn others() -> Vec<(String, Node)> {
    let mut nodes = Vec::new();
    for (dir, shown_at) in PLACES {
        nodes.push((dir.to_owned(), Node::Dir));
        let names = fs::read_dir(shown_at).into_iter().flatten().flatten();
        for name in names.filter_map(|entry| entry.file_name().into_string().ok()) {
            let Ok(target) = fs::read_link(Path::new(shown_at).join(&name)) else { continue };
            let Some(target) = target.to_str() else { continue };
            if !is_private(target) {
                nodes.push((format!("{dir}/{name}"), Node::Link(target.to_owned())));
            }
        }
    }
    nodes
}

/// A loop device or a disk of ublk, which are somebody's: `../devices/virtual/block/loop0/loop0p1`.
fn is_private(target: &str) -> bool {
    target.split('/').any(|part| {
        ["loop", "ublkb"].iter().any(|kind| {
            part.strip_prefix(kind).is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
        })
    })
}

/// A disk in the kernel's own sysfs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disk {
    /// Its directory, from /sys on.
    pub path: String,
    /// Number of this disk in the order of all that the kernel has had.
    pub sequence: Option<u64>,
}

impl Disk {
    /// The disk with this device number; none: the kernel has none, or shows none here.
    pub fn find(rdev: u64) -> Option<Disk> {
        let (major, minor) = numbers(rdev);
        let target = fs::read_link(format!("/sys/dev/block/{major}:{minor}")).ok()?;
        let path = target.to_str()?.strip_prefix("../../")?.to_owned();
        let sequence = fs::read_to_string(format!("/sys/{path}/diskseq")).ok();
        Some(Disk { sequence: sequence.and_then(|text| text.trim().parse().ok()), path })
    }
}

/// All that is to be seen of `entry`, directories before what is in them. `disk` finds disks by device number.
pub fn of(entry: &Entry, disk: impl Fn(u64) -> Option<Disk>) -> Vec<(String, Node)> {
    let name = format!("loop{}", entry.number);
    let mut out = Nodes { at: format!("block/{name}"), up: "../..", nodes: Vec::new() };
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
        // What losetup asks for is known also to a daemon that sees no sysfs.
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
        let mut part = Nodes { at: format!("{}/{name}", out.at), up: "../../..", nodes: Vec::new() };
        part.dir("");
        part.device(partition.rdev, partition.size, read_only);
        part.uevent(&name, "partition", partition.rdev, &format!("{more}\nPARTN={}", partition.number));
        part.disk(disk(partition.rdev).as_ref(), &[]);
        part.file("partition", partition.number);
        part.file("start", partition.start);
        part.names(&name, partition.rdev);
        out.nodes.append(&mut part.nodes);
    }
    // Last, and backing_file last of all: whoever sees it, sees the rest.
    if let Some(bound) = &entry.bound {
        out.bound(bound);
    }
    out.names(&name, entry.rdev);
    out.nodes
}

/// Links to a disk without hardware that is not the pool's own.
pub fn link_to_disk(name: &str, rdev: u64) -> Vec<(String, Node)> {
    let (major, minor) = numbers(rdev);
    let link = |at: String, up: &str| (at, Node::Link(format!("{up}/devices/virtual/block/{name}")));
    vec![
        link(format!("block/{name}"), ".."),
        link(format!("class-block/{name}"), "../.."),
        link(format!("dev-block/{major}:{minor}"), "../.."),
    ]
}

struct Nodes {
    at: String,
    /// The way from there to where /sys is.
    up: &'static str,
    nodes: Vec<(String, Node)>,
}

impl Nodes {
    fn dir(&mut self, name: &str) {
        let path = if name.is_empty() { self.at.clone() } else { format!("{}/{name}", self.at) };
        self.nodes.push((path, Node::Dir));
    }

    fn file(&mut self, name: &str, value: impl std::fmt::Display) {
        self.bytes(name, format!("{value}\n").into_bytes());
    }

    fn bytes(&mut self, name: &str, bytes: Vec<u8>) {
        self.nodes.push((format!("{}/{name}", self.at), Node::File(bytes)));
    }

    fn link(&mut self, name: &str, from_sys: &str) {
        self.nodes.push((format!("{}/{name}", self.at), Node::Link(format!("{}/{from_sys}", self.up))));
    }

    /// What disks and partitions have in common.
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
        // Where the node itself is: libudev opens it, and follows no link.
        let node = format_args!("{LOOPFS}/{name}");
        self.file(
            "uevent",
            format_args!("MAJOR={major}\nMINOR={minor}\nDEVNAME={node}\nDEVTYPE={kind}{more}"),
        );
    }

    /// What the kernel itself tells of the disk.
    fn disk(&mut self, disk: Option<&Disk>, more: &[&str]) {
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
        let target = Node::Link(format!("../../{}", self.at));
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
    use crate::loops::Partition;
    use std::ffi::OsStr;

    fn find<'a>(nodes: &'a [(String, Node)], path: &str) -> Option<&'a Node> {
        nodes.iter().find(|(at, _)| at == path).map(|(_, node)| node)
    }

    fn entry() -> Entry {
        Entry {
            number: 3,
            rdev: rustix::fs::makedev(259, 17),
            generation: 1,
            size: 1 << 20,
            block_size: 4096,
            bound: None,
            partitions: Vec::new(),
        }
    }

    fn disk(rdev: u64) -> Option<Disk> {
        let path = format!("devices/virtual/block/ublkb{}", rustix::fs::minor(rdev));
        Some(Disk { path, sequence: Some(7) })
    }

    #[test]
    fn loop_is_there_while_bound() {
        let mut entry = entry();
        let nodes = of(&entry, disk);
        assert!(find(&nodes, "block/loop3/loop").is_none());
        assert_eq!(find(&nodes, "block/loop3/dev"), Some(&Node::File("259:17\n".into())));
        assert_eq!(find(&nodes, "block/loop3/size"), Some(&Node::File("2048\n".into())));
        assert_eq!(find(&nodes, "dev-block/259:17"), Some(&Node::Link("../../block/loop3".into())));
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
        let nodes = of(&entry, disk);
        let shown = Node::File([backing_file.as_slice(), b"\n"].concat());
        assert_eq!(find(&nodes, "block/loop3/loop/backing_file"), Some(&shown));
        assert_eq!(find(&nodes, "block/loop3/loop/offset"), Some(&Node::File("512\n".into())));
        assert_eq!(find(&nodes, "block/loop3/loop/autoclear"), Some(&Node::File("1\n".into())));
        assert_eq!(find(&nodes, "block/loop3/loop/partscan"), Some(&Node::File("0\n".into())));
        assert_eq!(find(&nodes, "block/loop3/ro"), Some(&Node::File("1\n".into())));
    }

    #[test]
    fn partitions_are_below_their_disk() {
        let rdev = rustix::fs::makedev(259, 18);
        let partition = Partition { number: 2, rdev, generation: 1, start: 2048, size: 4096 };
        let nodes = of(&Entry { partitions: vec![partition], ..entry() }, disk);
        assert_eq!(find(&nodes, "block/loop3/loop3p2/start"), Some(&Node::File("2048\n".into())));
        assert_eq!(find(&nodes, "block/loop3/loop3p2/size"), Some(&Node::File("8\n".into())));
        let of_disk = Node::Link("../../../devices/virtual/block/ublkb18/stat".into());
        assert_eq!(find(&nodes, "block/loop3/loop3p2/stat"), Some(&of_disk));
        let uevent = "MAJOR=259\nMINOR=18\nDEVNAME=loopfs/loop3p2\nDEVTYPE=partition\nDISKSEQ=7\nPARTN=2\n";
        assert_eq!(find(&nodes, "block/loop3/loop3p2/uevent"), Some(&Node::File(uevent.into())));
        let queue = Node::Link("../../devices/virtual/block/ublkb17/queue".into());
        assert_eq!(find(&nodes, "block/loop3/queue"), Some(&queue));
        let link = Node::Link("../../block/loop3/loop3p2".into());
        assert_eq!(find(&nodes, "dev-block/259:18"), Some(&link));
        assert_eq!(find(&nodes, "class-block/loop3p2"), Some(&link));
        assert!(nodes.len() as u64 <= NODES_PER_DEVICE);
    }

    #[test]
    fn directories_come_first() {
        let nodes = of(&entry(), disk);
        for (at, (path, _)) in nodes.iter().enumerate() {
            let Some((parent, _)) = path.rsplit_once('/') else { continue };
            let root = PLACES.iter().any(|(dir, _)| dir == &parent);
            assert!(
                root || nodes[..at].iter().any(|(path, node)| path == parent && *node == Node::Dir),
                "{path}"
            );
        }
    }

    #[test]
    fn whose_is_what() {
        assert!(is_private("../../devices/virtual/block/loop0/loop0p1"));
        assert!(is_private("../devices/virtual/block/ublkb12"));
        assert!(!is_private("../devices/pci0000:00/virtio0/block/vda"));
        assert!(!is_private("../devices/virtual/block/dm-0"));
        assert!(!is_private("../devices/loopback/block/sda"));
    }
}
