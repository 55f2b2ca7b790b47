// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The socket for private pools of loop devices, open to everybody. The connection's credentials
//! identify the caller; the registry decides what that user may do.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use zlink::introspect::Type;
use zlink::tokio::unix::Connection;

use super::reply::ActivityReply;
use super::session::{ClientSession, ONE_MAX, close_on_exec, copies};
use super::{Fault, Inbox, PRIVATE_SOCKET, run_blocking};
use crate::error::{Error, Kind, Result};
use crate::instance::activity::{BlockTimes, DeviceActivity};
use crate::instance::spec::{DeviceState, DeviceStats, LatencyBucket, LatencySummary};
use crate::loops::{Bound, DeviceEntry, PartitionEntry};
use crate::private::{
    Caller, DeviceStatus, Limit, LoopInfo64, Mounter, OpenSpec, OpenedPool, Operation, OperationRequest,
    OperationResult, PoolInfo, Registry,
};
use crate::received::{FileWait, Received};

/// A pool's name.
#[derive(Clone, Debug, Serialize, Deserialize, Type)]
pub struct NameReply {
    /// The name.
    pub name: String,
}

/// Private pools.
#[derive(Clone, Debug, Serialize, Deserialize, Type)]
pub struct PoolsReply {
    /// By age.
    pub pools: Vec<PoolInfo>,
}

/// Limits.
#[derive(Clone, Debug, Serialize, Deserialize, Type)]
pub struct LimitsReply {
    /// The default first, then by user.
    pub limits: Vec<Limit>,
}

/// One connection's view of the registry.
pub struct PrivateService {
    registry: Arc<Registry>,
    caller: Caller,
    inbox: Inbox,
}

impl PrivateService {
    /// A service for one connection, whose descriptors come to `inbox`.
    pub fn new(registry: Arc<Registry>, caller: Caller, inbox: Inbox) -> Self {
        Self { registry, caller, inbox }
    }

    /// Runs a call on its own thread: it may block on its descriptors, or on a lock that such a
    /// call holds.
    async fn ask<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Registry, Caller) -> Result<T> + Send + 'static,
    ) -> std::result::Result<T, Fault> {
        let (registry, caller) = (Arc::clone(&self.registry), self.caller);
        run_blocking(move || work(&registry, caller)).await.map_err(Fault::from)
    }

    /// Likewise, with the descriptors of the call.
    async fn ask_with<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Registry, Caller, Vec<OwnedFd>) -> Result<T> + Send + 'static,
    ) -> std::result::Result<T, Fault> {
        let received = self.inbox.take();
        self.ask(move |registry, caller| {
            let files: Vec<_> = received.into_iter().filter_map(Received::take).collect();
            let _waiting: Vec<_> = files.iter().map(|file| FileWait::on(file, caller.uid)).collect();
            work(registry, caller, files)
        })
        .await
    }
}

#[zlink::service(
    interface = "io.loopengine.Private",
    vendor = "loopengine",
    product = "loopengine",
    version = env!("CARGO_PKG_VERSION"),
    url = env!("CARGO_PKG_REPOSITORY"),
    types = [
        OperationRequest, Bound, LoopInfo64, DeviceStatus, DeviceEntry, Limit, OpenSpec, Operation, PartitionEntry, PoolInfo,
        DeviceActivity, BlockTimes, DeviceState, DeviceStats, LatencySummary, LatencyBucket
    ]
)]
impl PrivateService {
    /// Opens a pool. The reply passes detached mounts: of the file system with the pool's nodes,
    /// and, on request, of a /dev and of the directories for a /sys. The pool ends when the first
    /// of them is closed or unmounted.
    #[zlink(return_fds)]
    async fn open(&self, spec: OpenSpec) -> (std::result::Result<NameReply, Fault>, Vec<OwnedFd>) {
        let caller = self.caller;
        match self.ask(move |registry, caller| registry.open(&spec, caller)).await {
            Ok(OpenedPool { name, backend, mounts }) => {
                let backend = backend.unwrap_or("unknown");
                tracing::info!("opened private pool {name} for user {} (backend {backend})", caller.uid);
                self.inbox.keep(mounts.iter().filter_map(|mount| mount.try_clone().ok()));
                (Ok(NameReply { name }), mounts)
            }
            Err(fault) => (Err(fault), Vec::new()),
        }
    }

