//! Where pools come from: the engine makes them, `loopfs` shows them, `intercept` serves their calls.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use super::attached::{Attached, Table};
use super::container::HELD_MAX;
use super::{Asked, Caller, Events, Guest, Outcome, Room, Source};
use crate::error::{Error, Kind, Result};
use crate::instance::claims::ExcludedFileSystem;
use crate::intercept::{
    AT_ONCE, Administrators, DEADLINE, Mounter, Mounts, Namespace, Options, Supervisor, mounts,
};
use crate::kernel_mounts::{FileSystem, KernelMounts, MountSpec, policy};
use crate::loopfs::Directory;
use crate::loops::{Answer, Entry, Errno, Pool, PoolSpec, Pools, Quotas, Watcher};
use crate::sys::stack::Stack;

/// How long a mounter may take to end what it has started, and kernel mounts to end with their tenant.
const MOUNTER_MAX: Duration = Duration::from_secs(4);

/// What serves pools.
#[derive(Debug)]
pub struct Served {
    /// Has the pools.
    pub pools: Arc<Pools>,
    /// Has the kernel mount; none: nobody gets mounts by the kernel.
    pub kernel: Option<Arc<KernelMounts>>,
    /// File systems that the kernel may mount for users who are not root.
    pub for_all: Vec<&'static FileSystem>,
}

impl Source for Served {
    fn quotas(&self) -> Quotas {
        self.pools.quotas().clone()
    }

    fn kernel_mounts(&self, asked: &[String], caller: Caller) -> Result<Vec<&'static FileSystem>> {
        let asked = asked.iter().map(|name| policy::find_or_err(name)).collect::<Result<Vec<_>>>()?;
        if let Some(refused) = asked.iter().find(|asked| caller.uid != 0 && !self.for_all.contains(asked)) {
            let message = format!("the kernel may not mount {} for users here", refused.name);
            return Err(Error::new(Kind::Denied, message).hint(
                "leave it out of --mount, so that a program of FUSE mounts it, or have the administrator add it \
                 to kernel_mounts in the [private] part of the daemon's configuration",
            ));
        }
        if self.kernel.is_none() && !asked.is_empty() {
            return Err(Error::new(Kind::Unavailable, "this daemon has nothing mounted by the kernel"));
        }
        Ok(asked)
    }

    fn open(&self, spec: &PoolSpec, events: Events) -> Result<(Arc<dyn Room>, OwnedFd)> {
        let pool = self.pools.open(spec)?;
        pool.watch(Arc::new(Told(events.clone())));
        events.promised(&pool.promised());
        for entry in pool.entries() {
            events.changed(entry.number, || pool.shown(entry.number));
        }
        let unused = Arc::downgrade(&pool);
        let on_end = move || unused.upgrade().iter().for_each(|pool| pool.end(false));
        let (directory, mount) = Directory::open(pool.clone(), on_end).inspect_err(|_| pool.end(true))?;
        let made = Made {
            _no_images: self.pools.exclude_images_on(directory.device()),
            pool,
            directory: Arc::new(directory),
            supervisors: Mutex::default(),
            mounter: OnceLock::new(),
            kernel: self.kernel.clone(),
            allowed: OnceLock::new(),
            attached: Arc::default(),
        };
        Ok((Arc::new(made), mount))
    }
}

struct Made {
    pool: Arc<Pool>,
    directory: Arc<Directory>,
    /// A device on the loop-control of a pool would keep the pool.
    _no_images: ExcludedFileSystem,
    supervisors: Mutex<Vec<Supervisor>>,
    mounter: OnceLock<Arc<Mounter>>,
    kernel: Option<Arc<KernelMounts>>,
    allowed: OnceLock<Vec<&'static FileSystem>>,
    attached: Arc<Table>,
}

/// Mounts by the kernel for one tenant.
struct ByKernel {
    pool: Arc<Pool>,
    kernel: Arc<KernelMounts>,
    allowed: Vec<&'static FileSystem>,
    namespace: OwnedFd,
    /// Of one user, whatever pools.
    whose: String,
}

impl mounts::Kernel for ByKernel {
    fn mount(&self, asked: &mounts::Asked, device: u64, waits: &dyn Fn() -> bool) -> Answer<OwnedFd> {
        let kind = self.allowed.iter().find(|kind| kind.name == asked.kind).ok_or(Errno::NODEV)?;
        let wanted = MountSpec {
            kind,
            flags: asked.flags,
            data: &asked.data,
            namespace: Some(self.namespace.as_fd()),
            tenant: &self.whose,
        };
        self.pool.lend(device, |lent| self.kernel.make(lent, wanted, waits))
    }
}

impl Room for Made {
    fn supervise(&self, listener: OwnedFd, namespace: OwnedFd, mounter: Option<OwnedFd>) -> Result<()> {
        let administrators = Administrators::capable(examine(&namespace)?);
        let kernel = self.by_kernel(namespace);
        let mounter = mounter.map(|socket| Mounter::new(socket, kernel)).transpose()?.map(Arc::new);
        if let Some(mounter) = &mounter {
            self.mounter.get_or_init(|| Arc::clone(mounter));
        }
        let mounts = mounter.map(|mounter| mounter as Arc<dyn Mounts>);
        self.serve(listener, Options { mounts, nodes: true, ..self.options(administrators) })
    }

