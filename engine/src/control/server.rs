// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Accepts connections, refuses unauthorized ones, runs a task for every other.
//!
//! A zlink server handles one call at a time. One server per connection keeps a slow call (an
//! attach that waits for the kernel) from blocking other clients. All connections share one thread:
//! nothing here may block on a client's file (engine/doc/threads.md).

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use zlink::{ReadyListener, Server};

use super::guard::{self, Guarded};
use super::link::{Link, fd_limit};
use super::refusal::{DENIED, Refusals, TOO_MANY};
use super::slots::ConnectionSlots;
use super::{ControlService, EngineApi, PrivateService, oci, run_blocking};
use crate::accounts;
use crate::counters::CONNECTIONS;
pub use crate::limits::{CONNECTIONS_MAX, USER_CONNECTIONS_MAX};
use crate::private::{Caller, Registry};
use crate::received::Disposal;
use crate::sys::userns;

/// How long calls of root in progress may take to end after a stop.
const DRAIN_MAX: Duration = Duration::from_secs(30);
/// Likewise for calls of everybody.
const PRIVATE_DRAIN_MAX: Duration = Duration::from_secs(5);
/// Maximum connections of container runtimes.
const OCI_CONNECTIONS_MAX: usize = 64;
/// How often /etc/subuid is looked at, at most.
const ACCOUNTS_AGE_MAX: Duration = Duration::from_secs(5);
/// How often a failure to accept is logged, at most.
const WARN_EVERY: Duration = Duration::from_secs(60);
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Serves `backend` until `stop` becomes true, then lets calls end (with a deadline). Runs its
/// connections as local tasks: call it inside a `LocalSet`, as tokio-uring provides one.
pub async fn serve(listener: UnixListener, backend: Arc<dyn EngineApi>, stop: watch::Receiver<bool>) {
    let (stopping, refusals) = (stop.clone(), Arc::default());
    let each = move |stream, permit| {
        connection(stream, permit, Arc::clone(&backend), stopping.clone(), Arc::clone(&refusals))
    };
    Acceptor::new(listener, stop, CONNECTIONS_MAX, DRAIN_MAX).serve(each).await;
}

/// Likewise for the socket of private pools, which everybody may use, and nobody may exhaust.
pub async fn serve_private(listener: UnixListener, registry: Arc<Registry>, stop: watch::Receiver<bool>) {
    let (stopping, slots, refusals) = (stop.clone(), ConnectionSlots::default(), Arc::default());
    let each = move |stream: UnixStream, _| {
        let (registry, stopping) = (Arc::clone(&registry), stopping.clone());
        private_connection(stream, registry, stopping, slots.clone(), Arc::clone(&refusals))
    };
    // Refused connections need no slot, so accept any number.
    let mut acceptor = Acceptor::new(listener, stop, Semaphore::MAX_PERMITS, PRIVATE_DRAIN_MAX);
    acceptor.fd_limit = fd_limit();
    acceptor.serve(each).await;
}

/// Likewise for the socket of container runtimes: one container per connection.
pub async fn serve_oci(listener: UnixListener, registry: Arc<Registry>, stop: watch::Receiver<bool>) {
    let each = move |stream: UnixStream, _permit| {
        let registry = Arc::clone(&registry);
        async move {
            let stream = stream.into_std()?;
            stream.set_nonblocking(false)?;
            match run_blocking(move || oci::take(&stream, &registry)).await {
                Ok((id, pool)) => tracing::info!("container {id:?} uses private pool {pool}"),
                Err(error) => tracing::warn!("cannot serve a container: {error}"),
            }
            Ok(())
        }
    };
    Acceptor::new(listener, stop, OCI_CONNECTIONS_MAX, PRIVATE_DRAIN_MAX).serve(each).await;
}

struct Acceptor {
    listener: UnixListener,
    stop: watch::Receiver<bool>,
    /// Free connection slots; more connections wait in the socket's backlog.
    slots: Arc<Semaphore>,
    drain_max: Duration,
    /// Descriptor numbers from here on are not for connections to this socket.
    fd_limit: i32,
    warned: Option<Instant>,
}

impl Acceptor {
    fn new(
        listener: UnixListener,
        stop: watch::Receiver<bool>,
        slots: usize,
        drain_max: Duration,
    ) -> Acceptor {
        let slots = Arc::new(Semaphore::new(slots));
        Acceptor { listener, stop, slots, drain_max, fd_limit: i32::MAX, warned: None }
    }

