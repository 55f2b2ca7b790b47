// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The private pools of loop devices: their owners and lifetimes.
//!
//! A tenant has a pool, its file system with the nodes, the supervisors of the processes that use
//! it, its part of their /dev and /sys, and its share of the user's limit. This module knows how
//! these depend on each other, and who owns them. It knows neither sockets nor what an operation on
//! a device does.
//!
//! A tenant ends
//! - when the last process under its filter ends: by force, within a second, or four more while
//!   FUSE drivers write back. A pool for containers stays for the next container;
//! - when the last mount of its file system is gone, also if it was never attached: unused devices
//!   at once, the others at their last close;
//! - on [`Registry::close`], with or without force;
//! - with the daemon, by force.
//!
//! It is listed, and counts, until its last device is removed. Pool names are unique in the daemon.
//! Those of users other than root begin with the user id, so that users cannot take each other's.

mod backend;
mod container;
mod container_mounts;
mod descriptors;
pub mod limits;
mod list;
mod mirror;
mod operation;
mod pool_handle;
mod spec;
mod sysfs;
mod tenant_reaper;
mod tree;

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

pub use backend::PoolBackend;
pub use container::ContainerSession;
pub use limits::{Defaults, Limit, UserLimit};
pub use operation::{DeviceStatus, LoopInfo64, Operation, OperationRequest, OperationResult};
pub use pool_handle::{Mounter, PoolHandle, PoolSource};
pub use spec::{Caller, OpenSpec, OpenedPool, PoolInfo, RESERVED_MAX};
pub use sysfs::{LIBUDEV, NO_UDEV, SYSFS_DIRS};
pub use tenant_reaper::TenantEvents;
pub use tree::{DEV_BLOCK, LOOPFS};

use crate::accounts;
use crate::error::{Error, Kind, Result};
use crate::instance::MAX_DEVICES;
use crate::limits::POOLS_MAX;
use crate::loops::PoolSpec;
use crate::sys::processes;
use container::ContainerSessions;
use limits::{Ledger, PoolCharge};
use mirror::Mirror;
use tenant_reaper::TenantReaper;

/// Default number of devices of a pool.
pub const DEFAULT_DEVICES: u32 = 8;
/// How long the daemon waits at its end for the next pool to end, and for all of them. The service
/// manager waits 90 s for the daemon.
const END_MAX: Duration = Duration::from_secs(5);
const END_ALL_MAX: Duration = Duration::from_secs(45);
/// The directory of the nodes of a pool for containers, beside those for /sys.
pub const DEV: &str = "dev";
/// Default mode of the nodes.
const MODE: u32 = 0o660;

/// All tenants of one daemon.
pub struct Registry {
    source: Box<dyn PoolSource>,
    ledger: Arc<Ledger>,
    shared: Arc<RegistryShared>,
    reaper: Arc<TenantReaper>,
}

#[derive(Default)]
struct RegistryShared(Mutex<RegistryState>);

#[derive(Default)]
struct RegistryState {
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
    /// None while it is being opened.
    pool: Option<Arc<dyn PoolHandle>>,
    /// Its names in /dev and /sys, if it is open and has some.
    mirror: Option<Arc<Mirror>>,
    supervised: bool,
    sessions: ContainerSessions,
    ending: bool,
    charge: PoolCharge,
}

impl RegistryShared {
    fn state(&self) -> MutexGuard<'_, RegistryState> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Removes a tenant without devices.
    fn remove(&self, id: u64) {
        let gone = {
            let mut state = self.state();
            let gone = state.tenants.remove(&id);
            // It is uncounted at once; the rest is dropped outside of the lock.
            gone.map(|Tenant { charge, spec, pool, sessions, .. }| {
                drop(charge);
                (spec.name, pool, sessions)
            })
        };
        if let Some((name, ..)) = &gone {
            tracing::info!("private pool {name} has ended");
        }
    }

    fn end(&self, id: u64, force: bool) {
        let pool = {
            let mut state = self.state();
            let Some(tenant) = state.tenants.get_mut(&id) else { return };
            tenant.ending = true;
            tenant.pool.clone()
        };
        if let Some(pool) = pool {
            pool.end(force);
        }
    }
}

impl Registry {
    /// Creates an empty registry. Starts a thread, which ends with [`Registry::shutdown`].
    pub fn start(source: impl PoolSource, defaults: Defaults) -> Result<Registry> {
        let shared = Arc::new(RegistryShared::default());
        let reaper = TenantReaper::start(Arc::clone(&shared))?;
        let ledger = Ledger::new(defaults, source.quotas());
        Ok(Registry { source: Box::new(source), ledger, shared, reaper })
    }

