// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Lists pools, with their owners and ages.
//!
//! Knows the registry's data of a tenant. The client looks up mounts and process names.

use std::sync::Arc;
use std::time::UNIX_EPOCH;

use super::{Caller, PoolHandle, PoolInfo, Registry, Tenant, sees};
use crate::instance::activity::DeviceActivity;
use crate::loops::PoolSpec;

impl Registry {
    /// The pools of `caller`, oldest first; for root, all.
    pub fn list(&self, caller: Caller) -> Vec<PoolInfo> {
        let state = self.shared.state();
        let mine = state.tenants.values().filter(|tenant| sees(caller, tenant));
        let known: Vec<_> = mine.map(|tenant| (describe(tenant), tenant.pool.clone())).collect();
        drop(state);
        // Outside of the lock of the state.
        known.into_iter().map(|(info, pool)| with_devices(info, pool)).collect()
    }

    /// What the bound devices of the pools of `caller` do; for root, of all pools.
    pub fn activity(&self, caller: Caller) -> Vec<DeviceActivity> {
        let state = self.shared.state();
        let mine = state.tenants.values().filter(|tenant| sees(caller, tenant));
        let pools: Vec<_> = mine.filter_map(|tenant| tenant.pool.clone()).collect();
        drop(state);
        // Outside of the lock of the state.
        pools.iter().flat_map(|pool| pool.activity()).collect()
    }
}

fn describe(tenant: &Tenant) -> PoolInfo {
    let PoolSpec { name, uid, max, reserved, .. } = tenant.spec.clone();
    PoolInfo {
        name,
        uid,
        max,
        supervised: tenant.supervised || tenant.sessions.is_active(),
        reserved: reserved.into_iter().collect(),
        ending: tenant.ending,
        pid: tenant.process.map(|(pid, _)| pid),
        pid_start_ticks: tenant.process.map(|(_, started)| started),
        container: tenant.sessions.container().map(str::to_owned),
        since_unix_seconds: tenant.since.duration_since(UNIX_EPOCH).ok().map(|since| since.as_secs()),
        ..PoolInfo::default()
    }
}

fn with_devices(mut info: PoolInfo, pool: Option<Arc<dyn PoolHandle>>) -> PoolInfo {
    let Some(pool) = pool else { return info };
    let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    let entries = pool.entries();
    info.devices = count(entries.len());
    info.bound = count(entries.iter().filter(|entry| entry.bound.is_some()).count());
    info.device_numbers = pool.device_numbers();
    info.backend = pool.backend().map(str::to_owned);
    info.kernel_mounts = pool.kernel_mounts().iter().map(|kind| kind.name.to_owned()).collect();
    info
}
