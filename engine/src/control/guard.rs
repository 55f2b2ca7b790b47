//! A varlink socket with an idle deadline, a write deadline, a stop switch, and bounds on what comes.
//!
//! zlink reads a connection only while no call of it is being handled. So ending the connection at
//! the next read lets a call that is being handled send its answer first.

use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use rustix::io::{FdFlags, fcntl_setfd};
use tokio::sync::watch;
use tokio::time::timeout;
use zlink::connection::PassedCredentials;
use zlink::connection::socket::{ReadHalf, ReadResult, Socket, WriteHalf};
use zlink::tokio::unix::Stream;

/// A connection on which nothing comes for this long is closed.
pub(super) const IDLE_MAX: Duration = Duration::from_secs(60);

/// A client that does not take its answer for this long is left.
const WRITE_MAX: Duration = Duration::from_secs(10);

/// See the module.
#[derive(Debug)]
pub(super) struct Guarded {
    stream: Stream,
    stop: watch::Receiver<bool>,
    idle_max: Duration,
    left: Bounds,
}

/// What may still come on a connection.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bounds {
    /// Bytes of all calls together.
    pub(super) bytes: usize,
    /// Descriptors with one message.
    pub(super) descriptors: usize,
}

impl Guarded {
    /// For a client that is trusted to be brief.
    pub(super) fn new(stream: Stream, stop: watch::Receiver<bool>, idle_max: Duration) -> Self {
        Self::bounded(stream, stop, idle_max, Bounds { bytes: usize::MAX, descriptors: usize::MAX })
    }

    pub(super) fn bounded(
        stream: Stream,
        stop: watch::Receiver<bool>,
        idle_max: Duration,
        left: Bounds,
    ) -> Self {
        Self { stream, stop, idle_max, left }
    }
}

impl Socket for Guarded {
    type ReadHalf = GuardedRead;
    type WriteHalf = GuardedWrite;

    const CAN_TRANSFER_FDS: bool = true;

    fn split(self) -> (GuardedRead, GuardedWrite) {
        let (read, write) = self.stream.split();
        let (stop, idle_max, left) = (self.stop, self.idle_max, self.left);
        (GuardedRead { read, stop, idle_max, left }, GuardedWrite { write })
    }
}

#[derive(Debug)]
pub(super) struct GuardedRead {
    read: <Stream as Socket>::ReadHalf,
    stop: watch::Receiver<bool>,
    idle_max: Duration,
    left: Bounds,
}

impl ReadHalf for GuardedRead {
    async fn read(&mut self, buf: &mut [u8]) -> zlink::Result<ReadResult> {
        let read = tokio::select! {
            biased;
            // Also when the sender is gone: then the server has ended.
            _ = self.stop.wait_for(|&stop| stop) => Err(zlink::Error::UnexpectedEof),
            read = timeout(self.idle_max, self.read.read(buf)) => {
                read.unwrap_or(Err(zlink::Error::SocketRead))
            }
        }?;
        close_on_exec(read.fds())?;
        self.left.bytes = self.left.bytes.saturating_sub(read.bytes_read());
        if self.left.bytes == 0 || read.fds().len() > self.left.descriptors {
            return Err(zlink::Error::BufferOverflow);
        }
        Ok(read)
    }
}

/// zlink does not ask the kernel for it.
pub(super) fn close_on_exec(fds: &[OwnedFd]) -> zlink::Result<()> {
    for fd in fds {
        fcntl_setfd(fd, FdFlags::CLOEXEC).map_err(|error| zlink::Error::Io(error.into()))?;
    }
    Ok(())
}

#[derive(Debug)]
pub(super) struct GuardedWrite {
    write: <Stream as Socket>::WriteHalf,
}

impl WriteHalf for GuardedWrite {
    async fn write(
        &mut self,
        buf: &[u8],
        fds: &[impl AsFd],
        credentials: Option<&PassedCredentials>,
    ) -> zlink::Result<()> {
        timeout(WRITE_MAX, self.write.write(buf, fds, credentials))
            .await
            .unwrap_or(Err(zlink::Error::SocketWrite))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    fn pair(idle_max: Duration) -> (tokio::net::UnixStream, GuardedRead, watch::Sender<bool>) {
        let (ours, theirs) = tokio::net::UnixStream::pair().unwrap();
        let (stop, stopping) = watch::channel(false);
        let guarded = Guarded::new(Stream::try_from(ours).unwrap(), stopping, idle_max);
        (theirs, guarded.split().0, stop)
    }

    #[tokio::test]
    async fn silence_ends_a_connection() {
        let (_theirs, mut read, _stop) = pair(Duration::from_millis(30));
        let started = Instant::now();
        let error = read.read(&mut [0; 8]).await.unwrap_err();
        assert!(matches!(error, zlink::Error::SocketRead), "{error}");
        assert!(started.elapsed() >= Duration::from_millis(30));
    }

    #[tokio::test]
    async fn too_much_ends_it() {
        let (ours, theirs) = tokio::net::UnixStream::pair().unwrap();
        let (_stop, stopping) = watch::channel(false);
        let bounds = Bounds { bytes: 6, descriptors: 0 };
        let stream = Stream::try_from(ours).unwrap();
        let mut read = Guarded::bounded(stream, stopping, Duration::from_secs(60), bounds).split().0;
        theirs.try_write(b"hello").unwrap();
        assert_eq!(read.read(&mut [0; 8]).await.unwrap().bytes_read(), 5);
        theirs.try_write(b"again").unwrap();
        let error = read.read(&mut [0; 8]).await.unwrap_err();
        assert!(matches!(error, zlink::Error::BufferOverflow), "{error}");
    }

    #[tokio::test]
    async fn a_stop_ends_it_at_once_and_for_good() {
        let (theirs, mut read, stop) = pair(Duration::from_secs(60));
        theirs.try_write(b"hello").unwrap();
        assert_eq!(read.read(&mut [0; 8]).await.unwrap().bytes_read(), 5);
        stop.send(true).unwrap();
        theirs.try_write(b"again").unwrap();
        for _ in 0..2 {
            let error = read.read(&mut [0; 8]).await.unwrap_err();
            assert!(matches!(error, zlink::Error::UnexpectedEof), "{error}");
        }
    }
}
