//! Accepts connections, refuses strangers, gives every other connection a task of its own.
//!
//! A zlink server handles one call at a time; one server a connection keeps a slow call (an attach
//! that waits for the kernel) from stalling other clients.

use std::cell::RefCell;
use std::collections::HashMap;
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use zlink::tokio::unix::Stream;
use zlink::{ReadyListener, Server};

use super::guard::{Bounds, Guarded, IDLE_MAX};
use super::{Backend, ControlService, PrivateService, oci};
use crate::private::{Caller, Registry};

/// Connections at a time; more wait in the socket's backlog.
pub const CONNECTIONS_MAX: usize = 256;

/// Connections of one plain user to the socket for private pools.
pub const USER_CONNECTIONS_MAX: usize = 16;

/// Programs that use it talk at once.
const PRIVATE_IDLE_MAX: Duration = Duration::from_secs(20);

/// Its calls are small, and few: a listener, a user namespace and a mounter come together.
const PRIVATE_BOUNDS: Bounds = Bounds { bytes: 1 << 16, descriptors: 3 };

/// How long calls that are being handled may take to end after a stop.
const DRAIN_MAX: Duration = Duration::from_secs(30);

/// How long a stranger may take to send the call that is refused.
const REFUSAL_MAX: Duration = Duration::from_secs(2);

/// How much of it is read. It is not parsed.
const REFUSAL_BYTES_MAX: usize = 1 << 16;

const REFUSAL: &[u8] = b"{\"error\":\"org.varlink.service.PermissionDenied\"}\0";

/// Serves `backend` until `stop` becomes true, then lets calls end (with a bound). Runs its
/// connections as local tasks: call it inside a `LocalSet`, as tokio-uring provides one.
pub async fn serve(listener: UnixListener, backend: Arc<dyn Backend>, stop: watch::Receiver<bool>) {
    let stopping = stop.clone();
    let each = move |stream| connection(stream, Arc::clone(&backend), stopping.clone());
    serve_each(listener, stop, each).await;
}

/// The same for the socket of private pools, which everybody may use, and nobody may use up.
pub async fn serve_private(listener: UnixListener, registry: Arc<Registry>, stop: watch::Receiver<bool>) {
    let stopping = stop.clone();
    let users = Rc::new(RefCell::new(HashMap::new()));
    let each = move |stream: UnixStream| {
        private_connection(stream, Arc::clone(&registry), stopping.clone(), Rc::clone(&users))
    };
    serve_each(listener, stop, each).await;
}

/// The same for the socket of container runtimes: one container a connection.
pub async fn serve_oci(listener: UnixListener, registry: Arc<Registry>, stop: watch::Receiver<bool>) {
    let each = move |stream: UnixStream| {
        let registry = Arc::clone(&registry);
        async move {
            let stream = stream.into_std()?;
            stream.set_nonblocking(false)?;
            let took = tokio::task::spawn_blocking(move || oci::take(&stream, &registry)).await;
            match took {
                Ok(Ok((id, pool))) => tracing::info!("container {id:?} uses private pool {pool}"),
                Ok(Err(error)) => tracing::warn!("a container was not taken: {error}"),
                Err(_) => tracing::error!("a container was not taken: a bug in this program"),
            }
            Ok(())
        }
    };
    serve_each(listener, stop, each).await;
}

async fn serve_each<F>(
    listener: UnixListener,
    mut stop: watch::Receiver<bool>,
    each: impl Fn(UnixStream) -> F,
) where
    F: Future<Output = zlink::Result<()>> + 'static,
{
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
                let served = each(stream);
                connections.spawn_local(async move {
                    if let Err(error) = served.await {
                        tracing::debug!("a connection ended: {error}");
                    }
                    drop(slot);
                });
            }
            Err(error) => {
                // Out of descriptors or memory: it passes, and spinning would not help.
                tracing::warn!("cannot accept a connection: {error}");
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

type Users = Rc<RefCell<HashMap<u32, usize>>>;

/// One of a user's connections, counted until it is dropped.
struct Counted(Users, u32);

impl Counted {
    fn new(users: Users, uid: u32) -> Option<Counted> {
        let mut table = users.borrow_mut();
        let count = table.entry(uid).or_default();
        if *count >= USER_CONNECTIONS_MAX && uid != 0 {
            return None;
        }
        *count += 1;
        drop(table);
        Some(Counted(users, uid))
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        let mut table = self.0.borrow_mut();
        if let Some(count) = table.get_mut(&self.1) {
            *count -= 1;
            if *count == 0 {
                table.remove(&self.1);
            }
        }
    }
}

async fn private_connection(
    stream: UnixStream,
    registry: Arc<Registry>,
    stop: watch::Receiver<bool>,
    users: Users,
) -> zlink::Result<()> {
    let peer = stream.peer_cred()?;
    let Some(_counted) = Counted::new(users, peer.uid()) else {
        tracing::debug!("user {} has {USER_CONNECTIONS_MAX} connections already", peer.uid());
        return Ok(timeout(REFUSAL_MAX, refuse(stream)).await.unwrap_or(Ok(()))?);
    };
    let caller = Caller { uid: peer.uid(), gid: peer.gid() };
    let socket = Guarded::bounded(Stream::try_from(stream)?, stop, PRIVATE_IDLE_MAX, PRIVATE_BOUNDS);
    Server::new(ReadyListener::new(socket), PrivateService::new(registry, caller)).run().await
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
