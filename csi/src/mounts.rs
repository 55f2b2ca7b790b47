// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The mounts of this machine.

use std::fs;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{major, minor};
use rustix::mount::{UnmountFlags, unmount};

/// A mount, by a line of mountinfo.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// Numbers of the mounted device, as "7:3".
    pub device: String,
    /// What of the file system is mounted; "/": all.
    pub root: String,
    pub path: PathBuf,
    pub read_only: bool,
    pub fs_type: String,
}

/// All mounts; of those on one path, the last is on top.
pub fn all() -> io::Result<Vec<Mount>> {
    let text = fs::read("/proc/self/mountinfo")?;
    Ok(text.split(|byte| *byte == b'\n').filter_map(parse).collect())
}

/// The mount on top of `path`.
pub fn at(path: &Path) -> io::Result<Option<Mount>> {
    let path = resolved(path);
    Ok(all()?.into_iter().rfind(|mount| mount.path == path))
}

/// The mounts of the file system on the device at `node`.
pub fn of_device(node: &str) -> io::Result<Vec<Mount>> {
    let device = numbers(Path::new(node))?;
    Ok(all()?.into_iter().filter(|mount| Some(&mount.device) == device.as_ref()).collect())
}

/// The mounts of the device's node itself on files, as pods have block volumes.
pub fn of_node(node: &str) -> io::Result<Vec<Mount>> {
    let device = numbers(Path::new(node))?;
    let nodes = all()?.into_iter().filter(|mount| mount.fs_type == "devtmpfs" && mount.root != "/");
    Ok(nodes.filter(|mount| device.is_some() && numbers(&mount.path).ok() == Some(device.clone())).collect())
}

/// The numbers of the block device at `path`, as "7:3".
pub fn numbers(path: &Path) -> io::Result<Option<String>> {
    match fs::metadata(path) {
        Ok(meta) if meta.file_type().is_block_device() => {
            Ok(Some(format!("{}:{}", major(meta.rdev()), minor(meta.rdev()))))
        }
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(None),
    }
}

/// True if the device of the mount is gone, as after `loopengine detach --force`.
pub fn is_dead(mount: &Mount) -> bool {
    // File systems without a device of their own have numbers that begin with 0.
    !mount.device.starts_with("0:") && !Path::new("/sys/dev/block").join(&mount.device).exists()
}

/// Unmounts all that is on `path`. Fails if a user holds it.
pub fn remove_all(path: &Path) -> io::Result<()> {
    while at(path)?.is_some() {
        unmount(resolved(path), UnmountFlags::NOFOLLOW)?;
    }
    Ok(())
}

/// The path as the kernel names it. Its last part, which may be on a dead file system, is not visited.
pub fn resolved(path: &Path) -> PathBuf {
    let parent = path.parent().and_then(|parent| parent.canonicalize().ok());
    match (parent, path.file_name()) {
        (Some(parent), Some(name)) => parent.join(name),
        _ => path.to_owned(),
    }
}

fn parse(line: &[u8]) -> Option<Mount> {
    let words: Vec<&[u8]> = line.split(|byte| *byte == b' ').collect();
    let text = |at: usize| words.get(at).map(|word| String::from_utf8_lossy(word).into_owned());
    let separator = words.iter().position(|word| *word == b"-")?;
    Some(Mount {
        device: text(2)?,
        root: text(3)?,
        path: PathBuf::from(std::ffi::OsString::from_vec(unescape(words.get(4)?))),
        read_only: text(5)?.split(',').any(|option| option == "ro"),
        fs_type: text(separator + 1)?,
    })
}

/// Spaces and the like are three octal digits.
fn unescape(word: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(word.len());
    let mut rest = word;
    while let [first, after @ ..] = rest {
        let code = (*first == b'\\').then(|| after.get(..3)).flatten();
        let code = code.and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        plain.push(code.unwrap_or(*first));
        rest = if code.is_some() { &after[3..] } else { after };
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_mountinfo() {
        let line = br"36 35 7:3 / /var/lib/a\040b\134 ro,noatime shared:1 master:2 - ext4 /dev/loop3 rw";
        let mount = parse(line).unwrap();
        assert_eq!(mount.path, Path::new("/var/lib/a b\\"));
        assert_eq!((mount.device.as_str(), mount.root.as_str(), mount.read_only), ("7:3", "/", true));
        assert_eq!(mount.fs_type, "ext4");
        assert_eq!(parse(b""), None);
        assert!(is_dead(&Mount { device: "4095:1048575".into(), ..mount }));
        assert!(!is_dead(&at(Path::new("/")).unwrap().unwrap()));
        assert!(at(Path::new("/proc")).unwrap().is_some());
        assert!(at(Path::new("/proc/self")).unwrap().is_none());
    }
}