    fn admit(&self, guest: Guest) -> Result<()> {
        let Guest { listener, namespace, max, mounts, .. } = guest;
        let namespace =
            namespace.ok_or_else(|| Error::new(Kind::Internal, "a container without a namespace"))?;
        let its = examine(&namespace)?;
        let mounts = self.for_container(mounts, namespace, its)?;
        let administrators = Administrators::root(its);
        // The devices of a pool for containers are there from the start: these are the first of them.
        let first = max.and_then(|max| self.pool.spec().numbers().nth(max as usize));
        self.serve(listener, Options { first, mounts, ..self.options(administrators) })
    }

    fn reset(&self) {
        self.attached.clear();
        if self.mounts_by_kernel() && !self.pool.wait_for_unmounts(MOUNTER_MAX) {
            tracing::warn!("something of private pool {} is still mounted", self.pool.spec().name);
        }
        self.pool.reset(HELD_MAX);
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

    fn entries(&self) -> Vec<Entry> {
        self.pool.entries()
    }

    fn operate(&self, asked: &Asked, file: Option<OwnedFd>) -> Outcome {
        // A device on the pool's own loop-control would hold the pool itself.
        let stat = file.as_ref().and_then(|file| rustix::fs::fstat(file).ok());
        if stat.is_some_and(|stat| self.directory.is_control(stat.st_dev, stat.st_ino)) {
            return Outcome::from(Err(Errno::INVAL));
        }
        asked.run(&self.pool, file)
    }

    fn end(&self, force: bool) {
        let until = Instant::now() + MOUNTER_MAX;
        // Programs of FUSE write what they hold, while there is a device to write it to.
        if let Some(mounter) = self.mounter.get().filter(|_| force)
            && !mounter.end(MOUNTER_MAX)
        {
            tracing::warn!("programs of FUSE on private pool {} did not end in time", self.pool.spec().name);
        }
        // And so does the kernel, when the mounts of those who are gone go.
        self.attached.clear();
        if force
            && self.mounts_by_kernel()
            && !self.pool.wait_for_unmounts(until.saturating_duration_since(Instant::now()))
        {
            tracing::warn!("private pool {} ends while the kernel has mounted of it", self.pool.spec().name);
        }
        self.pool.end(force);
    }
}

impl Made {
    fn by_kernel(&self, namespace: OwnedFd) -> Option<Box<dyn mounts::Kernel>> {
        let allowed = self.allowed.get().filter(|allowed| !allowed.is_empty())?.clone();
        let (pool, kernel) = (Arc::clone(&self.pool), Arc::clone(self.kernel.as_ref()?));
        let whose = format!("user {}", pool.spec().uid);
        Some(Box::new(ByKernel { pool, kernel, allowed, namespace, whose }))
    }

    /// What mounts for a process of a container, which may have asked for fewer file systems.
    fn for_container(
        &self,
        asked: Option<Vec<String>>,
        namespace: OwnedFd,
        its: Namespace,
    ) -> Result<Option<Arc<dyn Mounts>>> {
        let mut allowed = self.kernel_mounts();
        if let Some(asked) = asked {
            let asked = asked.iter().map(|name| policy::find_or_err(name)).collect::<Result<Vec<_>>>()?;
            allowed.retain(|kind| asked.contains(kind));
        }
        let Some(kernel) = self.kernel.as_ref().filter(|_| !allowed.is_empty()) else { return Ok(None) };
        let own = std::fs::File::open("/proc/self/ns/user").map_err(cannot_examine)?;
        // Owners are as they are where the host's are.
        let namespace = (examine(own)? != its).then_some(namespace);
        let (pool, kernel, table) = (Arc::clone(&self.pool), Arc::clone(kernel), Arc::clone(&self.attached));
        Ok(Some(Arc::new(Attached { pool, kernel, allowed, namespace, table })))
    }

    fn mounts_by_kernel(&self) -> bool {
        self.allowed.get().is_some_and(|kinds| !kinds.is_empty())
    }

    fn options(&self, administrators: Administrators) -> Options {
        let directory = Arc::clone(&self.directory);
        Options {
            name: self.pool.spec().name.clone(),
            is_control: Box::new(move |device, inode, _| directory.is_control(device, inode)),
            administrators,
            first: None,
            mounts: None,
            nodes: false,
            at_once: AT_ONCE,
            deadline: DEADLINE,
            // The registry watches the listener too, and sees to all of the tenant.
            on_end: Box::new(|| {}),
        }
    }

    fn serve(&self, listener: OwnedFd, options: Options) -> Result<()> {
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

struct Told(Events);

impl Watcher for Told {
    fn changed(&self, pool: &Pool, number: u32) {
        self.0.changed(number, || pool.shown(number));
    }

    fn stacked(&self, stack: &Stack, is_there: bool) {
        self.0.stacked(stack, is_there);
    }

    fn ended(&self, _pool: &Pool) {
        self.0.ended();
    }
}