    /// Opens a pool for `caller`.
    pub fn open(&self, request: &OpenSpec, caller: Caller) -> Result<OpenedPool> {
        let uid = check_id("user", request.uid, caller.uid, caller)?;
        let gid = check_id("group", request.gid, caller.gid, caller)?;
        let mode = request.mode.unwrap_or(MODE);
        if mode & !0o666 != 0 {
            return Err(Error::new(Kind::Invalid, format!("mode {mode:o} is not valid for a device node"))
                .hint("use only the bits of 0666"));
        }
        if let Some(max) = request.max.filter(|max| !(1..=MAX_DEVICES).contains(max)) {
            return Err(Error::new(Kind::Invalid, format!("a pool cannot have {max} devices"))
                .hint(format!("ask for 1 to {MAX_DEVICES}")));
        }
        let (reserved, backend) = (request.reserved()?, request.backend);
        let fixed = request.container.unwrap_or(false);
        if fixed && caller.uid != 0 {
            return Err(Error::new(Kind::Denied, "only root may open pools for containers")
                .hint("use 'loopengine run' as a user"));
        }
        let intercepted = !fixed && request.dev_and_sys.unwrap_or(false);
        let kinds =
            self.source.kernel_mounts(request.kernel_mounts.as_deref().unwrap_or_default(), caller)?;
        let charge = self.ledger.take(uid, request.max, DEFAULT_DEVICES)?;
        let max = charge.devices();
        let (id, spec) = self.enter(
            request,
            caller,
            |name| PoolSpec { name, max, uid, gid, mode, fixed, intercepted, reserved, backend },
            charge,
        )?;
        let made = self.make(id, &spec, fixed || intercepted);
        let (pool, mirror, mounts) = match made {
            Ok(made) => made,
            Err(error) => {
                drop(self.shared.state().tenants.remove(&id));
                return Err(error);
            }
        };
        pool.allow_kernel_mounts(kinds);
        let mut state = self.shared.state();
        let mut end_now = state.stopped;
        // It may have ended already, or have been closed meanwhile.
        if let Some(tenant) = state.tenants.get_mut(&id) {
            tenant.pool = Some(Arc::clone(&pool));
            tenant.mirror = mirror;
            end_now |= tenant.ending;
        }
        drop(state);
        if end_now {
            pool.end(true);
        }
        Ok(OpenedPool { name: spec.name, backend: pool.backend(), mounts })
    }

