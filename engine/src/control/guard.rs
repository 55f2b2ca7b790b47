//! A varlink socket that gives zlink one whole message at a time, and no descriptor ever.
//!
//! It has an idle deadline, a deadline for a whole message, a write deadline, a stop switch, and bounds
//! on what comes. Descriptors go to the connection's [`Inbox`], where the call looks for them; what it
//! leaves there is closed before the next message is read, on a thread of the connection's own.
//!
//! zlink reads a connection only while no call of it is being handled. So ending the connection at
//! the next read lets a call that is being handled send its answer first.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, timeout, timeout_at};
use zlink::connection::PassedCredentials;
use zlink::connection::socket::{ReadHalf, ReadResult, Socket, WriteHalf};

use super::link::Link;
use super::slots::Slot;
use crate::limits::{
    CONTROL_DESCRIPTORS_MAX, MESSAGE_MAX, MESSAGE_TIME_MAX, PRIVATE_DESCRIPTORS_MAX, PRIVATE_IDLE_MAX,
};
use crate::received::{Disposal, Received};

/// A client that does not take its answer for this long is left.
const WRITE_MAX: Duration = Duration::from_secs(10);
/// How long descriptors of the last message may take to close before the next is read.
const CLOSE_MAX: Duration = Duration::from_secs(5);
const READ_BYTES: usize = 4096;

/// What may come on a connection.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bounds {
    /// Bytes of a message.
    pub(super) bytes: usize,
    /// Descriptors since the last complete message.
    pub(super) descriptors: usize,
    /// Time between messages.
    pub(super) idle: Duration,
    /// Time for a message, from its first byte.
    pub(super) message: Duration,
}

/// Of the control socket.
pub(super) const CONTROL: Bounds = Bounds {
    bytes: 1 << 20,
    descriptors: CONTROL_DESCRIPTORS_MAX,
    idle: Duration::from_secs(60),
    message: MESSAGE_TIME_MAX,
};

/// Of the socket for private pools: its calls are small, and programs that use it talk at once.
pub(super) const PRIVATE: Bounds = Bounds {
    bytes: MESSAGE_MAX,
    descriptors: PRIVATE_DESCRIPTORS_MAX,
    idle: PRIVATE_IDLE_MAX,
    message: MESSAGE_TIME_MAX,
};

/// The descriptors of the message that is being handled.
#[derive(Clone, Debug)]
pub struct Inbox(Arc<Mutex<Vec<Received>>>, Disposal);

impl Inbox {
    fn files(&self) -> MutexGuard<'_, Vec<Received>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All of them, for the call.
    pub(super) fn take(&self) -> Vec<Received> {
        std::mem::take(&mut *self.files())
    }

    /// Keeps what an answer brings, whose last reference zlink would otherwise close.
    pub(super) fn keep(&self, files: impl IntoIterator<Item = OwnedFd>) {
        self.files().extend(files.into_iter().map(|file| Received::new(file, &self.1)));
    }
}

/// See the module.
#[derive(Debug)]
pub(super) struct Guarded {
    link: Arc<Link>,
    slot: Option<Arc<Slot>>,
    stop: watch::Receiver<bool>,
    bounds: Bounds,
    inbox: Inbox,
}

impl Guarded {
    /// `slot`: where calls need a share.
    pub(super) fn new(
        link: Link,
        slot: Option<Arc<Slot>>,
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
    slot: Option<Arc<Slot>>,
    stop: watch::Receiver<bool>,
    inbox: Inbox,
    /// What zlink has not read yet of the message at the start of the buffer.
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
                // Also when the sender is gone: then the server has ended.
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

/// What has come and was not handled yet.
#[derive(Debug)]
struct Incoming {
    link: Arc<Link>,
    bounds: Bounds,
    buffer: Vec<u8>,
    /// With the position of the byte that each came with.
    files: Vec<(usize, Received)>,
}

impl Incoming {
    /// Waits until the buffer starts with a whole message, whose descriptors are the only ones, and until
    /// its call may begin. Answers its length.
    async fn message(&mut self, slot: Option<&Slot>) -> zlink::Result<usize> {
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
        // Descriptors come with a message of their own: none of a next one is there yet.
        if self.files.iter().any(|(at, _)| *at >= end) {
            return Err(zlink::Error::BufferOverflow);
        }
        // Who sends what cannot be closed does not go on to send more.
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
        if part.cut || self.files.len() > self.bounds.descriptors {
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
    /// That nobody takes the answer is no failure of ours: the connection ends at the next read.
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
            Ok(Err(error)) => tracing::debug!("an answer was not sent: {error}"),
            Err(_) => tracing::debug!("a client did not take its answer"),
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
    async fn silence_ends_a_connection() {
        let (_theirs, mut read, _stop) = pair(Bounds { idle: Duration::from_millis(30), ..PRIVATE });
        let started = Instant::now();
        let error = read.read(&mut [0; 8]).await.unwrap_err();
        assert!(matches!(error, zlink::Error::SocketRead), "{error}");
        assert!(started.elapsed() >= Duration::from_millis(30));
    }

    #[tokio::test]
    async fn a_message_has_a_deadline_however_it_comes() {
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
    async fn messages_come_one_by_one_and_in_pieces_that_fit() {
        let (theirs, mut read, _stop) = pair(PRIVATE);
        theirs.try_write(b"hello\0again\0").unwrap();
        let mut buf = [0; 4];
        for want in [&b"hell"[..], b"o\0", b"agai", b"n\0"] {
            let bytes = read.read(&mut buf).await.unwrap().bytes_read();
            assert_eq!(&buf[..bytes], want);
        }
    }

    #[tokio::test]
    async fn too_much_ends_it() {
        let (theirs, mut read, _stop) = pair(Bounds { bytes: 6, ..PRIVATE });
        theirs.try_write(b"hello again").unwrap();
        let error = read.read(&mut [0; 8]).await.unwrap_err();
        assert!(matches!(error, zlink::Error::BufferOverflow), "{error}");
    }

    #[tokio::test]
    async fn a_stop_ends_it_at_once_and_for_good() {
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
