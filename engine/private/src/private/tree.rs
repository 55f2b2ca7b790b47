// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A tmpfs that the daemon creates and keeps updating after it has passed the mount to a client.
//!
//! The holder of the mount may add files or mounts. So every path lookup starts at the descriptor,
//! follows no link, and stays on the file system: a tenant can damage only its own view. A tmpfs
//! never blocks the daemon. Does not know the meaning of the files.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_string, fsmount, fsopen,
};

/// The directory in the tenant's /dev on which loopfs is mounted. Not `loop`: libloop would search
/// for devices in it.
pub const LOOPFS: &str = "loopfs";

/// The directory in the tenant's /dev with links by device number, as udev makes them.
pub const DEV_BLOCK: &str = "block";

/// A file of the tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TreeNode {
    /// A directory.
    Dir,
    /// A file with this content, readable for all.
    File(Vec<u8>),
    /// A symbolic link.
    Link(String),
}

/// Size limits of a tree, and the owner of its root.
#[derive(Clone, Copy, Debug)]
pub struct TreeOptions {
    /// Bytes.
    pub size: u64,
    /// Maximum number of files, directories and links.
    pub nodes: u64,
    /// Owner of the root.
    pub uid: u32,
    /// Group of the root.
    pub gid: u32,
}

/// A tree, by a descriptor of its root.
#[derive(Debug)]
pub struct Tree {
    root: OwnedFd,
}

impl Tree {
    /// Creates an empty tree, as a detached mount.
    pub fn make(options: TreeOptions) -> io::Result<Tree> {
        let context = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
        let TreeOptions { size, nodes, uid, gid } = options;
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

    /// Takes over a mounted tree, which must be a tmpfs: any other file system may block later.
    /// This call itself may block on the file system of `root`.
    pub fn adopt(root: OwnedFd) -> io::Result<Tree> {
        let is_directory = FileType::from_raw_mode(rustix::fs::fstat(&root)?.st_mode) == FileType::Directory;
        match is_directory && rustix::fs::fstatfs(&root)?.f_type == libc::TMPFS_MAGIC {
            true => Ok(Tree { root }),
            false => Err(io::Error::other("it is not a directory of a tmpfs")),
        }
    }

    /// The mount, for a client.
    pub fn mount(&self) -> io::Result<OwnedFd> {
        self.root.try_clone()
    }

    /// Creates `path`, or replaces a file of the same type. Its directory must exist.
    pub fn put(&self, path: &str, node: &TreeNode) -> io::Result<()> {
        self.update().put(path, node)
    }

    /// Starts several changes, of which those in one directory look it up once.
    pub fn update(&self) -> TreeUpdate<'_> {
        TreeUpdate { tree: self, parent: None }
    }

    /// Removes a block node with this device number, and nothing else.
    pub fn remove_node(&self, path: &str, rdev: u64) -> io::Result<()> {
        self.update().in_parent(path, |parent, name| {
            let stat = rustix::fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW)?;
            let is_block = FileType::from_raw_mode(stat.st_mode) == FileType::BlockDevice;
            match is_block && stat.st_rdev == rdev {
                true => Ok(rustix::fs::unlinkat(parent, name, AtFlags::empty())?),
                false => Ok(()),
            }
        })
    }
}

/// Changes of a tree.
#[derive(Debug)]
pub struct TreeUpdate<'a> {
    tree: &'a Tree,
    /// The directory of the last change, with its path.
    parent: Option<(String, OwnedFd)>,
}