    async fn serve<F>(mut self, each: impl Fn(UnixStream, OwnedSemaphorePermit) -> F)
    where
        F: Future<Output = zlink::Result<()>> + 'static,
    {
        let mut connections = JoinSet::new();
        loop {
            let accepted = tokio::select! {
                biased;
                _ = self.stop.wait_for(|&stop| stop) => break,
                accepted = accept(&self.listener, &self.slots) => accepted,
            };
            while connections.try_join_next().is_some() {}
            let full = match accepted {
                Ok((stream, permit)) => {
                    CONNECTIONS.count();
                    let number = stream.as_raw_fd();
                    let served = each(stream, permit);
                    connections.spawn_local(async move {
                        if let Err(error) = served.await {
                            tracing::debug!("a connection ended: {error}");
                        }
                    });
                    (number >= self.fd_limit).then(|| "nearly all descriptors are in use".to_owned())
                }
                // Out of descriptors or memory: temporary, so do not spin.
                Err(error) => Some(error.to_string()),
            };
            if let Some(reason) = full {
                if self.warned.is_none_or(|at| at.elapsed() >= WARN_EVERY) {
                    self.warned = Some(Instant::now());
                    tracing::warn!("cannot accept connections: {reason}");
                }
                sleep(ACCEPT_PAUSE).await;
            }
        }
        // Connections in the backlog are closed with the listener, and may carry descriptors.
        if let Ok(listener) = self.listener.into_std() {
            Disposal::new(0, ()).close(listener.into());
        }
        let drained = timeout(self.drain_max, async { while connections.join_next().await.is_some() {} });
        if drained.await.is_err() {
            tracing::warn!("{} calls did not end in time", connections.len());
        }
    }
}

async fn accept(
    listener: &UnixListener,
    slots: &Arc<Semaphore>,
) -> io::Result<(UnixStream, OwnedSemaphorePermit)> {
    let slot = Arc::clone(slots).acquire_owned().await;
    let slot = slot.map_err(io::Error::other)?;
    let (stream, _) = listener.accept().await?;
    Ok((stream, slot))
}

async fn connection(
    stream: UnixStream,
    permit: OwnedSemaphorePermit,
    backend: Arc<dyn EngineApi>,
    stop: watch::Receiver<bool>,
    refusals: Arc<Refusals>,
) -> zlink::Result<()> {
    let peer = stream.peer_cred()?;
    if !admits(peer.uid(), rustix::process::geteuid().as_raw()) {
        tracing::warn!(
            "refused a control connection of user {}, process {}",
            peer.uid(),
            peer.pid().unwrap_or(0)
        );
        drop(permit);
        refusals.refuse(stream, peer.uid(), DENIED).await;
        return Ok(());
    }
    let link = Link::new(stream, Disposal::new(peer.uid(), permit), i32::MAX);
    let socket = Guarded::new(link, None, stop, guard::CONTROL);
    let service = ControlService::new(backend, socket.inbox());
    Server::new(ReadyListener::new(socket), service).run().await
}

async fn private_connection(
    stream: UnixStream,
    registry: Arc<Registry>,
    stop: watch::Receiver<bool>,
    slots: ConnectionSlots,
    refusals: Arc<Refusals>,
) -> zlink::Result<()> {
    let peer = stream.peer_cred()?;
    if let Some(owner) = userns::owner_of_peer(&stream) {
        accounts::learn(peer.uid(), owner);
    }
    refresh_accounts();
    let (account, fd_limit) = (accounts::of(peer.uid()), if peer.uid() == 0 { i32::MAX } else { fd_limit() });
    let admitted = match stream.as_raw_fd() < fd_limit {
        true => slots.admit(account),
        false => Err("nearly all descriptors are in use".to_owned()),
    };
    let slot = match admitted {
        Ok(slot) => Arc::new(slot),
        Err(reason) => {
            tracing::debug!("refused a connection of user {}: {reason}", peer.uid());
            refusals.refuse(stream, account, TOO_MANY).await;
            return Ok(());
        }
    };
    let pid = peer.pid().and_then(|pid| u32::try_from(pid).ok()).filter(|pid| *pid != 0);
    let caller = Caller { uid: peer.uid(), gid: peer.gid(), pid };
    let link = Link::new(stream, Disposal::new(peer.uid(), Arc::clone(&slot)), fd_limit);
    let socket = Guarded::new(link, Some(slot), stop, guard::PRIVATE);
    let service = PrivateService::new(registry, caller, socket.inbox());
    Server::new(ReadyListener::new(socket), service).run().await
}

/// Refreshes /etc/subuid on another thread, if that is due.
fn refresh_accounts() {
    use std::sync::Mutex;
    static LAST: Mutex<Option<Instant>> = Mutex::new(None);
    let Ok(mut last) = LAST.try_lock() else { return };
    if last.is_none_or(|at| at.elapsed() >= ACCOUNTS_AGE_MAX) {
        *last = Some(Instant::now());
        drop(tokio::task::spawn_blocking(accounts::refresh));
    }
}

/// Whether a user may call: root, and the daemon's user.
fn admits(uid: u32, own_uid: u32) -> bool {
    uid == 0 || uid == own_uid
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn admits_only_root_and_the_own_user() {
        assert!(admits(0, 0));
        assert!(admits(0, 1000));
        assert!(admits(1000, 1000));
        assert!(!admits(1000, 0));
        assert!(!admits(1001, 1000));
    }
}
