// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The name of a device in /proc/mounts.
//!
//! /dev/loopN is a link into the pool's file system. mount(8) resolves it, so the kernel would
//! record /dev/loopfs/loopN. This module shortens that path in the caller's memory, before the
//! kernel reads it: as the source of mount(2), and as the value of fsconfig(2). The kernel serves
//! the call, by the caller's rights, and finds the same device through the link.
//!
//! A caller that changes the path concurrently only chooses another name, as it could before.

use super::caller::CallerThread;
use super::filter::Abi;
use super::mounts::{address, is_new_mount, read_c_string};

/// The parameter of fsconfig(2) that names the device.
const SOURCE: &[u8] = b"source";
/// The directory of the links, and that of the nodes in it.
const DEV: &[u8] = b"/dev/";
const NODES: &[u8] = b"loopfs/";
/// Maximum bytes of a path that is examined.
const PATH_MAX: usize = 64;

/// Shortens the source of a mount(2).
pub(super) fn mount(thread: &CallerThread<'_>, abi: Abi, args: &[u64; 6]) {
    if is_new_mount(address(abi, args, 3)) {
        shorten_at(thread, address(abi, args, 0));
    }
}

/// Shortens the source of a file system that fsconfig(2) configures.
pub(super) fn fsconfig(thread: &CallerThread<'_>, abi: Abi, args: &[u64; 6]) {
    let key = read_c_string(thread, address(abi, args, 2), SOURCE.len() + 1);
    if key.is_some_and(|key| key == SOURCE) {
        shorten_at(thread, address(abi, args, 3));
    }
}

fn shorten_at(thread: &CallerThread<'_>, address: u64) {
    let name = read_c_string(thread, address, PATH_MAX).and_then(|path| shorten(&path));
    // Optional: the longer path works, too.
    let _ = name.map(|name| thread.write(address, &name));
}

/// The path of the link, with its NUL. None: not a node of loopfs.
fn shorten(path: &[u8]) -> Option<Vec<u8>> {
    let name = path.strip_prefix(DEV)?.strip_prefix(NODES)?;
    let number = std::str::from_utf8(name.strip_prefix(b"loop")?).ok()?;
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let is_device = match number.split_once('p') {
        Some((disk, partition)) => is_number(disk) && is_number(partition),
        None => is_number(number),
    };
    is_device.then(|| [DEV, name, b"\0"].concat())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::private::LOOPFS;

    #[test]
    fn shortens_paths_of_devices_only() {
        assert_eq!(shorten(b"/dev/loopfs/loop0").as_deref(), Some(&b"/dev/loop0\0"[..]));
        assert_eq!(shorten(b"/dev/loopfs/loop12p3").as_deref(), Some(&b"/dev/loop12p3\0"[..]));
        for other in [
            &b"/dev/loop0"[..],
            b"/dev/loopfs/loop-control",
            b"/dev/loopfs/loop",
            b"/dev/loopfs/loop0p",
            b"/dev/loopfs/loop0p1p2",
            b"/dev/loopfs/../loop0",
            b"/mnt/dev/loopfs/loop0",
            b"tmpfs",
            b"",
        ] {
            assert_eq!(shorten(other), None, "{}", String::from_utf8_lossy(other));
        }
    }

    #[test]
    fn knows_the_directory_of_the_nodes() {
        assert_eq!(NODES, [LOOPFS.as_bytes(), b"/"].concat());
    }
}
