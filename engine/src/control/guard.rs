// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A varlink socket that passes zlink one whole message at a time, without descriptors.
//!
//! It enforces an idle deadline, a deadline per message, a write deadline, a stop switch, and size
//! limits. Descriptors go to the connection's [`Inbox`], from which the call takes them; the rest
//! are closed before the next message is read, on a thread of the connection's own.
//!
//! zlink reads a connection only while it handles no call. So ending the connection at the next
//! read lets a call in progress send its reply first.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, timeout, timeout_at};
use zlink::connection::PassedCredentials;
use zlink::connection::socket::{ReadHalf, ReadResult, Socket, WriteHalf};

use super::link::Link;
use super::slots::ConnectionSlot;
use crate::limits::{
    CONTROL_DESCRIPTORS_MAX, MESSAGE_MAX, MESSAGE_TIME_MAX, PRIVATE_DESCRIPTORS_MAX, PRIVATE_IDLE_MAX,
};
use crate::received::{Disposal, Received};

/// Deadline for a client to read a reply.
const WRITE_MAX: Duration = Duration::from_secs(10);
/// Deadline to close the descriptors of the last message before the next is read.
const CLOSE_MAX: Duration = Duration::from_secs(5);
const READ_BYTES: usize = 4096;

/// The limits of a connection.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bounds {
    /// Maximum bytes of a message.
    pub(super) bytes: usize,
    /// Maximum descriptors since the last complete message.
    pub(super) descriptors: usize,
    /// Maximum time between messages.
    pub(super) idle: Duration,
    /// Maximum time for a message, from its first byte.
    pub(super) message: Duration,
}

/// The limits of the control socket.
pub(super) const CONTROL: Bounds = Bounds {
    bytes: 1 << 20,
    descriptors: CONTROL_DESCRIPTORS_MAX,
    idle: Duration::from_secs(60),
    message: MESSAGE_TIME_MAX,
};

/// The limits of the socket for private pools: its calls are small, and its clients do not wait
/// between them.
pub(super) const PRIVATE: Bounds = Bounds {
    bytes: MESSAGE_MAX,
    descriptors: PRIVATE_DESCRIPTORS_MAX,
    idle: PRIVATE_IDLE_MAX,
    message: MESSAGE_TIME_MAX,
};

/// The descriptors of the message in progress.
#[derive(Clone, Debug)]
pub struct Inbox(Arc<Mutex<Vec<Received>>>, Disposal);

impl Inbox {
    fn files(&self) -> MutexGuard<'_, Vec<Received>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes all of them, for the call.
    pub(super) fn take(&self) -> Vec<Received> {
        std::mem::take(&mut *self.files())
    }

    /// Keeps the descriptors of a reply, whose last reference zlink would otherwise close.
    pub(super) fn keep(&self, files: impl IntoIterator<Item = OwnedFd>) {
        self.files().extend(files.into_iter().map(|file| Received::new(file, &self.1)));
    }
}

/// The guarded socket.
#[derive(Debug)]
pub(super) struct Guarded {
    link: Arc<Link>,
    slot: Option<Arc<ConnectionSlot>>,
    stop: watch::Receiver<bool>,
    bounds: Bounds,
    inbox: Inbox,
}

impl Guarded {
    /// `slot`: if calls are limited.
    pub(super) fn new(
        link: Link,
        slot: Option<Arc<ConnectionSlot>>,
        stop: watch::Receiver<bool>,
        bounds: Bounds,
    ) -> Self {
        let inbox = Inbox(Arc::default(), link.disposal().clone());
        Self { link: Arc::new(link), slot, stop, bounds, inbox }
    }

    pub(super) fn inbox(&self) -> Inbox {
        self.inbox.clone()
    }
}

impl Socket for Guarded {
    type ReadHalf = GuardedRead;
    type WriteHalf = GuardedWrite;

    const CAN_TRANSFER_FDS: bool = true;

