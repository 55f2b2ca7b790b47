//! Who has which private pool of loop devices, and when it ends.
//!
//! A tenant is a pool and what belongs to it: the file system with its nodes, the supervisor of the
//! processes that use it, its part of their /dev and /sys, and what it takes from its user's limit.
//! Knows how these hang together, and whose they are. Knows neither sockets nor what an operation on
//! a device does.
//!
//! A tenant ends
//! - when the last process under its filter is gone: by force, within a second, or
//!   four more while programs of FUSE write back; unless it was made for containers, and stays for the next;
//! - when the last mount of its file system is gone, that is also if whoever opened it never attached
//!   it: unused devices at once, the others at their last close;
//! - on [`Registry::close`], with or without force;
//! - with the daemon, by force.
//!
//! It is listed, and counts, until no device of it is left. Names are the daemon's; those of plain
//! users begin with the user's number, so that nobody can take another's.

mod attached;
mod container;
mod descriptors;
mod engine;
pub mod limits;
mod list;
mod mirror;
mod operation;
mod reaper;
mod spec;
mod sysfs;
mod tree;

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

pub use container::Guest;
pub use engine::Served;
pub use limits::{Defaults, Limit, UserLimit};
pub use mirror::LOOPFS;
pub use operation::{Asked, DeviceInfo, DeviceStatus, Operation, Outcome};
pub use reaper::Events;
pub use spec::{Caller, OpenSpec, Opened, PoolInfo, RESERVED_MAX};
pub use sysfs::{LIBUDEV, OWN_NODES, PLACES};

use crate::accounts;
use crate::error::{Error, Kind, Result};
use crate::instance::MAX_DEVICES;
use crate::kernel_mounts::FileSystem;
use crate::limits::POOLS_MAX;
use crate::loops::{Entry, PoolSpec, Quotas};
use crate::sys::processes;
use container::Guests;
use limits::{Ledger, Taken};
use mirror::Mirror;
use reaper::Reaper;

/// Devices of a pool for which nothing else was asked.
pub const USUAL_DEVICES: u32 = 8;
/// How long devices may take to end with the daemon.
const END_MAX: Duration = Duration::from_secs(5);
/// Where a pool for containers has its nodes, beside the directories for /sys.
pub const DEV: &str = "dev";
/// Nodes are for root and their group, unless asked otherwise.
const MODE: u32 = 0o660;

/// What makes pools: the engine, or a stand-in.
pub trait Source: Send + Sync + 'static {
    /// Where devices are counted.
    fn quotas(&self) -> Quotas;

    /// Opens a pool and a file system with its nodes; answers its mount. `events` is to be told of
    /// every change and of the end, also of devices that are there from the start.
    fn open(&self, spec: &PoolSpec, events: Events) -> Result<(Arc<dyn Room>, OwnedFd)>;

    /// The file systems with these names, if the kernel may mount them for `caller`.
    fn kernel_mounts(&self, asked: &[String], _caller: Caller) -> Result<Vec<&'static FileSystem>> {
        match asked {
            [] => Ok(Vec::new()),
            _ => Err(Error::new(Kind::Unsupported, "the kernel mounts nothing for anybody here")),
        }
    }
}

/// A pool with its file system.
pub trait Room: Send + Sync {
    /// Has the calls that come from a filter with this listener served. At most once. Administrators
    /// of the user namespace are the pool's. Mounts are the mounter's work, if there is one.
    fn supervise(&self, listener: OwnedFd, namespace: OwnedFd, mounter: Option<OwnedFd>) -> Result<()>;
    /// From now on the kernel may mount these file systems for who is served; before it is.
    fn allow_kernel_mounts(&self, _kinds: Vec<&'static FileSystem>) {}
    /// These file systems.
    fn kernel_mounts(&self) -> Vec<&'static FileSystem> {
        Vec::new()
    }
    /// The same as `supervise` for a process of a container, as often as the container has processes with a filter.
    fn admit(&self, guest: Guest) -> Result<()>;
    /// Unbinds everything, for the next container.
    fn reset(&self);
    /// Device numbers of all its disks, if they must not change.
    fn device_numbers(&self) -> Vec<u64>;
    /// All devices.
    fn entries(&self) -> Vec<Entry>;
    /// Does what the pool's owner or root asks for. May take as long as the file that came with it.
    fn operate(&self, asked: &Asked, file: Option<OwnedFd>) -> Outcome;
    /// See [`crate::loops::Pool::end`].
    fn end(&self, force: bool);
}

