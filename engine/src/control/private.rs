//! The socket for private pools of loop devices: few calls, for everybody. Who calls is known by the
//! credentials of the connection; the registry decides what that user may do.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use zlink::introspect::Type;
use zlink::tokio::unix::{Connection, Stream};

use super::client::{ONE_MAX, answer, connect, lost};
use super::guard::close_on_exec;
use super::{Fault, PRIVATE_SOCKET};
use crate::error::{Error, Kind, Result};
use crate::loops::{Bound, Entry, Partition};
use crate::private::{
    Asked, Caller, DeviceInfo, DeviceStatus, Limit, OpenSpec, Opened, Operation, Outcome, PoolInfo, Registry,
};

/// A pool's name.
#[derive(Clone, Debug, Serialize, Deserialize, Type)]
pub struct Named {
    /// The name.
    pub name: String,
}

/// Private pools.
#[derive(Clone, Debug, Serialize, Deserialize, Type)]
pub struct Pools {
    /// By age.
    pub pools: Vec<PoolInfo>,
}

/// Limits.
#[derive(Clone, Debug, Serialize, Deserialize, Type)]
pub struct Limits {
    /// The default first, then by user.
    pub limits: Vec<Limit>,
}

/// One connection's view of the registry.
pub struct PrivateService {
    registry: Arc<Registry>,
    caller: Caller,
}

impl PrivateService {
    /// A service for one connection.
    pub fn new(registry: Arc<Registry>, caller: Caller) -> Self {
        Self { registry, caller }
    }

    async fn ask<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Registry, Caller) -> Result<T> + Send + 'static,
    ) -> std::result::Result<T, Fault> {
        let (registry, caller) = (Arc::clone(&self.registry), self.caller);
        match tokio::task::spawn_blocking(move || work(&registry, caller)).await {
            Ok(answer) => answer.map_err(Fault::from),
            Err(_) => Err(failed()),
        }
    }
}

fn failed() -> Fault {
    let message = "the daemon failed while it handled this call";
    Error::new(Kind::Internal, message).hint("please report what its log says").into()
}

/// Runs what may wait for a caller's file, for as long as its file system likes, on a thread that
/// nothing else needs and that the daemon's end does not wait for. The caller's connection counts until
/// it has ended, so that nobody can have many.
async fn apart<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> std::result::Result<T, Fault> {
    let (sender, answer) = tokio::sync::oneshot::channel();
    let thread = std::thread::Builder::new().name("operation".into());
    let started = thread.spawn(move || drop(sender.send(work())));
    started.map_err(|error| Error::os(error, "cannot start a thread"))?;
    answer.await.map_err(|_| failed())?.map_err(Fault::from)
}

#[zlink::service(
    interface = "io.loopengine.Private",
    vendor = "loopengine",
    product = "loopengine",
    version = env!("CARGO_PKG_VERSION"),
    url = env!("CARGO_PKG_REPOSITORY"),
    types = [
        Asked, Bound, DeviceInfo, DeviceStatus, Entry, Limit, OpenSpec, Operation, Partition, PoolInfo
    ]
)]
impl PrivateService {
    /// Opens a pool. With the answer come descriptors of mounts that are mounted nowhere yet: of the
    /// file system with the pool's nodes, and, if they were asked for, of a /dev and of the
    /// directories for a /sys. The pool ends when the first of them is closed or unmounted.
    #[zlink(return_fds)]
    async fn open(&self, spec: OpenSpec) -> (std::result::Result<Named, Fault>, Vec<OwnedFd>) {
        let caller = self.caller;
        match self.ask(move |registry, caller| registry.open(&spec, caller)).await {
            Ok(Opened { name, mounts }) => {
                tracing::info!("opened private pool {name} for user {}", caller.uid);
                (Ok(Named { name }), mounts)
            }
            Err(fault) => (Err(fault), Vec::new()),
        }
    }

    /// Serves the filter whose listener comes as the call's first file descriptor. The pool then ends
    /// with the last process under that filter. The second is of a user namespace: its administrators
    /// are the pool's. A third may be a socket of a mounter, which is sent the calls of mount(2). Only
    /// for who opened the pool.
    async fn supervise(
        &self,
        name: String,
        #[zlink(fds)] fds: Vec<OwnedFd>,
    ) -> std::result::Result<(), Fault> {
        self.ask(move |registry, caller| {
            let count = fds.len();
            let mut fds = fds.into_iter();
            let (Some(listener), Some(namespace), true) = (fds.next(), fds.next(), count <= 3) else {
                let message = format!("{count} file descriptors came with the call");
                return Err(Error::new(Kind::Invalid, message)
                    .hint("pass the listener of a filter and a user namespace"));
            };
            registry.supervise(&name, listener, namespace, fds.next(), caller)
        })
        .await
    }

    /// The caller's pools; for root, all.
    async fn list(&self) -> std::result::Result<Pools, Fault> {
        let pools = self.ask(|registry, caller| Ok(registry.list(caller))).await?;
        Ok(Pools { pools })
    }

