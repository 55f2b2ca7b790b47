//! Where pools come from: the engine makes them, `loopfs` shows them, `intercept` serves their calls.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use super::container::HELD_MAX;
use super::{Asked, Caller, Events, Guest, Outcome, Room, Source};
use crate::error::{Error, Kind, Result};
use crate::instance::Engine;
use crate::intercept::{AT_ONCE, Administrators, DEADLINE, Mounter, Namespace, Options, Supervisor, mounts};
use crate::kernel_mounts::{FileSystem, KernelMounts, Wanted, policy};
use crate::loopfs::Directory;
use crate::loops::{Answer, Entry, Errno, Pool, PoolSpec, Quotas, Watcher};

/// How long a mounter may take to end what it has started, and kernel mounts to end with their tenant.
const MOUNTER_MAX: Duration = Duration::from_secs(4);

/// What serves pools.
#[derive(Debug)]
pub struct Served {
    /// Has the devices.
    pub engine: Arc<Engine>,
    /// Has the kernel mount; none: nobody gets mounts by the kernel.
    pub kernel: Option<Arc<KernelMounts>>,
    /// File systems that the kernel may mount for users who are not root.
    pub for_all: Vec<&'static FileSystem>,
}

impl Source for Served {
    fn quotas(&self) -> Quotas {
        Engine::quotas(&self.engine).clone()
    }

    fn kernel_mounts(&self, asked: &[String], caller: Caller) -> Result<Vec<&'static FileSystem>> {
        let asked = asked.iter().map(|name| policy::named(name)).collect::<Result<Vec<_>>>()?;
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
        let pool = self.engine.open_pool(spec)?;
        pool.watch(Arc::new(Told(events.clone())));
        for entry in pool.entries() {
            events.changed(entry.number, || pool.shown(entry.number));
        }
        let unused = Arc::downgrade(&pool);
        let on_end = move || unused.upgrade().iter().for_each(|pool| pool.end(false));
        let (directory, mount) = Directory::open(pool.clone(), on_end).inspect_err(|_| pool.end(true))?;
        let made = Made {
            pool,
            directory: Arc::new(directory),
            supervisors: Mutex::default(),
            mounter: OnceLock::new(),
            kernel: self.kernel.clone(),
            allowed: OnceLock::new(),
        };
        Ok((Arc::new(made), mount))
    }
}

struct Made {
    pool: Arc<Pool>,
    directory: Arc<Directory>,
    supervisors: Mutex<Vec<Supervisor>>,
    mounter: OnceLock<Arc<Mounter>>,
    kernel: Option<Arc<KernelMounts>>,
    allowed: OnceLock<Vec<&'static FileSystem>>,
}

/// Mounts by the kernel for one tenant.
struct ByKernel {
    pool: Arc<Pool>,
    kernel: Arc<KernelMounts>,
    allowed: Vec<&'static FileSystem>,
    namespace: OwnedFd,
}

impl mounts::Kernel for ByKernel {
    fn mount(&self, asked: &mounts::Asked, device: u64, waits: &dyn Fn() -> bool) -> Answer<OwnedFd> {
        let kind = self.allowed.iter().find(|kind| kind.name == asked.kind).ok_or(Errno::NODEV)?;
        let wanted = Wanted {
            kind,
            flags: asked.flags,
            data: &asked.data,
            namespace: Some(self.namespace.as_fd()),
            user: self.pool.spec().uid,
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
        self.serve(listener, Options { mounter, ..self.options(administrators) })
    }

    fn admit(&self, guest: Guest) -> Result<()> {
        let Guest { listener, namespace, max, .. } = guest;
        let namespace =
            namespace.ok_or_else(|| Error::new(Kind::Internal, "a container without a namespace"))?;
        let administrators = Administrators::root(examine(namespace)?);
        self.serve(listener, Options { first: max, ..self.options(administrators) })
    }

    fn reset(&self) {
        self.pool.reset(HELD_MAX);
    }

    fn device_numbers(&self) -> Vec<u64> {
        self.pool.device_numbers().to_vec()
    }

    fn allow_kernel_mounts(&self, kinds: Vec<&'static FileSystem>) {
        self.allowed.get_or_init(|| kinds);
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
        let mounts = self.allowed.get().is_some_and(|kinds| !kinds.is_empty());
        if force && mounts && !self.pool.wait_for_unmounts(until.saturating_duration_since(Instant::now())) {
            tracing::warn!("private pool {} ends while the kernel has mounted of it", self.pool.spec().name);
        }
        self.pool.end(force);
    }
}

impl Made {
    fn by_kernel(&self, namespace: OwnedFd) -> Option<Box<dyn mounts::Kernel>> {
        let allowed = self.allowed.get().filter(|allowed| !allowed.is_empty())?.clone();
        let (pool, kernel) = (Arc::clone(&self.pool), Arc::clone(self.kernel.as_ref()?));
        Some(Box::new(ByKernel { pool, kernel, allowed, namespace }))
    }

    fn options(&self, administrators: Administrators) -> Options {
        let directory = Arc::clone(&self.directory);
        Options {
            name: self.pool.spec().name.clone(),
            is_control: Box::new(move |device, inode, _| directory.is_control(device, inode)),
            administrators,
            first: None,
            mounter: None,
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
    Namespace::of_file(namespace).map_err(|error| Error::os(error, "cannot examine a user namespace"))
}

struct Told(Events);

impl Watcher for Told {
    fn changed(&self, pool: &Pool, number: u32) {
        self.0.changed(number, || pool.shown(number));
    }

    fn ended(&self, _pool: &Pool) {
        self.0.ended();
    }
}