    /// Supervises the filter whose listener is the call's first file descriptor. The pool then ends
    /// with the last process under that filter. The second descriptor is of a user namespace, whose
    /// administrators administer the pool. An optional third is a socket of a mounter, which
    /// receives the calls of mount(2); if `servesMounts` is false, only those of devtmpfs. Only for
    /// the opener of the pool.
    async fn supervise(
        &self,
        name: String,
        #[zlink(rename = "servesMounts")] serves_mounts: Option<bool>,
    ) -> std::result::Result<(), Fault> {
        self.ask_with(move |registry, caller, fds| {
            let count = fds.len();
            let mut fds = fds.into_iter();
            let (Some(listener), Some(namespace), true) = (fds.next(), fds.next(), count <= 3) else {
                let message = format!("the call passed {count} file descriptors");
                return Err(Error::new(Kind::Invalid, message)
                    .hint("pass the listener of a filter and a user namespace"));
            };
            let serves_mounts = serves_mounts.unwrap_or(true);
            let mounter = fds.next().map(|socket| Mounter { socket, serves_mounts });
            registry.supervise(&name, listener, namespace, mounter, caller)
        })
        .await
    }

    /// Announces a container that is being created with a pool for containers: the call's only file
    /// descriptor is its /dev, a tmpfs, in which the daemon keeps the names of partitions. For root.
    async fn set_container_dev(&self, name: String, container: String) -> std::result::Result<(), Fault> {
        self.ask_with(move |registry, caller, fds| {
            let mut fds = fds.into_iter();
            match (fds.next(), fds.next()) {
                (Some(dev), None) => registry.set_container_dev(&name, &container, dev, caller),
                _ => Err(Error::new(Kind::Invalid, "the call did not pass exactly one file descriptor")
                    .hint("pass only the /dev of the container")),
            }
        })
        .await
    }

    /// Logs why a hook could not prepare a container. For root.
    async fn report_container(
        &self,
        name: String,
        container: String,
        problem: String,
    ) -> std::result::Result<(), Fault> {
        self.ask(move |registry, caller| registry.report_container(&name, &container, &problem, caller)).await
    }

    /// The caller's pools; for root, all.
    async fn list(&self) -> std::result::Result<PoolsReply, Fault> {
        let pools = self.ask(|registry, caller| Ok(registry.list(caller))).await?;
        Ok(PoolsReply { pools })
    }

    /// Counts of the block layer for the bound devices of the caller's pools; for root, of all pools.
    async fn get_activity(&self) -> std::result::Result<ActivityReply, Fault> {
        let devices = self.ask(|registry, caller| Ok(registry.activity(caller))).await?;
        Ok(ActivityReply { devices })
    }

    /// Runs an operation on a device of a pool. The caller must see the pool. LOOP_CONFIGURE passes
    /// the backing file.
    async fn operate(
        &self,
        name: String,
        request: OperationRequest,
    ) -> std::result::Result<OperationResult, Fault> {
        self.ask_with(move |registry, caller, fds| {
            let mut fds = fds.into_iter();
            match (fds.next(), fds.next()) {
                (file, None) => registry.operate(&name, &request, file, caller),
                _ => Err(Error::new(Kind::Invalid, "the call passed more than one file descriptor")
                    .hint("pass only the backing file")),
            }
        })
        .await
    }

    /// Ends a pool; with `force`, even if devices are in use.
    async fn close(&self, name: String, force: Option<bool>) -> std::result::Result<(), Fault> {
        self.ask(move |registry, caller| registry.close(&name, force.unwrap_or(false), caller)).await
    }

    /// The limits and the usage of users.
    async fn list_limits(&self) -> std::result::Result<LimitsReply, Fault> {
        let limits = self.ask(|registry, caller| Ok(registry.limits(caller))).await?;
        Ok(LimitsReply { limits })
    }

    /// Sets a user's own limit until the daemon ends; without `maxDevices`, restores the configured
    /// one. Existing devices stay. Only for root.
    async fn set_limit(
        &self,
        uid: u32,
        #[zlink(rename = "maxDevices")] max_devices: Option<u32>,
    ) -> std::result::Result<(), Fault> {
        self.ask(move |registry, caller| registry.set_limit(uid, max_devices, caller)).await
    }
}

#[zlink::proxy(interface = "io.loopengine.Private")]
trait PrivateCalls {
    #[zlink(return_fds)]
    async fn open(
        &mut self,
        spec: &OpenSpec,
    ) -> zlink::Result<(std::result::Result<NameReply, Fault>, Vec<OwnedFd>)>;
    async fn supervise(
        &mut self,
        name: &str,
        #[zlink(rename = "servesMounts")] serves_mounts: Option<bool>,
        #[zlink(fds)] fds: Vec<OwnedFd>,
    ) -> zlink::Result<std::result::Result<(), Fault>>;
    async fn set_container_dev(
        &mut self,
        name: &str,
        container: &str,
        #[zlink(fds)] fds: Vec<OwnedFd>,
    ) -> zlink::Result<std::result::Result<(), Fault>>;
    async fn report_container(
        &mut self,
        name: &str,
        container: &str,
        problem: &str,
    ) -> zlink::Result<std::result::Result<(), Fault>>;
    async fn list(&mut self) -> zlink::Result<std::result::Result<PoolsReply, Fault>>;
    async fn get_activity(&mut self) -> zlink::Result<std::result::Result<ActivityReply, Fault>>;
    async fn operate(
        &mut self,
        name: &str,
        request: &OperationRequest,
        #[zlink(fds)] fds: Vec<OwnedFd>,
    ) -> zlink::Result<std::result::Result<OperationResult, Fault>>;
    async fn close(&mut self, name: &str, force: bool) -> zlink::Result<std::result::Result<(), Fault>>;
    async fn list_limits(&mut self) -> zlink::Result<std::result::Result<LimitsReply, Fault>>;
    async fn set_limit(
        &mut self,
        uid: u32,
        #[zlink(rename = "maxDevices")] max_devices: Option<u32>,
    ) -> zlink::Result<std::result::Result<(), Fault>>;
}

