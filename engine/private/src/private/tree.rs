//! A small file system in memory that the daemon makes, keeps a descriptor of, and fills after its
//! mount has been given away.
//!
//! Whoever has the mount may put things into it, or mounts upon it, so that every step starts at the
//! descriptor, follows no link, and leaves the file system nowhere: the worst that a tenant can do is
//! to spoil its own view. Being tmpfs, it never makes us wait. Does not know what it shows.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_string, fsmount, fsopen,
};

/// What a name in the tree is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Node {
    /// A directory.
    Dir,
    /// A file of which everybody may read this.
    File(Vec<u8>),
    /// A symbolic link.
    Link(String),
}

/// How large a tree may become, and whose its root is.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Bytes.
    pub size: u64,
    /// Files, directories and links.
    pub nodes: u64,
    /// Who may write to its root.
    pub uid: u32,
    /// Group of the root.
    pub gid: u32,
}

/// See the module.
#[derive(Debug)]
pub struct Tree {
    root: OwnedFd,
}

impl Tree {
    /// Makes an empty one, mounted nowhere yet.
    pub fn make(shape: Shape) -> io::Result<Tree> {
        let context = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
        let Shape { size, nodes, uid, gid } = shape;
        let options = [
            ("source", "loopengine".to_owned()),
            ("mode", "0755".to_owned()),
            ("size", size.to_string()),
            ("nr_inodes", nodes.to_string()),
            ("uid", uid.to_string()),
            ("gid", gid.to_string()),
        ];
        for (key, value) in options {
            fsconfig_set_string(&context, key, value)?;
        }
        fsconfig_create(&context)?;
        let flags = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NOEXEC;
        let root = fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, flags)?;
        Ok(Tree { root })
    }

    /// One that others have made and mounted. It must be a tmpfs: any other file system may block later.
    /// This call itself may block on the file system of `root`.
    pub fn adopt(root: OwnedFd) -> io::Result<Tree> {
        let is_directory = FileType::from_raw_mode(rustix::fs::fstat(&root)?.st_mode) == FileType::Directory;
        match is_directory && rustix::fs::fstatfs(&root)?.f_type == libc::TMPFS_MAGIC {
            true => Ok(Tree { root }),
            false => Err(io::Error::other("it is not a directory of a tmpfs")),
        }
    }

    /// The mount, to give away.
    pub fn mount(&self) -> io::Result<OwnedFd> {
        self.root.try_clone()
    }

    /// Makes `path` be `node`, or be another of the same kind. Its directory must be there.
    pub fn put(&self, path: &str, node: &Node) -> io::Result<()> {
        self.in_parent(path, |parent, name| match node {
            Node::Dir => match rustix::fs::mkdirat(parent, name, Mode::from_raw_mode(0o755)) {
                // The daemon's umask may be stricter.
                Ok(()) => {
                    Ok(rustix::fs::chmodat(parent, name, Mode::from_raw_mode(0o755), AtFlags::empty())?)
                }
                Err(rustix::io::Errno::EXIST) => Ok(()),
                Err(error) => Err(error.into()),
            },
            // Another file in its place, not another content: readers see the one or the other.
            Node::File(text) => replace(parent, name, |fresh| {
                let flags =
                    OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let file = rustix::fs::openat2(parent, fresh, flags, Mode::from_raw_mode(0o444), WITHIN)?;
                rustix::fs::fchmod(&file, Mode::from_raw_mode(0o444))?;
                io::Write::write_all(&mut std::fs::File::from(file), text)
            }),
            Node::Link(target) => {
                replace(parent, name, |fresh| Ok(rustix::fs::symlinkat(target, parent, fresh)?))
            }
        })
    }

    /// Takes `path` away if it is `node` still; a directory if it is empty.
    pub fn remove(&self, path: &str, node: &Node) -> io::Result<()> {
        self.in_parent(path, |parent, name| {
            let flags = match node {
                Node::Dir => AtFlags::REMOVEDIR,
                Node::File(_) => AtFlags::empty(),
                Node::Link(target) => {
                    // The name may be another device's by now.
                    let present = rustix::fs::readlinkat(parent, name, Vec::new())?;
                    if present.as_bytes() != target.as_bytes() {
                        return Ok(());
                    }
                    AtFlags::empty()
                }
            };
            Ok(rustix::fs::unlinkat(parent, name, flags)?)
        })
    }

    /// Takes a block node with this device number away; what else is there stays.
    pub fn remove_node(&self, path: &str, rdev: u64) -> io::Result<()> {
        self.in_parent(path, |parent, name| {
            let stat = rustix::fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW)?;
            let is_block = FileType::from_raw_mode(stat.st_mode) == FileType::BlockDevice;
            match is_block && stat.st_rdev == rdev {
                true => Ok(rustix::fs::unlinkat(parent, name, AtFlags::empty())?),
                false => Ok(()),
            }
        })
    }

    fn in_parent(
        &self,
        path: &str,
        work: impl FnOnce(BorrowedFd<'_>, &str) -> io::Result<()>,
    ) -> io::Result<()> {
        let Some((parent, name)) = path.rsplit_once('/') else {
            return work(self.root.as_fd(), path);
        };
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let parent = rustix::fs::openat2(&self.root, parent, flags, Mode::empty(), WITHIN)?;
        work(parent.as_fd(), name)
    }
}