/// All tenants of one daemon.
pub struct Registry {
    source: Box<dyn Source>,
    ledger: Arc<Ledger>,
    shared: Arc<Shared>,
    reaper: Arc<Reaper>,
}

#[derive(Default)]
struct Shared(Mutex<State>);

#[derive(Default)]
struct State {
    tenants: BTreeMap<u64, Tenant>,
    last: u64,
    stopped: bool,
}

struct Tenant {
    spec: PoolSpec,
    opener: u32,
    /// The opener's process, and when it started.
    process: Option<(u32, u64)>,
    since: SystemTime,
    /// None: it is being opened.
    room: Option<Arc<dyn Room>>,
    /// Its names in /dev and /sys, once it is open and if it has some.
    mirror: Option<Arc<Mirror>>,
    supervised: bool,
    guests: Guests,
    ending: bool,
    taken: Taken,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// No device of it is left.
    fn forget(&self, id: u64) {
        let gone = {
            let mut state = self.state();
            let gone = state.tenants.remove(&id);
            // What is no longer listed no longer counts; all else ends where nobody waits for the state.
            gone.map(|Tenant { taken, spec, room, guests, .. }| {
                drop(taken);
                (spec.name, room, guests)
            })
        };
        if let Some((name, ..)) = &gone {
            tracing::info!("private pool {name} has ended");
        }
    }

    fn end(&self, id: u64, force: bool) {
        let room = {
            let mut state = self.state();
            let Some(tenant) = state.tenants.get_mut(&id) else { return };
            tenant.ending = true;
            tenant.room.clone()
        };
        if let Some(room) = room {
            room.end(force);
        }
    }
}

impl Registry {
    /// One without tenants. Starts a thread, which ends with [`Registry::shutdown`].
    pub fn start(source: impl Source, defaults: Defaults) -> Result<Registry> {
        let shared = Arc::new(Shared::default());
        let reaper = Reaper::start(Arc::clone(&shared))?;
        let ledger = Ledger::new(defaults, source.quotas());
        Ok(Registry { source: Box::new(source), ledger, shared, reaper })
    }

    /// Opens a pool for `caller`.
    pub fn open(&self, asked: &OpenSpec, caller: Caller) -> Result<Opened> {
        let uid = foreign("user", asked.uid, caller.uid, caller)?;
        let gid = foreign("group", asked.gid, caller.gid, caller)?;
        let mode = asked.mode.unwrap_or(MODE);
        if mode & !0o666 != 0 {
            return Err(Error::new(Kind::Invalid, format!("{mode:o} is no mode of a device"))
                .hint("give some of the bits 0666"));
        }
        if let Some(max) = asked.max.filter(|max| !(1..=MAX_DEVICES).contains(max)) {
            return Err(Error::new(Kind::Invalid, format!("a pool cannot have {max} devices"))
                .hint(format!("ask for 1 to {MAX_DEVICES}")));
        }
        let reserved = asked.reserved()?;
        let fixed = asked.container.unwrap_or(false);
        if fixed && caller.uid != 0 {
            return Err(Error::new(Kind::Denied, "only root may make pools for containers")
                .hint("a plain user has 'loopengine run'"));
        }
        let intercepted = !fixed && asked.dev_and_sys.unwrap_or(false);
        let kinds = self.source.kernel_mounts(asked.kernel_mounts.as_deref().unwrap_or_default(), caller)?;
        let taken = self.ledger.take(uid, asked.max, USUAL_DEVICES)?;
        let max = taken.devices();
        let (id, spec) = self.enter(
            asked,
            caller,
            |name| PoolSpec { name, max, uid, gid, mode, fixed, intercepted, reserved },
            taken,
        )?;
        let made = self.make(id, &spec, fixed || intercepted);
        let (room, mirror, mounts) = match made {
            Ok(made) => made,
            Err(error) => {
                drop(self.shared.state().tenants.remove(&id));
                return Err(error);
            }
        };
        room.allow_kernel_mounts(kinds);
        let mut state = self.shared.state();
        let mut unwanted = state.stopped;
        // It may have ended already, or have been closed while there was nothing to end.
        if let Some(tenant) = state.tenants.get_mut(&id) {
            tenant.room = Some(Arc::clone(&room));
            tenant.mirror = mirror;
            unwanted |= tenant.ending;
        }
        drop(state);
        if unwanted {
            room.end(true);
        }
        Ok(Opened { name: spec.name, mounts })
    }