/// A connection to the socket for private pools.
#[derive(Debug)]
pub struct PrivateClient(ClientSession);

impl PrivateClient {
    /// Connects to the daemon that serves `run_dir`. Needs a tokio runtime.
    pub async fn connect(run_dir: &Path) -> Result<PrivateClient> {
        ClientSession::connect(run_dir.join(PRIVATE_SOCKET)).await.map(PrivateClient)
    }

    /// See [`Registry::open`].
    pub async fn open(&mut self, spec: &OpenSpec) -> Result<OpenedPool> {
        let call = async |connection: &mut Connection| {
            let (named, mounts) = connection.open(spec).await?;
            close_on_exec(&mounts)?;
            Ok(named.map(|NameReply { name }| OpenedPool { name, backend: None, mounts }))
        };
        self.0.call(ONE_MAX, call).await
    }

    /// See [`Registry::supervise`].
    pub async fn supervise(
        &mut self,
        name: &str,
        listener: OwnedFd,
        namespace: OwnedFd,
        mounter: Option<Mounter>,
    ) -> Result<()> {
        let serves_mounts = mounter.as_ref().map(|mounter| mounter.serves_mounts);
        let socket = mounter.map(|mounter| mounter.socket);
        let fds: Vec<_> = [Some(listener), Some(namespace), socket].into_iter().flatten().collect();
        let call = async |connection: &mut Connection| {
            connection.supervise(name, serves_mounts, copies(&fds)?).await
        };
        self.0.call(ONE_MAX, call).await
    }

    /// See [`Registry::set_container_dev`].
    pub async fn set_container_dev(&mut self, name: &str, container: &str, dev: OwnedFd) -> Result<()> {
        let fds = [dev];
        let call = async |connection: &mut Connection| {
            connection.set_container_dev(name, container, copies(&fds)?).await
        };
        self.0.call(ONE_MAX, call).await
    }

    /// See [`Registry::report_container`].
    pub async fn report_container(&mut self, name: &str, container: &str, problem: &str) -> Result<()> {
        let call =
            async |connection: &mut Connection| connection.report_container(name, container, problem).await;
        self.0.call(ONE_MAX, call).await
    }

    /// See [`Registry::list`].
    pub async fn list(&mut self) -> Result<Vec<PoolInfo>> {
        Ok(self.0.call(ONE_MAX, async |connection: &mut Connection| connection.list().await).await?.pools)
    }

    /// See [`Registry::activity`].
    pub async fn activity(&mut self) -> Result<Vec<DeviceActivity>> {
        let call = async |connection: &mut Connection| connection.get_activity().await;
        Ok(self.0.call(ONE_MAX, call).await?.devices)
    }

    /// See [`Registry::operate`].
    pub async fn operate(
        &mut self,
        name: &str,
        request: &OperationRequest,
        file: Option<OwnedFd>,
    ) -> Result<OperationResult> {
        let fds: Vec<_> = file.into_iter().collect();
        let call = async |connection: &mut Connection| connection.operate(name, request, copies(&fds)?).await;
        self.0.call(ONE_MAX, call).await
    }

    /// See [`Registry::close`].
    pub async fn close(&mut self, name: &str, force: bool) -> Result<()> {
        self.0.call(ONE_MAX, async |connection: &mut Connection| connection.close(name, force).await).await
    }

    /// See [`Registry::limits`].
    pub async fn limits(&mut self) -> Result<Vec<Limit>> {
        let call = async |connection: &mut Connection| connection.list_limits().await;
        Ok(self.0.call(ONE_MAX, call).await?.limits)
    }

    /// See [`Registry::set_limit`].
    pub async fn set_limit(&mut self, uid: u32, max_devices: Option<u32>) -> Result<()> {
        let call = async |connection: &mut Connection| connection.set_limit(uid, max_devices).await;
        self.0.call(ONE_MAX, call).await
    }
}
