// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Creates pools: the engine has the devices, `loopfs` the nodes, and `intercept` serves the calls.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use super::container::HOLD_TIMEOUT;
use super::container_mounts::{ContainerMounts, MountTable};
use super::{
    Caller, ContainerSession, Mounter, OperationRequest, OperationResult, PoolHandle, PoolSource,
    TenantEvents,
};
use crate::error::{Error, Kind, Result};
use crate::frontend::BackendKind;
use crate::instance::activity::DeviceActivity;
use crate::instance::claims::ExcludedFileSystem;
use crate::intercept::devtmpfs::DevtmpfsOnly;
use crate::intercept::{
    Administrators, CALLS_AT_ONCE, DEADLINE, MountHandler, MounterSocket, Namespace, Supervisor,
    SupervisorOptions, mounts,
};
use crate::kernel_mounts::{FileSystem, KernelMounts, MountSpec, policy};
use crate::loopfs::Directory;
use crate::loops::{Answer, DeviceEntry, Errno, Pool, PoolSpec, PoolWatcher, Pools, Quotas};
use crate::sys::stack::Stack;

/// How long a mounter may take to unmount, and kernel mounts to end with their tenant.
const MOUNTER_MAX: Duration = Duration::from_secs(4);

/// The source of pools in the daemon.
#[derive(Debug)]
pub struct PoolBackend {
    /// The pools.
    pub pools: Arc<Pools>,
    /// Mounts by the kernel. None: not available.
    pub kernel: Option<Arc<KernelMounts>>,
    /// File systems that the kernel may mount for users other than root.
    pub for_all: Vec<&'static FileSystem>,
    /// What serves the disks of a pool that does not ask for a backend. None: the engine chooses.
    pub backend: Option<BackendKind>,
}

impl PoolSource for PoolBackend {
    fn quotas(&self) -> Quotas {
        self.pools.quotas().clone()
    }

    fn kernel_mounts(&self, names: &[String], caller: Caller) -> Result<Vec<&'static FileSystem>> {
        let kinds = names.iter().map(|name| policy::find_or_err(name)).collect::<Result<Vec<_>>>()?;
        if let Some(refused) = kinds.iter().find(|kind| caller.uid != 0 && !self.for_all.contains(kind)) {
            let message = format!("users may not have {} mounted by the kernel", refused.name);
            return Err(Error::new(Kind::Denied, message).hint(
                "leave it out of --mount, so that a FUSE driver mounts it, or have the administrator add it \
                 to kernel_mounts in the [private] part of the daemon's configuration",
            ));
        }
        if self.kernel.is_none() && !kinds.is_empty() {
            return Err(Error::new(Kind::Unavailable, "this daemon does not offer mounts by the kernel"));
        }
        Ok(kinds)
    }

    fn open(&self, spec: &PoolSpec, events: TenantEvents) -> Result<(Arc<dyn PoolHandle>, OwnedFd)> {
        let backend = spec.backend.or(self.backend);
        let pool = self.pools.open(&PoolSpec { backend, ..spec.clone() })?;
        pool.watch(Arc::new(PoolEvents(events.clone())));
        events.preallocated(&pool.preallocated());
        for entry in pool.entries() {
            events.changed(entry.number, || pool.snapshot(entry.number));
        }
        let unused = Arc::downgrade(&pool);
        let on_end = move || unused.upgrade().iter().for_each(|pool| pool.end(false));
        let (directory, mount) = Directory::open(pool.clone(), on_end).inspect_err(|_| pool.end(true))?;
        pool.watch_nodes(mount.as_fd());
        let runtime = PoolRuntime {
            _no_images: self.pools.exclude_images_on(directory.device()),
            pool,
            directory: Arc::new(directory),
            supervisors: Mutex::default(),
            mounter: OnceLock::new(),
            kernel: self.kernel.clone(),
            allowed: OnceLock::new(),
            attached: Arc::default(),
        };
        Ok((Arc::new(runtime), mount))
    }
}

struct PoolRuntime {
    pool: Arc<Pool>,
    directory: Arc<Directory>,
    /// An image on the pool's own file system would keep the pool.
    _no_images: ExcludedFileSystem,
    supervisors: Mutex<Vec<Supervisor>>,
    mounter: OnceLock<Arc<MounterSocket>>,
    kernel: Option<Arc<KernelMounts>>,
    allowed: OnceLock<Vec<&'static FileSystem>>,
    attached: Arc<MountTable>,
}

