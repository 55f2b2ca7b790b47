//! A varlink socket with an idle deadline, a write deadline and a stop switch.
//!
//! zlink reads a connection only while no call of it is being handled. So ending the connection at
//! the next read lets a call that is being handled send its answer first.

use std::os::fd::AsFd;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::timeout;
use zlink::connection::PassedCredentials;
use zlink::connection::socket::{ReadHalf, ReadResult, Socket, WriteHalf};
use zlink::tokio::unix::Stream;

/// A connection on which nothing comes for this long is closed.
const IDLE_MAX: Duration = Duration::from_secs(60);

/// A client that does not take its answer for this long is left.
const WRITE_MAX: Duration = Duration::from_secs(10);

/// See the module.
#[derive(Debug)]
pub(super) struct Guarded {
    stream: Stream,
    stop: watch::Receiver<bool>,
}

impl Guarded {
    pub(super) fn new(stream: Stream, stop: watch::Receiver<bool>) -> Self {
        Self { stream, stop }
    }
}

impl Socket for Guarded {
    type ReadHalf = GuardedRead;
    type WriteHalf = GuardedWrite;

    const CAN_TRANSFER_FDS: bool = true;

    fn split(self) -> (GuardedRead, GuardedWrite) {
        let (read, write) = self.stream.split();
        let stop = self.stop;
        (GuardedRead { read, stop }, GuardedWrite { write })
    }
}

#[derive(Debug)]
pub(super) struct GuardedRead {
    read: <Stream as Socket>::ReadHalf,
    stop: watch::Receiver<bool>,
}

impl ReadHalf for GuardedRead {
    async fn read(&mut self, buf: &mut [u8]) -> zlink::Result<ReadResult> {
        tokio::select! {
            biased;
            // Also when the sender is gone: then the server has ended.
            _ = self.stop.wait_for(|&stop| stop) => Err(zlink::Error::UnexpectedEof),
            read = timeout(IDLE_MAX, self.read.read(buf)) => {
                read.unwrap_or(Err(zlink::Error::SocketRead))
            }
        }
    }
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