impl TreeUpdate<'_> {
    /// See [`Tree::put`].
    pub fn put(&mut self, path: &str, node: &TreeNode) -> io::Result<()> {
        self.in_parent(path, |parent, name| match node {
            TreeNode::Dir => match rustix::fs::mkdirat(parent, name, Mode::from_raw_mode(0o755)) {
                // The daemon's umask may be stricter.
                Ok(()) => {
                    Ok(rustix::fs::chmodat(parent, name, Mode::from_raw_mode(0o755), AtFlags::empty())?)
                }
                Err(rustix::io::Errno::EXIST) => Ok(()),
                Err(error) => Err(error.into()),
            },
            // Replaces the file, not its content: readers get the old or the new one.
            TreeNode::File(text) => replace(parent, name, |temporary| {
                let flags =
                    OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let file =
                    rustix::fs::openat2(parent, temporary, flags, Mode::from_raw_mode(0o444), LOOKUP_FLAGS)?;
                rustix::fs::fchmod(&file, Mode::from_raw_mode(0o444))?;
                io::Write::write_all(&mut std::fs::File::from(file), text)
            }),
            TreeNode::Link(target) => {
                replace(parent, name, |temporary| Ok(rustix::fs::symlinkat(target, parent, temporary)?))
            }
        })
    }

    /// Removes `path`: a link only if it is `node`, a directory only if it is empty.
    pub fn remove(&mut self, path: &str, node: &TreeNode) -> io::Result<()> {
        self.in_parent(path, |parent, name| {
            let flags = match node {
                TreeNode::Dir => AtFlags::REMOVEDIR,
                TreeNode::File(_) => AtFlags::empty(),
                TreeNode::Link(target) => {
                    // Another device may have the name by now.
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

    fn in_parent(
        &mut self,
        path: &str,
        work: impl FnOnce(BorrowedFd<'_>, &str) -> io::Result<()>,
    ) -> io::Result<()> {
        let Some((parent, name)) = path.rsplit_once('/') else {
            return work(self.tree.root.as_fd(), path);
        };
        let directory = match self.parent.take().filter(|(path, _)| path == parent) {
            Some((_, directory)) => directory,
            None => {
                let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
                rustix::fs::openat2(&self.tree.root, parent, flags, Mode::empty(), LOOKUP_FLAGS)?
            }
        };
        let (_, directory) = self.parent.insert((parent.to_owned(), directory));
        work(directory.as_fd(), name)
    }
}

/// Restrictions of a path lookup in a tree.
const LOOKUP_FLAGS: ResolveFlags = ResolveFlags::BENEATH
    .union(ResolveFlags::NO_SYMLINKS)
    .union(ResolveFlags::NO_MAGICLINKS)
    .union(ResolveFlags::NO_XDEV);

/// Creates a file under a temporary name, then renames it over the old one.
fn replace(parent: BorrowedFd<'_>, name: &str, make: impl Fn(&str) -> io::Result<()>) -> io::Result<()> {
    let temporary = format!(".{name}.new");
    make(&temporary).or_else(|error| match error.kind() {
        // The tenant has made one, or this program failed to rename one.
        io::ErrorKind::AlreadyExists => {
            rustix::fs::unlinkat(parent, &temporary, AtFlags::empty())?;
            make(&temporary)
        }
        _ => Err(error),
    })?;
    rustix::fs::renameat(parent, &temporary, parent, name).map_err(|error| {
        let _ = rustix::fs::unlinkat(parent, &temporary, AtFlags::empty());
        error.into()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::Read;

    fn tree() -> Option<Tree> {
        match Tree::make(TreeOptions { size: 1 << 20, nodes: 100, uid: 0, gid: 0 }) {
            Ok(tree) => Some(tree),
            Err(error) => {
                eprintln!("skipped: cannot create a tmpfs here: {error}");
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
        // The descriptor of a mount is an O_PATH one.
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
        let (one, two) = (TreeNode::File("one\n".into()), TreeNode::File("two\n".into()));
        tree.put("d", &TreeNode::Dir).unwrap();
        tree.put("d", &TreeNode::Dir).unwrap();
        tree.put("d/f", &one).unwrap();
        assert_eq!(text(&tree, "d/f"), "one\n");
        tree.put("d/f", &two).unwrap();
        assert_eq!(text(&tree, "d/f"), "two\n");
        let (link, other) = (TreeNode::Link("d/f".into()), TreeNode::Link("d/g".into()));
        tree.put("l", &link).unwrap();
        assert_eq!(names(&tree), ["d", "l"], "nothing else is left");
        tree.put("l", &other).unwrap();
        tree.update().remove("l", &link).unwrap();
        assert_eq!(names(&tree), ["d", "l"], "another device has the link by now");
        tree.update().remove("l", &other).unwrap();
        tree.update().remove("d/f", &two).unwrap();
        tree.update().remove("d", &TreeNode::Dir).unwrap();
        assert!(names(&tree).is_empty());
    }

    #[test]
    fn follows_no_links_of_a_tenant() {
        let Some(tree) = tree() else { return };
        let outside = tempfile::tempdir().unwrap();
        let file = TreeNode::File("x".into());
        // A link in place of a directory.
        rustix::fs::symlinkat(outside.path(), &tree.root, "d").unwrap();
        assert!(tree.put("d/f", &file).is_err());
        assert!(tree.put("../f", &file).is_err());
        // A link in place of a file, and of the temporary file.
        let victim = outside.path().join("victim");
        std::fs::write(&victim, "safe").unwrap();
        rustix::fs::symlinkat(&victim, &tree.root, "f").unwrap();
        rustix::fs::symlinkat(&victim, &tree.root, ".f.new").unwrap();
        tree.put("f", &file).unwrap();
        assert_eq!(std::fs::read_to_string(&victim).unwrap(), "safe");
        assert_eq!(text(&tree, "f"), "x");
        // A directory in place of a file is an error.
        rustix::fs::mkdirat(&tree.root, "g", Mode::from_raw_mode(0o755)).unwrap();
        assert!(tree.put("g", &file).is_err());
        assert!(tree.update().remove("g", &file).is_err());
        assert_eq!(std::fs::read_dir(outside.path()).unwrap().count(), 1);
    }

    #[test]
    fn limits_the_number_of_files() {
        let Some(tree) = tree() else { return };
        let fails = (0..200).any(|n| tree.put(&format!("f{n}"), &TreeNode::File("x".into())).is_err());
        assert!(fails, "200 files in a tree for 100");
    }
}