/// Mounts by the kernel for one tenant.
struct PoolKernelMounter {
    pool: Arc<Pool>,
    kernel: Arc<KernelMounts>,
    allowed: Vec<&'static FileSystem>,
    namespace: OwnedFd,
    /// The user, for limits over all pools.
    whose: String,
}

impl mounts::KernelMounter for PoolKernelMounter {
    fn mount(
        &self,
        request: &mounts::MountRequest,
        device: u64,
        is_waiting: &dyn Fn() -> bool,
    ) -> Answer<OwnedFd> {
        let kind = self.allowed.iter().find(|kind| kind.name == request.kind).ok_or(Errno::NODEV)?;
        let wanted = MountSpec {
            kind,
            flags: request.flags,
            data: &request.data,
            namespace: Some(self.namespace.as_fd()),
            tenant: &self.whose,
        };
        let make = |source: &_| self.kernel.make(source, wanted, is_waiting);
        request.attempted(self.pool.mount_source(device, make))
    }
}

impl PoolHandle for PoolRuntime {
    fn supervise(&self, listener: OwnedFd, namespace: OwnedFd, mounter: Option<Mounter>) -> Result<()> {
        let administrators = Administrators::capable(examine(&namespace)?);
        let kernel = self.kernel_mounter(namespace);
        let serves_mounts = mounter.as_ref().is_some_and(|mounter| mounter.serves_mounts);
        let socket = mounter.map(|mounter| MounterSocket::new(mounter.socket, kernel));
        let mounter = socket.transpose()?.map(Arc::new);
        if let Some(mounter) = &mounter {
            self.mounter.get_or_init(|| Arc::clone(mounter));
        }
        let mounts = mounter.map(|mounter| match serves_mounts {
            true => mounter as Arc<dyn MountHandler>,
            false => Arc::new(DevtmpfsOnly(mounter)),
        });
        self.serve(
            listener,
            SupervisorOptions { mounts, refuse_foreign_nodes: true, ..self.options(administrators) },
        )
    }

    fn admit(&self, session: ContainerSession) -> Result<()> {
        let ContainerSession { listener, namespace, max, mounts, .. } = session;
        let namespace =
            namespace.ok_or_else(|| Error::new(Kind::Internal, "a container has no user namespace"))?;
        let container_namespace = examine(&namespace)?;
        let mounts = self.for_container(mounts, namespace, container_namespace)?;
        let administrators = Administrators::root(container_namespace);
        // All devices of a pool for containers exist: this is the first number beyond the limit.
        let device_limit = max.and_then(|max| self.pool.spec().numbers().nth(max as usize));
        self.serve(listener, SupervisorOptions { device_limit, mounts, ..self.options(administrators) })
    }

    fn reset(&self) {
        self.attached.clear();
        if self.has_kernel_mounts() && !self.pool.wait_for_unmounts(MOUNTER_MAX) {
            tracing::warn!("file systems of private pool {} are still mounted", self.pool.spec().name);
        }
        self.pool.reset(HOLD_TIMEOUT);
    }

    fn backend(&self) -> Option<&'static str> {
        let kind = if self.pool.allocator.is_kernel_loop() { BackendKind::Loop } else { BackendKind::Ublk };
        Some(kind.as_str())
    }

    fn device_numbers(&self) -> Vec<u64> {
        self.pool.device_numbers().to_vec()
    }

    fn allow_kernel_mounts(&self, kinds: Vec<&'static FileSystem>) {
        self.allowed.get_or_init(|| kinds);
    }

    fn kernel_mounts(&self) -> Vec<&'static FileSystem> {
        self.allowed.get().cloned().unwrap_or_default()
    }

    fn entries(&self) -> Vec<DeviceEntry> {
        self.pool.entries()
    }

    fn activity(&self) -> Vec<DeviceActivity> {
        self.pool.activity()
    }

    fn operate(&self, request: &OperationRequest, file: Option<OwnedFd>) -> OperationResult {
        // A device bound to the pool's own loop-control would keep the pool.
        let stat = file.as_ref().and_then(|file| rustix::fs::fstat(file).ok());
        if stat.is_some_and(|stat| self.directory.is_control(stat.st_dev, stat.st_ino)) {
            return OperationResult::from(Err(Errno::INVAL));
        }
        request.run(&self.pool, file)
    }

    fn end(&self, force: bool) {
        let until = Instant::now() + MOUNTER_MAX;
        // FUSE drivers write back while the devices exist.
        if let Some(mounter) = self.mounter.get().filter(|_| force)
            && !mounter.end(MOUNTER_MAX)
        {
            tracing::warn!("FUSE drivers on private pool {} did not end in time", self.pool.spec().name);
        }
        // So does the kernel, at the unmount of the mounts of ended processes.
        self.attached.clear();
        if force
            && self.has_kernel_mounts()
            && !self.pool.wait_for_unmounts(until.saturating_duration_since(Instant::now()))
        {
            tracing::warn!(
                "private pool {} ends with file systems still mounted by the kernel",
                self.pool.spec().name
            );
        }
        self.pool.end(force);
    }
}