    /// An operation on a device of a pool, for who sees the pool. With LOOP_CONFIGURE comes the file.
    async fn operate(
        &self,
        name: String,
        asked: Asked,
        #[zlink(fds)] fds: Vec<OwnedFd>,
    ) -> std::result::Result<Outcome, Fault> {
        let (registry, caller) = (Arc::clone(&self.registry), self.caller);
        apart(move || {
            let mut fds = fds.into_iter();
            match (fds.next(), fds.next()) {
                (file, None) => registry.operate(&name, &asked, file, caller),
                _ => Err(Error::new(Kind::Invalid, "more than one file descriptor came with the call")
                    .hint("pass the backing file alone")),
            }
        })
        .await
    }

    /// Ends a pool; with `force`, with devices that are in use.
    async fn close(&self, name: String, force: Option<bool>) -> std::result::Result<(), Fault> {
        self.ask(move |registry, caller| registry.close(&name, force.unwrap_or(false), caller)).await
    }

    /// How many devices users may have, and have.
    async fn list_limits(&self) -> std::result::Result<Limits, Fault> {
        let limits = self.ask(|registry, caller| Ok(registry.limits(caller))).await?;
        Ok(Limits { limits })
    }

    /// Gives a user a limit of its own until the daemon ends; without `max_devices`, the default
    /// again. What it has, it keeps. Only for root.
    async fn set_limit(&self, uid: u32, max_devices: Option<u32>) -> std::result::Result<(), Fault> {
        self.ask(move |registry, caller| registry.set_limit(uid, max_devices, caller)).await
    }
}

#[zlink::proxy(interface = "io.loopengine.Private")]
trait Calls {
    #[zlink(return_fds)]
    async fn open(
        &mut self,
        spec: &OpenSpec,
    ) -> zlink::Result<(std::result::Result<Named, Fault>, Vec<OwnedFd>)>;
    async fn supervise(
        &mut self,
        name: &str,
        #[zlink(fds)] fds: Vec<OwnedFd>,
    ) -> zlink::Result<std::result::Result<(), Fault>>;
    async fn list(&mut self) -> zlink::Result<std::result::Result<Pools, Fault>>;
    async fn operate(
        &mut self,
        name: &str,
        asked: &Asked,
        #[zlink(fds)] fds: Vec<OwnedFd>,
    ) -> zlink::Result<std::result::Result<Outcome, Fault>>;
    async fn close(&mut self, name: &str, force: bool) -> zlink::Result<std::result::Result<(), Fault>>;
    async fn list_limits(&mut self) -> zlink::Result<std::result::Result<Limits, Fault>>;
    async fn set_limit(
        &mut self,
        uid: u32,
        max_devices: Option<u32>,
    ) -> zlink::Result<std::result::Result<(), Fault>>;
}

/// A connection to the socket for private pools.
#[derive(Debug)]
pub struct PrivateClient {
    connection: Connection,
    socket: PathBuf,
}

impl PrivateClient {
    /// Connects to the daemon that serves `run_dir`. Needs a tokio runtime.
    pub async fn connect(run_dir: &Path) -> Result<PrivateClient> {
        let socket = run_dir.join(PRIVATE_SOCKET);
        let stream = Stream::try_from(connect(&socket).await?).map_err(|error| lost(&socket, error))?;
        Ok(PrivateClient { connection: Connection::new(stream), socket })
    }

    /// See [`Registry::open`].
    pub async fn open(&mut self, spec: &OpenSpec) -> Result<Opened> {
        let call = async {
            let (named, mounts) = self.connection.open(spec).await?;
            close_on_exec(&mounts)?;
            Ok(named.map(|Named { name }| Opened { name, mounts }))
        };
        answer(&self.socket, ONE_MAX, call).await
    }

    /// See [`Registry::supervise`].
    pub async fn supervise(
        &mut self,
        name: &str,
        listener: OwnedFd,
        namespace: OwnedFd,
        mounter: Option<OwnedFd>,
    ) -> Result<()> {
        let fds = [Some(listener), Some(namespace), mounter].into_iter().flatten().collect();
        let call = self.connection.supervise(name, fds);
        answer(&self.socket, ONE_MAX, call).await
    }

    /// See [`Registry::list`].
    pub async fn list(&mut self) -> Result<Vec<PoolInfo>> {
        Ok(answer(&self.socket, ONE_MAX, self.connection.list()).await?.pools)
    }

    /// See [`Registry::operate`].
    pub async fn operate(&mut self, name: &str, asked: &Asked, file: Option<OwnedFd>) -> Result<Outcome> {
        let call = self.connection.operate(name, asked, file.into_iter().collect());
        answer(&self.socket, ONE_MAX, call).await
    }

    /// See [`Registry::close`].
    pub async fn close(&mut self, name: &str, force: bool) -> Result<()> {
        answer(&self.socket, ONE_MAX, self.connection.close(name, force)).await
    }

    /// See [`Registry::limits`].
    pub async fn limits(&mut self) -> Result<Vec<Limit>> {
        Ok(answer(&self.socket, ONE_MAX, self.connection.list_limits()).await?.limits)
    }

    /// See [`Registry::set_limit`].
    pub async fn set_limit(&mut self, uid: u32, max_devices: Option<u32>) -> Result<()> {
        answer(&self.socket, ONE_MAX, self.connection.set_limit(uid, max_devices)).await
    }
}