/// How paths are looked up in a tree.
const WITHIN: ResolveFlags = ResolveFlags::BENEATH
    .union(ResolveFlags::NO_SYMLINKS)
    .union(ResolveFlags::NO_MAGICLINKS)
    .union(ResolveFlags::NO_XDEV);

/// Has `make` make the new thing under another name, then puts it where the old one is.
fn replace(parent: BorrowedFd<'_>, name: &str, make: impl FnOnce(&str) -> io::Result<()>) -> io::Result<()> {
    let fresh = format!(".{name}.new");
    let _ = rustix::fs::unlinkat(parent, &fresh, AtFlags::empty());
    make(&fresh)?;
    rustix::fs::renameat(parent, &fresh, parent, name).map_err(|error| {
        let _ = rustix::fs::unlinkat(parent, &fresh, AtFlags::empty());
        error.into()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::Read;

    fn tree() -> Option<Tree> {
        match Tree::make(Shape { size: 1 << 20, nodes: 100, uid: 0, gid: 0 }) {
            Ok(tree) => Some(tree),
            Err(error) => {
                eprintln!("skipped: no tmpfs of its own here: {error}");
                None
            }
        }
    }

    fn text(tree: &Tree, path: &str) -> String {
        let file = rustix::fs::openat(&tree.root, path, OFlags::RDONLY, Mode::empty()).unwrap();
        let mut text = String::new();
        File::from(file).read_to_string(&mut text).unwrap();
        text
    }

    fn names(tree: &Tree) -> Vec<String> {
        // The descriptor of a mount leads to it, but cannot be read.
        let dir = rustix::fs::openat(&tree.root, ".", OFlags::RDONLY, Mode::empty()).unwrap();
        let dir = rustix::fs::Dir::read_from(&dir).unwrap();
        let names = dir.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned());
        let mut names: Vec<_> = names.filter(|name| name != "." && name != "..").collect();
        names.sort();
        names
    }

    #[test]
    fn puts_replaces_and_removes() {
        let Some(tree) = tree() else { return };
        let (one, two) = (Node::File("one\n".into()), Node::File("two\n".into()));
        tree.put("d", &Node::Dir).unwrap();
        tree.put("d", &Node::Dir).unwrap();
        tree.put("d/f", &one).unwrap();
        assert_eq!(text(&tree, "d/f"), "one\n");
        tree.put("d/f", &two).unwrap();
        assert_eq!(text(&tree, "d/f"), "two\n");
        let (link, other) = (Node::Link("d/f".into()), Node::Link("d/g".into()));
        tree.put("l", &link).unwrap();
        assert_eq!(names(&tree), ["d", "l"], "nothing else is left");
        tree.put("l", &other).unwrap();
        tree.remove("l", &link).unwrap();
        assert_eq!(names(&tree), ["d", "l"], "it is another's link by now");
        tree.remove("l", &other).unwrap();
        tree.remove("d/f", &two).unwrap();
        tree.remove("d", &Node::Dir).unwrap();
        assert!(names(&tree).is_empty());
    }

    #[test]
    fn a_tenant_cannot_lead_us_astray() {
        let Some(tree) = tree() else { return };
        let outside = tempfile::tempdir().unwrap();
        let file = Node::File("x".into());
        // A link where a directory was.
        rustix::fs::symlinkat(outside.path(), &tree.root, "d").unwrap();
        assert!(tree.put("d/f", &file).is_err());
        assert!(tree.put("../f", &file).is_err());
        // A link where a file was, and where the new file is made.
        let victim = outside.path().join("victim");
        std::fs::write(&victim, "safe").unwrap();
        rustix::fs::symlinkat(&victim, &tree.root, "f").unwrap();
        rustix::fs::symlinkat(&victim, &tree.root, ".f.new").unwrap();
        tree.put("f", &file).unwrap();
        assert_eq!(std::fs::read_to_string(&victim).unwrap(), "safe");
        assert_eq!(text(&tree, "f"), "x");
        // A directory where a file should be: an error, and nothing else.
        rustix::fs::mkdirat(&tree.root, "g", Mode::from_raw_mode(0o755)).unwrap();
        assert!(tree.put("g", &file).is_err());
        assert!(tree.remove("g", &file).is_err());
        assert_eq!(std::fs::read_dir(outside.path()).unwrap().count(), 1);
    }

    #[test]
    fn it_is_bounded() {
        let Some(tree) = tree() else { return };
        let fails = (0..200).any(|n| tree.put(&format!("f{n}"), &Node::File("x".into())).is_err());
        assert!(fails, "200 files in a tree for 100");
    }
}
