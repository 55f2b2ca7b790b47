//! Which pools there are, whose they are, and since when.
//!
//! Knows what the registry keeps of a tenant. Where devices are mounted, and what a process is called, is for
//! the client to find out.

use std::sync::Arc;
use std::time::UNIX_EPOCH;

use super::{Caller, PoolInfo, Registry, Room, Tenant, sees};
use crate::loops::PoolSpec;

impl Registry {
    /// The pools of `caller`, by age; all for root.
    pub fn list(&self, caller: Caller) -> Vec<PoolInfo> {
        let state = self.shared.state();
        let mine = state.tenants.values().filter(|tenant| sees(caller, tenant));
        let known: Vec<_> = mine.map(|tenant| (known(tenant), tenant.room.clone())).collect();
        drop(state);
        // Asked where nobody waits for the state.
        known.into_iter().map(|(info, room)| with_devices(info, room)).collect()
    }
}

fn known(tenant: &Tenant) -> PoolInfo {
    let PoolSpec { name, uid, max, reserved, .. } = tenant.spec.clone();
    PoolInfo {
        name,
        uid,
        max,
        supervised: tenant.supervised || tenant.guests.any(),
        reserved: reserved.into_iter().collect(),
        ending: tenant.ending,
        pid: tenant.process.map(|(pid, _)| pid),
        pid_start_ticks: tenant.process.map(|(_, started)| started),
        container: tenant.guests.container().map(str::to_owned),
        since_unix_seconds: tenant.since.duration_since(UNIX_EPOCH).ok().map(|since| since.as_secs()),
        ..PoolInfo::default()
    }
}

fn with_devices(mut info: PoolInfo, room: Option<Arc<dyn Room>>) -> PoolInfo {
    let Some(room) = room else { return info };
    let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    let entries = room.entries();
    info.devices = count(entries.len());
    info.bound = count(entries.iter().filter(|entry| entry.bound.is_some()).count());
    info.device_numbers = room.device_numbers();
    info.kernel_mounts = room.kernel_mounts().iter().map(|kind| kind.name.to_owned()).collect();
    info
}