    fn split(self) -> (GuardedRead, GuardedWrite) {
        let Self { link, slot, stop, bounds, inbox } = self;
        let write = GuardedWrite { link: Arc::clone(&link) };
        let incoming = Incoming { link, bounds, buffer: Vec::new(), files: Vec::new() };
        (GuardedRead { incoming, slot, stop, inbox, message: 0..0 }, write)
    }
}

#[derive(Debug)]
pub(super) struct GuardedRead {
    incoming: Incoming,
    slot: Option<Arc<ConnectionSlot>>,
    stop: watch::Receiver<bool>,
    inbox: Inbox,
    /// The part of the message at the start of the buffer that zlink has not read yet.
    message: std::ops::Range<usize>,
}

impl ReadHalf for GuardedRead {
    async fn read(&mut self, buf: &mut [u8]) -> zlink::Result<ReadResult> {
        if self.message.is_empty() {
            if let Some(slot) = &self.slot {
                slot.end_call();
            }
            drop(self.inbox.take());
            self.incoming.buffer.drain(..self.message.end);
            self.message = 0..0;
            let (slot, incoming) = (self.slot.clone(), &mut self.incoming);
            let evicted = async {
                match &slot {
                    Some(slot) => slot.evicted().await,
                    None => std::future::pending().await,
                }
            };
            let end = tokio::select! {
                biased;
                // Also if the sender is gone: then the server has ended.
                _ = self.stop.wait_for(|&stop| stop) => Err(zlink::Error::UnexpectedEof),
                () = evicted => Err(zlink::Error::UnexpectedEof),
                end = incoming.message(slot.as_deref()) => end,
            }?;
            *self.inbox.files() = self.incoming.files.drain(..).map(|(_, file)| file).collect();
            self.message = 0..end;
        }
        let part = self.incoming.buffer.get(self.message.clone()).unwrap_or_default();
        let bytes = part.len().min(buf.len());
        buf[..bytes].copy_from_slice(&part[..bytes]);
        self.message.start += bytes;
        Ok(ReadResult::new(bytes))
    }
}

/// Received data that is not handled yet.
#[derive(Debug)]
struct Incoming {
    link: Arc<Link>,
    bounds: Bounds,
    buffer: Vec<u8>,
    /// Each with the position of the byte that it arrived with.
    files: Vec<(usize, Received)>,
}

impl Incoming {
    /// Waits until the buffer starts with a whole message, whose descriptors are the only ones, and
    /// until its call may begin. Returns its length.
    async fn message(&mut self, slot: Option<&ConnectionSlot>) -> zlink::Result<usize> {
        let Bounds { bytes, idle, message, .. } = self.bounds;
        let mut deadline = Instant::now() + if self.buffer.is_empty() { idle } else { message };
        let end = loop {
            if let Some(nul) = self.buffer.iter().position(|&byte| byte == 0) {
                break nul + 1;
            }
            if self.buffer.len() >= bytes {
                return Err(zlink::Error::BufferOverflow);
            }
            let first = self.buffer.is_empty();
            timeout_at(deadline, self.more()).await.unwrap_or(Err(zlink::Error::SocketRead))?;
            if first {
                deadline = Instant::now() + message;
            }
        };
        // Descriptors belong to their own message: none of a next one may be here yet.
        if self.files.iter().any(|(at, _)| *at >= end) {
            return Err(zlink::Error::BufferOverflow);
        }
        // A client whose descriptors cannot be closed must not send more.
        let closed = timeout(CLOSE_MAX, self.link.disposal().finished());
        closed.await.map_err(|_| zlink::Error::SocketRead)?;
        if let Some(slot) = slot {
            slot.begin_call().await;
        }
        Ok(end)
    }

    async fn more(&mut self) -> zlink::Result<()> {
        if self.link.is_broken() {
            return Err(zlink::Error::UnexpectedEof);
        }
        let mut buf = [0; READ_BYTES];
        let part = self.link.read(&mut buf).await?;
        if part.bytes == 0 {
            return Err(zlink::Error::UnexpectedEof);
        }
        self.buffer.extend_from_slice(buf.get(..part.bytes).unwrap_or_default());
        let at = self.buffer.len() - 1;
        self.files.extend(part.files.into_iter().map(|file| (at, file)));
        if part.truncated || self.files.len() > self.bounds.descriptors {
            return Err(zlink::Error::BufferOverflow);
        }
        Ok(())
    }
}