    /// Reserves a name.
    fn enter(
        &self,
        request: &OpenSpec,
        caller: Caller,
        spec: impl FnOnce(String) -> PoolSpec,
        charge: PoolCharge,
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
        let name = spec::full_name(request.name.as_deref(), id, caller)?;
        if state.tenants.values().any(|tenant| tenant.spec.name == name) {
            return Err(Error::new(Kind::Exists, format!("private pool {name} exists")));
        }
        let spec = spec(name);
        let tenant = Tenant {
            spec: spec.clone(),
            opener: caller.uid,
            process,
            since: SystemTime::now(),
            pool: None,
            mirror: None,
            supervised: false,
            sessions: ContainerSessions::default(),
            ending: false,
            charge,
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
    ) -> Result<(Arc<dyn PoolHandle>, Option<Arc<Mirror>>, Vec<OwnedFd>)> {
        let mirror = match mirrored {
            true => Some(Arc::new(Mirror::make(spec.max, spec.uid, spec.gid)?)),
            false => None,
        };
        if let Some(mirror) = mirror.as_ref().filter(|_| spec.fixed) {
            mirror.add_directory(DEV)?;
        }
        let (pool, mount) = self.source.open(spec, self.reaper.events(id, mirror.clone()))?;
        let mut mounts = vec![mount];
        if let Some(mirror) = &mirror {
            match mirror.mounts() {
                Ok(more) => mounts.extend(more),
                Err(error) => {
                    pool.end(true);
                    return Err(error);
                }
            }
        }
        Ok((pool, mirror, mounts))
    }

    /// Serves the filter with this listener, for the user who opened the pool. The pool then ends
    /// with the last process under that filter.
    pub fn supervise(
        &self,
        name: &str,
        listener: OwnedFd,
        namespace: OwnedFd,
        mounter: Option<Mounter>,
        caller: Caller,
    ) -> Result<()> {
        descriptors::check(&listener, &namespace, mounter.as_ref().map(|mounter| &mounter.socket))?;
        let (id, pool) = {
            let mut state = self.shared.state();
            let (id, tenant, pool) = open_to(&mut state, name, caller)?;
            if tenant.spec.fixed {
                return Err(Error::new(Kind::Invalid, format!("private pool {name} is for containers")));
            }
            if tenant.supervised {
                return Err(Error::new(Kind::Exists, format!("private pool {name} is supervised already")));
            }
            tenant.supervised = true;
            (id, pool)
        };
        let cannot = |error| Error::os(error, "cannot watch the processes of a pool");
        let watched = listener.try_clone().map_err(cannot)?;
        pool.supervise(listener, namespace, mounter)?;
        self.reaper.watch(id, watched).map_err(cannot)
    }

    /// Runs an operation on a device of a pool, without a descriptor of the device.
    pub fn operate(
        &self,
        name: &str,
        request: &OperationRequest,
        file: Option<OwnedFd>,
        caller: Caller,
    ) -> Result<OperationResult> {
        let pool = find(&mut self.shared.state(), name, caller)?.1.pool.clone();
        match pool {
            Some(pool) => Ok(pool.operate(request, file)),
            None => Err(Error::new(Kind::Unavailable, format!("private pool {name} is being opened"))),
        }
    }

    /// Ends a pool. Without `force`, devices in use stay until their last close.
    pub fn close(&self, name: &str, force: bool, caller: Caller) -> Result<()> {
        let (id, _) = find(&mut self.shared.state(), name, caller)?;
        self.shared.end(id, force);
        Ok(())
    }

    /// Limits of users; users other than root see their own.
    pub fn limits(&self, caller: Caller) -> Vec<Limit> {
        let mut limits = self.ledger.list();
        limits.retain(|limit| caller.uid == 0 || limit.uid.is_none_or(|uid| uid == accounts::of(caller.uid)));
        limits
    }

    /// Applies the limits of a new configuration.
    pub fn configure(&self, users: &BTreeMap<u32, UserLimit>) {
        self.ledger.configure(users);
    }

    /// Sets the limit of a user, until the daemon ends. None: that of the configuration.
    pub fn set_limit(&self, uid: u32, devices: Option<u32>, caller: Caller) -> Result<()> {
        if caller.uid != 0 {
            return Err(Error::new(Kind::Denied, "only root may change limits").hint("run this as root"));
        }
        self.ledger.set(uid, devices)
    }

    /// Ends all pools by force, and opens no more. Waits for the end, with a timeout.
    pub fn shutdown(&self) {
        let ids: Vec<u64> = {
            let mut state = self.shared.state();
            state.stopped = true;
            state.tenants.keys().copied().collect()
        };
        for id in ids {
            self.reaper.end(id);
        }
        let until = Instant::now() + END_ALL_MAX;
        let (mut left, mut since) = (usize::MAX, Instant::now());
        while left > 0 && since.elapsed() < END_MAX && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(10));
            let now = self.shared.state().tenants.len();
            if now != left {
                (left, since) = (now, Instant::now());
            }
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

/// Checks a requested user or group.
fn check_id(what: &str, requested: Option<u32>, own: u32, caller: Caller) -> Result<u32> {
    match requested {
        Some(other) if other != own && caller.uid != 0 => {
            let message = format!("only root can open a pool for another {what} ({other})");
            Err(Error::new(Kind::Denied, message).hint("run this as root"))
        }
        // To the kernel -1 means "unchanged".
        Some(u32::MAX) => Err(Error::new(Kind::Invalid, format!("there is no {what} {}", u32::MAX))),
        requested => Ok(requested.unwrap_or(own)),
    }
}

fn sees(caller: Caller, tenant: &Tenant) -> bool {
    [0, tenant.spec.uid, tenant.opener].contains(&caller.uid)
}

/// Users other than root cannot tell another user's pool from one that does not exist.
fn find<'a>(state: &'a mut RegistryState, name: &str, caller: Caller) -> Result<(u64, &'a mut Tenant)> {
    let mut tenants = state.tenants.iter_mut();
    tenants
        .find(|(_, tenant)| tenant.spec.name == name && sees(caller, tenant))
        .map(|(id, tenant)| (*id, tenant))
        .ok_or_else(|| {
            Error::new(Kind::NotFound, format!("there is no private pool {name:?}"))
                .hint("'loopengine list --all' shows the pools of the user; for root, all")
        })
}

/// The pool, for the user who opened it.
fn open_to<'a>(
    state: &'a mut RegistryState,
    name: &str,
    caller: Caller,
) -> Result<(u64, &'a mut Tenant, Arc<dyn PoolHandle>)> {
    let (id, tenant) = find(state, name, caller)?;
    if tenant.opener != caller.uid {
        let message = format!("private pool {name} was opened by another user");
        return Err(Error::new(Kind::Denied, message));
    }
    match tenant.pool.clone().filter(|_| !tenant.ending) {
        Some(pool) => Ok((id, tenant, pool)),
        None => Err(Error::new(Kind::Unavailable, format!("private pool {name} is ending"))),
    }
}
