// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Limits the loop devices of a user, over all pools of that user. Subordinate ids count for their
//! owner.
//!
//! Counts only. Does not know who asks for a device.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::file_closer::FileCloser;
use super::{Answer, Errno};
use crate::accounts;

#[derive(Debug, Default)]
struct QuotaTable {
    default: u32,
    /// Limits other than the default.
    limits: HashMap<u32, u32>,
    used: HashMap<u32, u32>,
    closers: HashMap<u32, FileCloser>,
}

/// The limits and device counts of all users.
#[derive(Clone, Debug, Default)]
pub struct Quotas(Arc<Mutex<QuotaTable>>);

/// One device charged to a user, until this is dropped.
#[derive(Debug)]
pub struct Charge {
    quotas: Quotas,
    uid: u32,
}

impl Quotas {
    /// `default` devices per user; root has no limit.
    pub fn new(default: u32) -> Quotas {
        let quotas = Quotas::default();
        quotas.set_default(default);
        quotas
    }

    /// Changes the limit of users without a limit of their own.
    pub fn set_default(&self, default: u32) {
        self.table().default = default;
    }

    fn table(&self) -> MutexGuard<'_, QuotaTable> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The limit of a user.
    pub fn limit(&self, uid: u32) -> u32 {
        self.table().limit(accounts::of(uid))
    }

    /// The devices of a user.
    pub fn used(&self, uid: u32) -> u32 {
        self.table().used.get(&accounts::of(uid)).copied().unwrap_or(0)
    }

    /// Changes the limit of a user; present devices stay. None: the default.
    pub fn set_limit(&self, uid: u32, limit: Option<u32>) {
        let (uid, mut table) = (accounts::of(uid), self.table());
        match limit {
            Some(limit) => table.limits.insert(uid, limit),
            None => table.limits.remove(&uid),
        };
    }

    /// Users that have devices or a limit of their own: user, devices, limit.
    pub fn list(&self) -> Vec<(u32, u32, u32)> {
        let table = self.table();
        let mut users: Vec<u32> = table.limits.keys().chain(table.used.keys()).copied().collect();
        users.sort_unstable();
        users.dedup();
        let row = |uid: u32| (uid, table.used.get(&uid).copied().unwrap_or(0), table.limit(uid));
        users.into_iter().map(row).collect()
    }

    /// The closer of files of all pools of a user.
    pub fn closer(&self, uid: u32) -> FileCloser {
        let (uid, mut table) = (accounts::of(uid), self.table());
        table.closers.retain(|_, closer| closer.is_needed());
        table.closers.entry(uid).or_default().clone()
    }

    /// Charges one more device to a user, or fails with ENOSPC.
    pub fn charge(&self, uid: u32) -> Answer<Charge> {
        let (uid, mut table) = (accounts::of(uid), self.table());
        let limit = table.limit(uid);
        let used = table.used.entry(uid).or_insert(0);
        if *used >= limit {
            return Err(Errno::NOSPC);
        }
        *used += 1;
        Ok(Charge { quotas: self.clone(), uid })
    }
}

impl QuotaTable {
    fn limit(&self, uid: u32) -> u32 {
        let default = if uid == 0 { u32::MAX } else { self.default };
        self.limits.get(&uid).copied().unwrap_or(default)
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        let mut table = self.quotas.table();
        if let Some(used) = table.used.get_mut(&self.uid) {
            *used -= 1;
            if *used == 0 {
                table.used.remove(&self.uid);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_devices_over_all_pools() {
        let quotas = Quotas::new(2);
        let first = quotas.charge(1000).unwrap();
        let _second = quotas.charge(1000).unwrap();
        assert_eq!(quotas.charge(1000).unwrap_err(), Errno::NOSPC);
        let _other = quotas.charge(1001).unwrap();
        quotas.set_limit(1000, Some(1));
        drop(first);
        assert_eq!(quotas.charge(1000).unwrap_err(), Errno::NOSPC);
        assert_eq!(quotas.list(), [(1000, 1, 1), (1001, 1, 2)]);
        quotas.set_limit(1000, None);
        assert!(quotas.charge(1000).is_ok());
        assert!((0..100).map(|_| quotas.charge(0)).collect::<Vec<_>>().iter().all(Result::is_ok));
    }
}