    /// Takes a name, or refuses.
    fn enter(
        &self,
        asked: &OpenSpec,
        caller: Caller,
        spec: impl FnOnce(String) -> PoolSpec,
        taken: Taken,
    ) -> Result<(u64, PoolSpec)> {
        let process = caller.pid.and_then(|pid| Some((pid, processes::started(pid)?)));
        let mut state = self.shared.state();
        if state.stopped {
            return Err(Error::new(Kind::Unavailable, "the daemon is stopping"));
        }
        if state.tenants.len() >= POOLS_MAX {
            return Err(Error::new(Kind::Quota, format!("there are {POOLS_MAX} private pools already")));
        }
        state.last += 1;
        let id = state.last;
        let name = spec::full_name(asked.name.as_deref(), id, caller)?;
        if state.tenants.values().any(|tenant| tenant.spec.name == name) {
            return Err(Error::new(Kind::Exists, format!("private pool {name} exists")));
        }
        let spec = spec(name);
        let tenant = Tenant {
            spec: spec.clone(),
            opener: caller.uid,
            process,
            since: SystemTime::now(),
            room: None,
            mirror: None,
            supervised: false,
            guests: Guests::default(),
            ending: false,
            taken,
        };
        state.tenants.insert(id, tenant);
        Ok((id, spec))
    }

    #[expect(clippy::type_complexity, reason = "named where it is called")]
    fn make(
        &self,
        id: u64,
        spec: &PoolSpec,
        mirrored: bool,
    ) -> Result<(Arc<dyn Room>, Option<Arc<Mirror>>, Vec<OwnedFd>)> {
        let mirror = match mirrored {
            true => Some(Arc::new(Mirror::make(spec.max, spec.uid, spec.gid)?)),
            false => None,
        };
        if let Some(mirror) = mirror.as_ref().filter(|_| spec.fixed) {
            mirror.add_directory(DEV)?;
        }
        let (room, mount) = self.source.open(spec, self.reaper.events(id, mirror.clone()))?;
        let mut mounts = vec![mount];
        if let Some(mirror) = &mirror {
            match mirror.mounts() {
                Ok(more) => mounts.extend(more),
                Err(error) => {
                    room.end(true);
                    return Err(error);
                }
            }
        }
        Ok((room, mirror, mounts))
    }

    /// Serves the filter with this listener, for whoever opened the pool. The pool then ends with the
    /// last process under that filter.
    pub fn supervise(
        &self,
        name: &str,
        listener: OwnedFd,
        namespace: OwnedFd,
        mounter: Option<OwnedFd>,
        caller: Caller,
    ) -> Result<()> {
        descriptors::check(&listener, &namespace, mounter.as_ref())?;
        let (id, room) = {
            let mut state = self.shared.state();
            let (id, tenant, room) = open_to(&mut state, name, caller)?;
            if tenant.spec.fixed {
                return Err(Error::new(Kind::Invalid, format!("private pool {name} is for containers")));
            }
            if tenant.supervised {
                return Err(Error::new(Kind::Exists, format!("private pool {name} is supervised already")));
            }
            tenant.supervised = true;
            (id, room)
        };
        let cannot = |error| Error::os(error, "cannot watch the processes of a pool");
        let watched = listener.try_clone().map_err(cannot)?;
        room.supervise(listener, namespace, mounter)?;
        self.reaper.watch(id, watched).map_err(cannot)
    }

