// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The kernel's events of block devices: a disk has changed.
//!
//! Knows netlink(7) messages. Does not know whose disk it is.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::buffer::spare_capacity;
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SocketAddrAny, SocketFlags, SocketType, bind, netlink, recvfrom, socket_with,
};

/// The kernel sends at most 2 KiB.
const MESSAGE_BYTES: usize = 8192;
/// The multicast group of the kernel itself; udev has another.
const KERNEL_GROUP: u32 = 1;
const CHANGED_DISK: &[u8] = b"change@/devices/virtual/block/";

/// A socket that receives the events. Must be opened before the sandbox forbids it.
pub fn open() -> rustix::io::Result<OwnedFd> {
    let protocol = Some(netlink::KOBJECT_UEVENT);
    let socket = socket_with(AddressFamily::NETLINK, SocketType::DGRAM, SocketFlags::CLOEXEC, protocol)?;
    bind(&socket, &netlink::SocketAddrNetlink::new(0, KERNEL_GROUP))?;
    Ok(socket)
}

/// Waits for the next change of a virtual disk and returns its name. None: events were lost.
pub fn next_changed_disk(socket: BorrowedFd<'_>) -> rustix::io::Result<Option<String>> {
    let mut message = Vec::with_capacity(MESSAGE_BYTES);
    loop {
        message.clear();
        let sender = match recvfrom(socket.as_fd(), spare_capacity(&mut message), RecvFlags::empty()) {
            Ok((_, _, sender)) => sender,
            Err(Errno::NOBUFS) => return Ok(None),
            Err(Errno::INTR) => continue,
            Err(error) => return Err(error),
        };
        if is_kernel(sender.as_ref())
            && let Some(disk) = changed_disk(&message)
        {
            return Ok(Some(disk));
        }
    }
}

/// A process can send such a message, too.
fn is_kernel(sender: Option<&SocketAddrAny>) -> bool {
    let sender = sender.and_then(|sender| netlink::SocketAddrNetlink::try_from(sender.clone()).ok());
    sender.is_some_and(|sender| sender.pid() == 0)
}

/// "change@/devices/virtual/block/DISK", then NUL and details.
fn changed_disk(message: &[u8]) -> Option<String> {
    let head = message.split(|byte| *byte == 0).next()?;
    let name = head.strip_prefix(CHANGED_DISK)?;
    (!name.contains(&b'/')).then(|| String::from_utf8(name.to_vec()).ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_changes_of_disks_count() {
        assert_eq!(
            changed_disk(b"change@/devices/virtual/block/loop7\0ACTION=change\0"),
            Some("loop7".into())
        );
        for other in [
            &b"add@/devices/virtual/block/loop7\0"[..],
            b"change@/devices/virtual/block/loop7/loop7p1\0",
            b"change@/devices/virtual/net/lo\0",
            b"",
        ] {
            assert_eq!(changed_disk(other), None);
        }
    }
}
