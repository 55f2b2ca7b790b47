//! Accepts connections, refuses strangers, gives every other connection a task of its own.
//!
//! A zlink server handles one call at a time; one server a connection keeps a slow call (an attach
//! that waits for the kernel) from stalling other clients.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use zlink::tokio::unix::Stream;
use zlink::{ReadyListener, Server};

use super::guard::{Guarded, IDLE_MAX};
use super::{Backend, ControlService};

/// Connections at a time; more wait in the socket's backlog.
pub const CONNECTIONS_MAX: usize = 256;

/// How long calls that are being handled may take to end after a stop.
const DRAIN_MAX: Duration = Duration::from_secs(30);

/// How long a stranger may take to send the call that is refused.
const REFUSAL_MAX: Duration = Duration::from_secs(2);

/// How much of it is read. It is not parsed.
const REFUSAL_BYTES_MAX: usize = 1 << 16;

const REFUSAL: &[u8] = b"{\"error\":\"org.varlink.service.PermissionDenied\"}\0";

/// Serves `backend` until `stop` becomes true, then lets calls end (with a bound). Runs its
/// connections as local tasks: call it inside a `LocalSet`, as tokio-uring provides one.
pub async fn serve(listener: UnixListener, backend: Arc<dyn Backend>, mut stop: watch::Receiver<bool>) {
    let slots = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            biased;
            _ = stop.wait_for(|&stop| stop) => break,
            accepted = accept(&listener, &slots) => accepted,
        };
        while connections.try_join_next().is_some() {}
        match accepted {
            Ok((stream, slot)) => {
                let (backend, stop) = (Arc::clone(&backend), stop.clone());
                connections.spawn_local(async move {
                    if let Err(error) = connection(stream, backend, stop).await {
                        tracing::debug!("a control connection ended: {error}");
                    }
                    drop(slot);
                });
            }
            Err(error) => {
                // Out of descriptors or memory: it passes, and spinning would not help.
                tracing::warn!("cannot accept a control connection: {error}");
                sleep(Duration::from_millis(100)).await;
            }
        }
    }
    drop(listener);
    let drained = timeout(DRAIN_MAX, async { while connections.join_next().await.is_some() {} });
    if drained.await.is_err() {
        tracing::warn!("{} calls did not end in time", connections.len());
    }
}

async fn accept(
    listener: &UnixListener,
    slots: &Arc<Semaphore>,
) -> io::Result<(UnixStream, tokio::sync::OwnedSemaphorePermit)> {
    let slot = Arc::clone(slots).acquire_owned().await;
    let slot = slot.map_err(io::Error::other)?;
    let (stream, _) = listener.accept().await?;
    Ok((stream, slot))
}

async fn connection(
    stream: UnixStream,
    backend: Arc<dyn Backend>,
    stop: watch::Receiver<bool>,
) -> zlink::Result<()> {
    let peer = stream.peer_cred()?;
    if !admits(peer.uid(), rustix::process::geteuid().as_raw()) {
        tracing::warn!(
            "refused a control connection of user {}, process {}",
            peer.uid(),
            peer.pid().unwrap_or(0)
        );
        return Ok(timeout(REFUSAL_MAX, refuse(stream)).await.unwrap_or(Ok(()))?);
    }
    let socket = Guarded::new(Stream::try_from(stream)?, stop, IDLE_MAX);
    Server::new(ReadyListener::new(socket), ControlService::new(backend)).run().await
}

/// Who may call: root, and the user that the daemon runs as.
fn admits(uid: u32, own_uid: u32) -> bool {
    uid == 0 || uid == own_uid
}

/// Takes the call, unread, so that the caller does not trip over a closed socket; then answers.
async fn refuse(mut stream: UnixStream) -> io::Result<()> {
    let mut buf = [0; 4096];
    let mut total = 0;
    while total < REFUSAL_BYTES_MAX {
        let read = stream.read(&mut buf).await?;
        total += read;
        if read == 0 || buf[..read].contains(&0) {
            break;
        }
    }
    stream.write_all(REFUSAL).await?;
    stream.shutdown().await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_root_and_the_own_user_are_admitted() {
        assert!(admits(0, 0));
        assert!(admits(0, 1000));
        assert!(admits(1000, 1000));
        assert!(!admits(1000, 0));
        assert!(!admits(1001, 1000));
    }
}