    /// An operation on a device of a pool, without a descriptor of the device.
    pub fn operate(
        &self,
        name: &str,
        asked: &Asked,
        file: Option<OwnedFd>,
        caller: Caller,
    ) -> Result<Outcome> {
        let room = find(&mut self.shared.state(), name, caller)?.1.room.clone();
        match room {
            Some(room) => Ok(room.operate(asked, file)),
            None => Err(Error::new(Kind::Unavailable, format!("private pool {name} is being opened"))),
        }
    }

    /// Ends a pool: without `force`, devices in use stay until their last close.
    pub fn close(&self, name: &str, force: bool, caller: Caller) -> Result<()> {
        let (id, _) = find(&mut self.shared.state(), name, caller)?;
        self.shared.end(id, force);
        Ok(())
    }

    /// Limits of users; a plain user sees its own.
    pub fn limits(&self, caller: Caller) -> Vec<Limit> {
        let mut limits = self.ledger.list();
        limits.retain(|limit| caller.uid == 0 || limit.uid.is_none_or(|uid| uid == accounts::of(caller.uid)));
        limits
    }

    /// Gives users what the configuration says now.
    pub fn configure(&self, users: &BTreeMap<u32, UserLimit>) {
        self.ledger.configure(users);
    }

    /// Gives a user a limit of its own, until the daemon ends; none: that of the configuration.
    pub fn set_limit(&self, uid: u32, devices: Option<u32>, caller: Caller) -> Result<()> {
        if caller.uid != 0 {
            return Err(Error::new(Kind::Denied, "only root may change limits").hint("run this as root"));
        }
        self.ledger.set(uid, devices)
    }

    /// Ends all pools by force, and takes no more. Waits for that, with a bound.
    pub fn shutdown(&self) {
        let ids: Vec<u64> = {
            let mut state = self.shared.state();
            state.stopped = true;
            state.tenants.keys().copied().collect()
        };
        for id in ids {
            self.reaper.end(id);
        }
        let until = Instant::now() + END_MAX;
        while !self.shared.state().tenants.is_empty() && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(10));
        }
        for tenant in self.shared.state().tenants.values() {
            tracing::warn!("private pool {} did not end in time", tenant.spec.name);
        }
        self.reaper.stop();
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        self.reaper.stop();
    }
}

impl std::fmt::Debug for Registry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Registry").field("pools", &self.shared.state().tenants.len()).finish_non_exhaustive()
    }
}

/// What was asked for, if the caller may ask for it.
fn foreign(what: &str, asked: Option<u32>, own: u32, caller: Caller) -> Result<u32> {
    match asked {
        Some(other) if other != own && caller.uid != 0 => {
            let message = format!("{what} {other} is not the caller's");
            Err(Error::new(Kind::Denied, message).hint("run this as root"))
        }
        // -1 means "leave as it is" to the kernel.
        Some(u32::MAX) => Err(Error::new(Kind::Invalid, format!("there is no {what} {}", u32::MAX))),
        asked => Ok(asked.unwrap_or(own)),
    }
}

fn sees(caller: Caller, tenant: &Tenant) -> bool {
    [0, tenant.spec.uid, tenant.opener].contains(&caller.uid)
}

/// Another's pool is not there, as far as a plain user can tell.
fn find<'a>(state: &'a mut State, name: &str, caller: Caller) -> Result<(u64, &'a mut Tenant)> {
    let mut tenants = state.tenants.iter_mut();
    tenants
        .find(|(_, tenant)| tenant.spec.name == name && sees(caller, tenant))
        .map(|(id, tenant)| (*id, tenant))
        .ok_or_else(|| Error::new(Kind::NotFound, format!("there is no private pool {name:?}")))
}

/// The pool, for whoever opened it.
fn open_to<'a>(
    state: &'a mut State,
    name: &str,
    caller: Caller,
) -> Result<(u64, &'a mut Tenant, Arc<dyn Room>)> {
    let (id, tenant) = find(state, name, caller)?;
    if tenant.opener != caller.uid {
        let message = format!("private pool {name} was opened by another user");
        return Err(Error::new(Kind::Denied, message));
    }
    match tenant.room.clone().filter(|_| !tenant.ending) {
        Some(room) => Ok((id, tenant, room)),
        None => Err(Error::new(Kind::Unavailable, format!("private pool {name} is ending"))),
    }
}
