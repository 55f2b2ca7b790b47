//! The client of the control socket. Every call has a deadline; every failure to reach the daemon
//! says where it was sought and how to start it.

use std::future::Future;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::net::UnixStream;
use tokio::time::timeout;
use zlink::tokio::unix::{Connection, Stream};
use zlink::varlink_service::Error as Refusal;

use super::calls::Calls;
use super::{Fault, SOCKET, reason};
use crate::error::{Error, Kind, Result};
use crate::instance::Selector;
use crate::instance::spec::*;

/// The daemon answers a call about one device sooner: its own waits are a few seconds each.
pub(super) const ONE_MAX: Duration = Duration::from_secs(60);

/// A call about many devices may take that long.
const MANY_MAX: Duration = Duration::from_secs(600);

pub(super) type Answer<T> = zlink::Result<std::result::Result<T, Fault>>;

/// A connection to the daemon.
#[derive(Debug)]
pub struct Client {
    connection: Connection,
    socket: PathBuf,
    daemon: Option<i32>,
}

impl Client {
    /// Connects to the daemon that serves `run_dir`. Needs a tokio runtime.
    pub async fn connect(run_dir: &Path) -> Result<Client> {
        let socket = run_dir.join(SOCKET);
        let stream = connect(&socket).await?;
        let daemon = stream.peer_cred().ok().and_then(|peer| peer.pid());
        let stream = Stream::try_from(stream).map_err(|error| lost(&socket, error))?;
        Ok(Client { connection: Connection::new(stream), socket, daemon })
    }

    /// The daemon's process, as the kernel knows it.
    pub fn daemon_pid(&self) -> Option<i32> {
        self.daemon
    }

    /// See [`crate::instance::Engine::features`].
    pub async fn features(&mut self) -> Result<Features> {
        let call = self.connection.get_features();
        Ok(answer(&self.socket, ONE_MAX, call).await?.features)
    }

    /// See [`crate::instance::Engine::create_instance`].
    pub async fn create_instance(&mut self, spec: &InstanceSpec) -> Result<InstanceInfo> {
        let call = self.connection.create_instance(spec);
        Ok(answer(&self.socket, ONE_MAX, call).await?.instance)
    }

    /// See [`crate::instance::Engine::instances`].
    pub async fn instances(&mut self) -> Result<Vec<InstanceInfo>> {
        let call = self.connection.list_instances();
        Ok(answer(&self.socket, ONE_MAX, call).await?.instances)
    }

    /// See [`crate::instance::Engine::remove_instance`].
    pub async fn remove_instance(&mut self, name: &str, force: bool) -> Result<()> {
        let call = self.connection.remove_instance(name, force);
        answer(&self.socket, MANY_MAX, call).await
    }

    /// See [`crate::instance::Engine::attach`].
    pub async fn attach(&mut self, spec: &AttachSpec, image: OwnedFd) -> Result<DeviceInfo> {
        let call = self.connection.attach(spec, vec![image]);
        Ok(answer(&self.socket, ONE_MAX, call).await?.device)
    }

    /// See [`crate::instance::Engine::detach`].
    pub async fn detach(&mut self, which: &Selector, force: bool) -> Result<Vec<String>> {
        let (device, instance) = parts(which);
        let all = matches!(which, Selector::All);
        let limit = if device.is_some() { ONE_MAX } else { MANY_MAX };
        let call = self.connection.detach(device, instance, all, force);
        Ok(answer(&self.socket, limit, call).await?.detached)
    }

    /// See [`crate::instance::Engine::resize`].
    pub async fn resize(&mut self, spec: &ResizeSpec) -> Result<DeviceInfo> {
        let call = self.connection.resize(&spec.device, spec.size, spec.shrink, spec.force);
        Ok(answer(&self.socket, ONE_MAX, call).await?.device)
    }

    /// See [`crate::instance::Engine::recover`].
    pub async fn recover(&mut self, spec: &RecoverSpec, image: OwnedFd) -> Result<DeviceInfo> {
        let call = self.connection.recover(spec, vec![image]);
        Ok(answer(&self.socket, ONE_MAX, call).await?.device)
    }

    /// See [`crate::instance::Engine::devices`].
    pub async fn devices(&mut self, which: &Selector) -> Result<Vec<DeviceInfo>> {
        let (device, instance) = parts(which);
        let call = self.connection.list_devices(device, instance);
        Ok(answer(&self.socket, ONE_MAX, call).await?.devices)
    }

    /// See [`crate::instance::Engine::stats`].
    pub async fn stats(&mut self, which: &Selector) -> Result<Vec<DeviceStats>> {
        let (device, instance) = parts(which);
        let call = self.connection.get_stats(device, instance);
        Ok(answer(&self.socket, ONE_MAX, call).await?.stats)
    }
}

/// Connects, or says how to start the daemon.
pub(super) async fn connect(socket: &Path) -> Result<UnixStream> {
    match timeout(ONE_MAX, UnixStream::connect(socket)).await {
        Ok(Ok(stream)) => Ok(stream),
        Ok(Err(error)) => Err(unreachable(socket, &error)),
        Err(_) => Err(late(socket, ONE_MAX)),
    }
}

fn parts(which: &Selector) -> (Option<&str>, Option<&str>) {
    match which {
        Selector::Device(device) => (Some(device), None),
        Selector::Instance(instance) => (None, Some(instance)),
        Selector::All => (None, None),
    }
}

pub(super) async fn answer<T>(
    socket: &Path,
    limit: Duration,
    call: impl Future<Output = Answer<T>>,
) -> Result<T> {
    match timeout(limit, call).await {
        Ok(Ok(answer)) => answer.map_err(Error::from),
        Ok(Err(error)) => Err(lost(socket, error)),
        Err(_) => Err(late(socket, limit)),
    }
}

pub(super) fn unreachable(socket: &Path, error: &std::io::Error) -> Error {
    let shown = socket.display();
    let denied = error.kind() == std::io::ErrorKind::PermissionDenied;
    let message = format!("cannot reach the daemon at {shown}: {}", reason(error));
    if denied {
        return Error::new(Kind::Denied, message).hint("run this as root");
    }
    Error::new(Kind::Unavailable, message).hint("start it with 'loopengine serve'")
}

pub(super) fn late(socket: &Path, limit: Duration) -> Error {
    let (shown, seconds) = (socket.display(), limit.as_secs());
    let message = format!("the daemon at {shown} did not answer within {seconds} s");
    Error::new(Kind::Deadline, message).hint("look at its log")
}

/// The connection, not the daemon's work, failed.
pub(super) fn lost(socket: &Path, error: zlink::Error) -> Error {
    let shown = socket.display();
    match error {
        zlink::Error::VarlinkService(error) if *error.inner() == Refusal::PermissionDenied => {
            let message = format!("the daemon at {shown} does not let this user in");
            Error::new(Kind::Denied, message).hint("run this as root")
        }
        zlink::Error::VarlinkService(error) => {
            let message = format!("the daemon at {shown} does not know this call: {error}");
            Error::new(Kind::Unsupported, message)
                .hint("restart it, so that it is of the same version as this program")
        }
        zlink::Error::Io(error) => unreachable(socket, &error),
        zlink::Error::UnexpectedEof => {
            let message = format!("the daemon at {shown} closed the connection");
            Error::new(Kind::Unavailable, message).hint("see whether it is still running")
        }
        error => {
            let message = format!("cannot talk to the daemon at {shown}: {error}");
            Error::new(Kind::Io, message)
        }
    }
}
