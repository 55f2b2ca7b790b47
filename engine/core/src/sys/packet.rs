// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Messages with descriptors, over a pair of sockets that keeps them apart.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};

/// Descriptors of a message at the most.
const FDS_MAX: usize = 4;

/// What came.
#[derive(Debug)]
pub struct Packet {
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// Its descriptors.
    pub fds: Vec<OwnedFd>,
    /// Nothing of it was cut off.
    pub whole: bool,
}

/// Two ends.
pub fn pair() -> rustix::io::Result<(OwnedFd, OwnedFd)> {
    socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
}

/// Sends, if there is room for it.
pub fn send(socket: BorrowedFd<'_>, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> rustix::io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(Errno::INVAL);
    }
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    sendmsg(socket, &[IoSlice::new(bytes)], &mut control, flags).map(drop)
}

/// Waits for a message of at most so many bytes. None: the other end is closed.
pub fn receive(socket: BorrowedFd<'_>, max: usize) -> rustix::io::Result<Option<Packet>> {
    let mut bytes = vec![0; max];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let got = rustix::io::retry_on_intr(|| {
        recvmsg(socket, &mut [IoSliceMut::new(&mut bytes)], &mut control, RecvFlags::CMSG_CLOEXEC)
    })?;
    if got.bytes == 0 {
        return Ok(None);
    }
    bytes.truncate(got.bytes);
    let fds = control.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(fds) => Some(fds),
        _ => None,
    });
    let fds = fds.flatten().collect();
    Ok(Some(Packet { bytes, fds, whole: !got.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn messages_stay_apart_and_are_cut_visibly() {
        let (one, two) = pair().unwrap();
        let file = std::fs::File::open("/dev/null").unwrap();
        send(one.as_fd(), b"first", &[file.as_fd(), file.as_fd()]).unwrap();
        send(one.as_fd(), b"second", &[]).unwrap();
        let first = receive(two.as_fd(), 16).unwrap().unwrap();
        assert_eq!((&first.bytes[..], first.fds.len(), first.whole), (&b"first"[..], 2, true));
        let second = receive(two.as_fd(), 3).unwrap().unwrap();
        assert_eq!((&second.bytes[..], second.fds.len(), second.whole), (&b"sec"[..], 0, false));
        assert_eq!(send(one.as_fd(), b"x", &[file.as_fd(); 9]), Err(Errno::INVAL));
        drop(one);
        assert!(receive(two.as_fd(), 16).unwrap().is_none());
    }
}