impl PoolRuntime {
    fn kernel_mounter(&self, namespace: OwnedFd) -> Option<Box<dyn mounts::KernelMounter>> {
        let allowed = self.allowed.get().filter(|allowed| !allowed.is_empty())?.clone();
        let (pool, kernel) = (Arc::clone(&self.pool), Arc::clone(self.kernel.as_ref()?));
        let whose = format!("user {}", pool.spec().uid);
        Some(Box::new(PoolKernelMounter { pool, kernel, allowed, namespace, whose }))
    }

    /// Serves mounts of a process of a container, which may request fewer file systems.
    fn for_container(
        &self,
        names: Option<Vec<String>>,
        namespace: OwnedFd,
        container_namespace: Namespace,
    ) -> Result<Option<Arc<dyn MountHandler>>> {
        let mut allowed = self.kernel_mounts();
        if let Some(names) = names {
            let kinds = names.iter().map(|name| policy::find_or_err(name)).collect::<Result<Vec<_>>>()?;
            allowed.retain(|kind| kinds.contains(kind));
        }
        let Some(kernel) = self.kernel.as_ref().filter(|_| !allowed.is_empty()) else { return Ok(None) };
        let own = std::fs::File::open("/proc/self/ns/user").map_err(cannot_examine)?;
        // In the host's user namespace no id mapping is needed.
        let namespace = (examine(own)? != container_namespace).then_some(namespace);
        let (pool, kernel, table) = (Arc::clone(&self.pool), Arc::clone(kernel), Arc::clone(&self.attached));
        Ok(Some(Arc::new(ContainerMounts { pool, kernel, allowed, namespace, table })))
    }

    fn has_kernel_mounts(&self) -> bool {
        self.allowed.get().is_some_and(|kinds| !kinds.is_empty())
    }

    fn options(&self, administrators: Administrators) -> SupervisorOptions {
        let directory = Arc::clone(&self.directory);
        SupervisorOptions {
            name: self.pool.spec().name.clone(),
            is_control: Box::new(move |device, inode, _| directory.is_control(device, inode)),
            administrators,
            device_limit: None,
            mounts: None,
            refuse_foreign_nodes: false,
            concurrency: CALLS_AT_ONCE,
            deadline: DEADLINE,
            // The registry watches the listener too, and ends the tenant.
            on_end: Box::new(|| {}),
        }
    }

    fn serve(&self, listener: OwnedFd, options: SupervisorOptions) -> Result<()> {
        let supervisor = Supervisor::start(listener, Arc::clone(&self.pool), options)?;
        let mut supervisors = self.supervisors.lock().unwrap_or_else(PoisonError::into_inner);
        supervisors.retain(|supervisor| !supervisor.is_over());
        supervisors.push(supervisor);
        Ok(())
    }
}

fn examine(namespace: impl AsFd) -> Result<Namespace> {
    Namespace::of_file(namespace).map_err(cannot_examine)
}

fn cannot_examine(error: std::io::Error) -> Error {
    Error::os(error, "cannot examine a user namespace")
}

struct PoolEvents(TenantEvents);

impl PoolWatcher for PoolEvents {
    fn changed(&self, pool: &Pool, number: u32) {
        self.0.changed(number, || pool.snapshot(number));
    }

    fn stack_changed(&self, stack: &Stack, is_there: bool) {
        self.0.stack_changed(stack, is_there);
    }

    fn ended(&self, _pool: &Pool) {
        self.0.ended();
    }
}