#[derive(Debug)]
pub(super) struct GuardedWrite {
    link: Arc<Link>,
}

impl WriteHalf for GuardedWrite {
    /// A failed write is not an error here: the connection ends at the next read.
    async fn write(
        &mut self,
        buf: &[u8],
        fds: &[impl AsFd],
        _credentials: Option<&PassedCredentials>,
    ) -> zlink::Result<()> {
        let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        let written = timeout(WRITE_MAX, self.link.write(buf, &fds)).await;
        match written {
            Ok(Ok(())) => return Ok(()),
            Ok(Err(error)) => tracing::debug!("cannot send a reply: {error}"),
            Err(_) => tracing::debug!("a client did not read its reply in time"),
        }
        self.link.set_broken();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::UnixStream;

    fn pair(bounds: Bounds) -> (UnixStream, GuardedRead, watch::Sender<bool>) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (stop, stopping) = watch::channel(false);
        let link = Link::new(ours, Disposal::new(0, ()), i32::MAX);
        (theirs, Guarded::new(link, None, stopping, bounds).split().0, stop)
    }

    #[tokio::test]
    async fn ends_an_idle_connection() {
        let (_theirs, mut read, _stop) = pair(Bounds { idle: Duration::from_millis(30), ..PRIVATE });
        let started = Instant::now();
        let error = read.read(&mut [0; 8]).await.unwrap_err();
        assert!(matches!(error, zlink::Error::SocketRead), "{error}");
        assert!(started.elapsed() >= Duration::from_millis(30));
    }

    #[tokio::test]
    async fn a_trickled_message_has_a_deadline() {
        let (theirs, mut read, _stop) = pair(Bounds { message: Duration::from_millis(60), ..PRIVATE });
        let started = Instant::now();
        let trickle = async {
            while theirs.try_write(b"x").is_ok() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        let mut buf = [0; 8];
        let error = tokio::select! {
            read = read.read(&mut buf) => read.unwrap_err(),
            () = trickle => panic!("it takes nothing more"),
        };
        assert!(matches!(error, zlink::Error::SocketRead), "{error}");
        assert!(started.elapsed() >= Duration::from_millis(60));
    }

    #[tokio::test]
    async fn passes_messages_one_by_one_in_pieces() {
        let (theirs, mut read, _stop) = pair(PRIVATE);
        theirs.try_write(b"hello\0again\0").unwrap();
        let mut buf = [0; 4];
        for want in [&b"hell"[..], b"o\0", b"agai", b"n\0"] {
            let bytes = read.read(&mut buf).await.unwrap().bytes_read();
            assert_eq!(&buf[..bytes], want);
        }
    }

    #[tokio::test]
    async fn ends_a_connection_with_too_long_a_message() {
        let (theirs, mut read, _stop) = pair(Bounds { bytes: 6, ..PRIVATE });
        theirs.try_write(b"hello again").unwrap();
        let error = read.read(&mut [0; 8]).await.unwrap_err();
        assert!(matches!(error, zlink::Error::BufferOverflow), "{error}");
    }

    #[tokio::test]
    async fn a_stop_ends_the_connection_permanently() {
        let (theirs, mut read, stop) = pair(PRIVATE);
        theirs.try_write(b"hello\0").unwrap();
        assert_eq!(read.read(&mut [0; 8]).await.unwrap().bytes_read(), 6);
        stop.send(true).unwrap();
        theirs.try_write(b"again\0").unwrap();
        for _ in 0..2 {
            let error = read.read(&mut [0; 8]).await.unwrap_err();
            assert!(matches!(error, zlink::Error::UnexpectedEof), "{error}");
        }
    }
}
