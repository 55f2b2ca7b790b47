//! What /sys says of a pool's devices: the names and texts of the kernel's loop driver, for a tree
//! that is shown at /sys/block, /sys/dev/block and /sys/class/block. Pure; writes nothing.
//!
//! ```text
//! block/loopN/…                     /sys/block/loopN
//! dev-block/M:m  → ../../block/…    /sys/dev/block/M:m
//! class-block/…  → ../../block/…    /sys/class/block/…
//! ```
//! Disks of the machine keep their links, except loop devices and the disks of ublk.

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use super::tree::Node;
use crate::loops::{Bound, Entry, flag};

/// Directories of the tree, and where each is shown.
pub const PLACES: [(&str, &str); 3] =
    [("block", "/sys/block"), ("dev-block", "/sys/dev/block"), ("class-block", "/sys/class/block")];

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

/// All that is to be seen of `entry`, directories before what is in them.
pub fn of(entry: &Entry) -> Vec<(String, Node)> {
    let name = format!("loop{}", entry.number);
    let mut out = Nodes { at: format!("block/{name}"), nodes: Vec::new() };
    let read_only = entry.bound.as_ref().is_some_and(|bound| bound.flags & flag::READ_ONLY != 0);
    out.dir("");
    out.device(&name, "disk", entry.rdev, entry.size, read_only);
    out.file("removable", 0);
    out.file("range", 1);
    out.file("ext_range", 256);
    out.file("hidden", 0);
    out.file("capability", 0);
    out.queue(entry.block_size);
    for partition in &entry.partitions {
        let name = format!("{name}p{}", partition.number);
        let mut part = Nodes { at: format!("{}/{name}", out.at), nodes: Vec::new() };
        part.dir("");
        part.device(&name, "partition", partition.rdev, partition.size, read_only);
        part.file("partition", partition.number);
        part.file("start", partition.start);
        part.links(&name, partition.rdev);
        out.nodes.append(&mut part.nodes);
    }
    // Last, and backing_file last of all: whoever sees it, sees the rest.
    if let Some(bound) = &entry.bound {
        out.bound(bound);
    }
    out.links(&name, entry.rdev);
    out.nodes
}

struct Nodes {
    at: String,
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

    /// What disks and partitions have in common.
    fn device(&mut self, name: &str, kind: &str, rdev: u64, size: u64, read_only: bool) {
        let (major, minor) = numbers(rdev);
        self.file("dev", format_args!("{major}:{minor}"));
        self.file("uevent", format_args!("MAJOR={major}\nMINOR={minor}\nDEVNAME={name}\nDEVTYPE={kind}"));
        self.file("size", size / 512);
        self.file("ro", u8::from(read_only));
        self.file("alignment_offset", 0);
        self.file("discard_alignment", 0);
        self.dir("holders");
    }

    fn queue(&mut self, block_size: u32) {
        self.dir("slaves");
        self.dir("queue");
        for name in ["logical_block_size", "physical_block_size", "hw_sector_size", "minimum_io_size"] {
            self.file(&format!("queue/{name}"), block_size);
        }
        for name in ["optimal_io_size", "rotational", "add_random", "dax", "discard_zeroes_data"] {
            self.file(&format!("queue/{name}"), 0);
        }
        self.file("queue/nr_requests", 128);
        self.file("queue/read_ahead_kb", 128);
        self.file("queue/scheduler", "[none]");
        self.file("queue/zoned", "none");
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

    fn links(&mut self, name: &str, rdev: u64) {
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

    #[test]
    fn loop_is_there_while_bound() {
        let mut entry = entry();
        let nodes = of(&entry);
        assert!(find(&nodes, "block/loop3/loop").is_none());
        assert_eq!(find(&nodes, "block/loop3/dev"), Some(&Node::File("259:17\n".into())));
        assert_eq!(find(&nodes, "block/loop3/size"), Some(&Node::File("2048\n".into())));
        assert_eq!(find(&nodes, "dev-block/259:17"), Some(&Node::Link("../../block/loop3".into())));
        let flags = flag::READ_ONLY | flag::AUTOCLEAR;
        let backing_file = b"/a b\n\xff(deleted)";
        entry.bound = Some(Bound {
            backing_file: OsStr::from_bytes(backing_file).into(),
            offset: 512,
            size_limit: 0,
            flags,
        });
        let nodes = of(&entry);
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
        let nodes = of(&Entry { partitions: vec![partition], ..entry() });
        assert_eq!(find(&nodes, "block/loop3/loop3p2/start"), Some(&Node::File("2048\n".into())));
        assert_eq!(find(&nodes, "block/loop3/loop3p2/size"), Some(&Node::File("8\n".into())));
        let link = Node::Link("../../block/loop3/loop3p2".into());
        assert_eq!(find(&nodes, "dev-block/259:18"), Some(&link));
        assert_eq!(find(&nodes, "class-block/loop3p2"), Some(&link));
        assert!(nodes.len() as u64 <= NODES_PER_DEVICE);
    }

    #[test]
    fn directories_come_first() {
        let nodes = of(&entry());
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
