// SPDX-License-Identifier: Apache-2.0 OR MIT
//! One accepted connection: reads and writes with descriptors, and a close that never blocks.
//!
//! Unread descriptors in a socket are closed with it. So a dropped [`Link`] shuts the connection
//! down, and leaves the close to the sender's disposal if there are such descriptors. Knows
//! sockets; does not know messages.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use tokio::io::Interest;
use tokio::net::UnixStream;

use crate::limits::RESERVED_DESCRIPTORS;
use crate::received::{Disposal, Received};

/// Maximum descriptors of one sendmsg(2) (SCM_MAX_FD). There is space for all: the kernel closes
/// the excess on the thread that reads.
const FDS_MAX: usize = 253;
/// Maximum reads to drain a socket; its buffer holds no more.
const READS_MAX: usize = 256;

/// An accepted connection.
#[derive(Debug)]
pub(super) struct Link {
    stream: Option<UnixStream>,
    disposal: Disposal,
    /// A write has failed.
    broken: AtomicBool,
    /// Descriptor numbers from here on are not for clients.
    fd_limit: i32,
}

/// The result of one read. The descriptors arrived with its last byte.
#[derive(Debug)]
pub(super) struct ReceivedChunk {
    pub(super) bytes: usize,
    pub(super) files: Vec<Received>,
    /// Descriptors were dropped, because the process has no more, or no more for clients.
    pub(super) truncated: bool,
}

/// The descriptor number from which on descriptors are reserved for root and the daemon.
pub(super) fn fd_limit() -> i32 {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current.unwrap_or(1 << 30);
    i32::try_from(limit - RESERVED_DESCRIPTORS.min(limit / 2)).unwrap_or(i32::MAX)
}

impl Link {
    /// `fd_limit`: see [`fd_limit`]; a trusted client's descriptors may have any number.
    pub(super) fn new(stream: UnixStream, disposal: Disposal, fd_limit: i32) -> Link {
        Link { stream: Some(stream), disposal, broken: AtomicBool::new(false), fd_limit }
    }

    pub(super) fn disposal(&self) -> &Disposal {
        &self.disposal
    }

    /// A write has failed.
    pub(super) fn is_broken(&self) -> bool {
        self.broken.load(Relaxed)
    }

    pub(super) fn set_broken(&self) {
        self.broken.store(true, Relaxed);
    }

    fn stream(&self) -> io::Result<&UnixStream> {
        self.stream.as_ref().ok_or_else(|| io::ErrorKind::NotConnected.into())
    }

    pub(super) async fn read(&self, buf: &mut [u8]) -> io::Result<ReceivedChunk> {
        self.stream()?.async_io(Interest::READABLE, || self.receive(buf)).await
    }

    fn receive(&self, buf: &mut [u8]) -> io::Result<ReceivedChunk> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let got =
            recvmsg(self.stream()?, &mut [IoSliceMut::new(buf)], &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
        let mut files = Vec::new();
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(received) = message {
                files.extend(received.map(|file| Received::new(file, &self.disposal)));
            }
        }
        let truncated = got.flags.contains(ReturnFlags::CTRUNC)
            || files.iter().any(|file: &Received| file.number() >= self.fd_limit);
        Ok(ReceivedChunk { bytes: got.bytes, files, truncated })
    }

    pub(super) async fn write(&self, bytes: &[u8], files: &[BorrowedFd<'_>]) -> io::Result<()> {
        let mut sent = 0;
        while let Some(rest) = bytes.get(sent..).filter(|rest| !rest.is_empty()) {
            let files = if sent == 0 { files } else { &[] };
            sent += self.stream()?.async_io(Interest::WRITABLE, || self.send(rest, files)).await?;
        }
        Ok(())
    }

    /// Sends what fits without blocking.
    pub(super) fn send(&self, bytes: &[u8], files: &[BorrowedFd<'_>]) -> io::Result<usize> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !files.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(files)) {
            return Err(Errno::TOOMANYREFS.into());
        }
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        Ok(sendmsg(self.stream()?, &[IoSlice::new(bytes)], &mut ancillary, flags)?)
    }

    /// Shuts down the sending side.
    pub(super) fn end_writing(&self) {
        let _ =
            self.stream().map(|stream| rustix::net::shutdown(stream.as_fd(), rustix::net::Shutdown::Write));
    }

    /// Ends when the other side has closed.
    pub(super) async fn closed_by_peer(&self) -> io::Result<()> {
        let stream = self.stream()?;
        loop {
            if stream.ready(Interest::READABLE).await?.is_read_closed() {
                return Ok(());
            }
            // Leaves received data unread, because of its descriptors, and waits for the next
            // event.
            let _ = stream.try_io(Interest::READABLE, || Err::<(), _>(io::ErrorKind::WouldBlock.into()));
        }
    }
}

/// Discards the unread data of `stream`, which nobody can write to any more, up to the first
/// descriptor. False: there is one, or that is unknown.
fn drain(stream: &std::os::unix::net::UnixStream) -> bool {
    let mut buf = [0; 4096];
    for _ in 0..READS_MAX {
        // Without space for descriptors the kernel reports them, and a peek leaves them in the
        // socket.
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        let mut none = RecvAncillaryBuffer::default();
        match recvmsg(stream, &mut [IoSliceMut::new(&mut buf)], &mut none, flags) {
            Ok(got) if got.flags.contains(ReturnFlags::CTRUNC) => return false,
            Ok(got) if got.bytes == 0 => return true,
            Ok(got) => {
                let seen = buf.get_mut(..got.bytes).unwrap_or_default();
                if rustix::net::recv(stream, seen, RecvFlags::DONTWAIT).is_err() {
                    return false;
                }
            }
            Err(_) => return false,
        }
    }
    false
}

impl Drop for Link {
    fn drop(&mut self) {
        let Some(stream) = self.stream.take() else { return };
        match stream.into_std() {
            Ok(stream) => {
                let _ = stream.shutdown(Shutdown::Both);
                if !drain(&stream) {
                    self.disposal.close(stream.into());
                }
            }
            Err(error) => tracing::error!("cannot take a connection from its reactor: {error}"),
        }
    }
}
