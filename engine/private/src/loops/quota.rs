//! How many loop devices a user may have, over all of that user's pools. Subordinate ids count for
//! their owner.
//!
//! Counts only; who asks for a device is known above.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::closer::Closer;
use super::{Answer, Errno};
use crate::accounts;

#[derive(Debug, Default)]
struct Table {
    usual: u32,
    /// Limits other than the usual one.
    limits: HashMap<u32, u32>,
    used: HashMap<u32, u32>,
    closers: HashMap<u32, Closer>,
}

/// All users' limits and what they have.
#[derive(Clone, Debug, Default)]
pub struct Quotas(Arc<Mutex<Table>>);

/// One device on a user's account; given back when dropped.
#[derive(Debug)]
pub struct Charge {
    quotas: Quotas,
    uid: u32,
}

impl Quotas {
    /// Everybody may have `usual` devices; root any number.
    pub fn new(usual: u32) -> Quotas {
        let quotas = Quotas::default();
        quotas.set_usual(usual);
        quotas
    }

    /// Changes what everybody may have who has no limit of its own.
    pub fn set_usual(&self, usual: u32) {
        self.table().usual = usual;
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What a user may have.
    pub fn limit(&self, uid: u32) -> u32 {
        self.table().limit(accounts::of(uid))
    }

    /// What a user has.
    pub fn used(&self, uid: u32) -> u32 {
        self.table().used.get(&accounts::of(uid)).copied().unwrap_or(0)
    }

    /// Changes what a user may have; what is there stays. None: as usual.
    pub fn set_limit(&self, uid: u32, limit: Option<u32>) {
        let (uid, mut table) = (accounts::of(uid), self.table());
        match limit {
            Some(limit) => table.limits.insert(uid, limit),
            None => table.limits.remove(&uid),
        };
    }

    /// Users that have devices or a limit of their own: who, how many, at the most.
    pub fn list(&self) -> Vec<(u32, u32, u32)> {
        let table = self.table();
        let mut users: Vec<u32> = table.limits.keys().chain(table.used.keys()).copied().collect();
        users.sort_unstable();
        users.dedup();
        let row = |uid: u32| (uid, table.used.get(&uid).copied().unwrap_or(0), table.limit(uid));
        users.into_iter().map(row).collect()
    }

    /// Closes files of all the pools of a user.
    pub fn closer(&self, uid: u32) -> Closer {
        let (uid, mut table) = (accounts::of(uid), self.table());
        table.closers.retain(|_, closer| closer.is_needed());
        table.closers.entry(uid).or_default().clone()
    }

    /// Puts one more device on a user's account, or answers ENOSPC.
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

impl Table {
    fn limit(&self, uid: u32) -> u32 {
        let usual = if uid == 0 { u32::MAX } else { self.usual };
        self.limits.get(&uid).copied().unwrap_or(usual)
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
    fn a_limit_holds_over_all_and_can_be_changed() {
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
