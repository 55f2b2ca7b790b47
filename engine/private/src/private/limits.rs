// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Limits on devices and pools per user: defaults, limits of single users in the configuration, and
//! exceptions that root sets at run time. Root itself has no limit unless one is set.
//!
//! Devices are counted one by one when they are created (`loops::Quotas`), so that a changed limit
//! applies to present pools at once. Pools are counted here. Both count for the account of a user
//! id (`accounts`). No account may take more than a share of the remaining pools.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use zlink::introspect::CustomType;

use crate::accounts;
use crate::error::{Error, Kind, Result};
use crate::limits::POOLS_MAX;
use crate::loops::Quotas;

/// A user other than root may have at most one in so many of the remaining pools.
const SHARE: usize = 8;
/// Pools that are reserved for root.
const ROOT_POOLS: usize = 64;
/// Maximum number of users with a limit of their own.
const EXCEPTIONS_MAX: usize = 4096;

/// The limits of users without limits of their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Defaults {
    /// Devices of all pools together.
    pub devices: u32,
    /// Pools.
    pub pools: u32,
}

/// The limits of one user in the configuration. None: the default.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct UserLimit {
    /// Devices of all pools together.
    pub devices: Option<u32>,
    /// Pools.
    pub pools: Option<u32>,
}

/// The limits and the usage of a user.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, CustomType)]
#[serde(rename_all = "camelCase")]
#[zlink(rename_all = "camelCase")]
pub struct Limit {
    /// The user; none: all users that are not listed.
    pub uid: Option<u32>,
    /// Maximum number of devices over all pools; none: no limit.
    pub max_devices: Option<u32>,
    /// Present devices.
    pub devices: u32,
    /// Present pools.
    pub pools: u32,
    /// Maximum number of pools; none: no limit.
    #[serde(default)]
    pub max_pools: Option<u32>,
}

/// The limits of all users, and the pools that they have.
#[derive(Debug)]
pub struct Ledger {
    defaults: Defaults,
    quotas: Quotas,
    pools: Mutex<BTreeMap<u32, u32>>,
    /// Limits of the configuration, by account.
    users: Mutex<BTreeMap<u32, UserLimit>>,
}

/// One pool charged to a user, until this is dropped.
#[derive(Debug)]
pub struct PoolCharge {
    ledger: Arc<Ledger>,
    uid: u32,
    devices: u32,
}

impl Ledger {
    /// Creates an empty ledger. Devices are counted in `quotas`.
    pub fn new(defaults: Defaults, quotas: Quotas) -> Arc<Ledger> {
        quotas.set_default(defaults.devices);
        Arc::new(Ledger { defaults, quotas, pools: Mutex::default(), users: Mutex::default() })
    }

    /// Applies a new configuration. A limit that root has set at run time stays unless the
    /// configuration of that user has changed.
    pub fn configure(&self, users: &BTreeMap<u32, UserLimit>) {
        let users: BTreeMap<_, _> = users.iter().map(|(uid, limit)| (accounts::of(*uid), *limit)).collect();
        let mut configured = self.users();
        let before = std::mem::replace(&mut *configured, users);
        for uid in before.keys().chain(configured.keys()) {
            let devices = |of: &BTreeMap<u32, UserLimit>| of.get(uid).and_then(|limit| limit.devices);
            if devices(&before) != devices(&configured) {
                self.quotas.set_limit(*uid, devices(&configured));
            }
        }
    }

    fn users(&self) -> MutexGuard<'_, BTreeMap<u32, UserLimit>> {
        self.users.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn max_pools(&self, account: u32) -> Option<u32> {
        let own = self.users().get(&account).and_then(|limit| limit.pools);
        own.or(if account == 0 { None } else { Some(self.defaults.pools) })
    }

    fn pools(&self) -> MutexGuard<'_, BTreeMap<u32, u32>> {
        self.pools.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Charges one pool of up to `devices` devices. None: `default`, or the user's limit if that is
    /// less.
    pub fn take(self: &Arc<Ledger>, uid: u32, devices: Option<u32>, default: u32) -> Result<PoolCharge> {
        let (uid, mut pools) = (accounts::of(uid), self.pools());
        let all: usize = pools.values().map(|&count| count as usize).sum();
        let limit = self.quotas.limit(uid);
        let wanted = devices.unwrap_or(default.min(limit.max(1)));
        if wanted > limit {
            let message =
                format!("a pool of {wanted} loop devices exceeds the limit of user {uid}, which is {limit}");
            let fewer = if limit > 0 { "ask for fewer with --max; " } else { "" };
            return Err(Error::new(Kind::Quota, message)
                .hint(format!("{fewer}root raises it with 'loopengine limit {uid} N'")));
        }
        let count = pools.entry(uid).or_default();
        if self.max_pools(uid).is_some_and(|max| *count >= max) {
            let message = format!("user {uid} has {count} pools, which is the limit");
            return Err(
                Error::new(Kind::Quota, message).hint("end one of them first; 'loopengine list' shows them")
            );
        }
        let left = POOLS_MAX.saturating_sub(ROOT_POOLS + all);
        if uid != 0 && *count as usize >= left.div_ceil(SHARE) {
            let message =
                format!("user {uid} has {count} of all {all} private pools, the maximum share of one user");
            return Err(Error::new(Kind::Quota, message).hint("end one of them first, or try again later"));
        }
        *count += 1;
        Ok(PoolCharge { ledger: Arc::clone(self), uid, devices: wanted })
    }

    /// Sets the limit of a user. None: that of the configuration. Present devices stay.
    pub fn set(&self, uid: u32, devices: Option<u32>) -> Result<()> {
        if devices.is_some() && self.quotas.list().len() >= EXCEPTIONS_MAX {
            let message = format!(
                "cannot set a limit: {EXCEPTIONS_MAX} users already have devices or a limit of their own"
            );
            return Err(Error::new(Kind::Quota, message));
        }
        let configured = self.users().get(&accounts::of(uid)).and_then(|limit| limit.devices);
        self.quotas.set_limit(uid, devices.or(configured));
        Ok(())
    }

    /// The default first, then all users with limits of their own, devices or pools.
    pub fn list(&self) -> Vec<Limit> {
        let pools = self.pools();
        let Defaults { devices, pools: max_pools } = self.defaults;
        let (max_devices, max_pools) = (Some(devices), Some(max_pools));
        let all = Limit { uid: None, max_devices, devices: 0, pools: 0, max_pools };
        let mut uids: Vec<u32> = self.quotas.list().into_iter().map(|(uid, ..)| uid).collect();
        uids.extend(pools.keys());
        uids.extend(self.users().keys());
        uids.sort_unstable();
        uids.dedup();
        let each = uids.into_iter().map(|uid| Limit {
            uid: Some(uid),
            max_devices: Some(self.quotas.limit(uid)).filter(|&limit| limit != u32::MAX),
            devices: self.quotas.used(uid),
            pools: pools.get(&uid).copied().unwrap_or(0),
            max_pools: self.max_pools(uid),
        });
        std::iter::once(all).chain(each).collect()
    }
}

impl PoolCharge {
    /// Maximum number of devices of the pool.
    pub fn devices(&self) -> u32 {
        self.devices
    }
}

impl Drop for PoolCharge {
    fn drop(&mut self) {
        let mut pools = self.ledger.pools();
        if let Some(count) = pools.get_mut(&self.uid) {
            *count = count.saturating_sub(1);
            if *count == 0 {
                pools.remove(&self.uid);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ledger() -> Arc<Ledger> {
        Ledger::new(Defaults { devices: 10, pools: 3 }, Quotas::default())
    }

    #[test]
    fn counts_pools_until_they_are_dropped() {
        let ledger = ledger();
        let mut charge: Vec<_> = (0..3).map(|_| ledger.take(7, None, 8).unwrap()).collect();
        assert_eq!(charge[0].devices(), 8);
        assert!(ledger.take(7, None, 8).unwrap_err().message().contains("pools"));
        let _another = ledger.take(8, None, 8).unwrap();
        charge.pop();
        charge.push(ledger.take(7, None, 100).unwrap());
        assert_eq!(charge[2].devices(), 10);
        drop(charge);
        assert_eq!(ledger.list().len(), 2, "users without pools are not listed");
    }

    #[test]
    fn applies_limits_to_new_devices() {
        let ledger = ledger();
        let _pools = [ledger.take(7, Some(10), 8).unwrap(), ledger.take(7, Some(10), 8).unwrap()];
        let devices: Vec<_> = (0..10).map(|_| ledger.quotas.charge(7).unwrap()).collect();
        assert!(ledger.quotas.charge(7).is_err());
        ledger.set(7, Some(11)).unwrap();
        let last = ledger.quotas.charge(7).unwrap();
        ledger.set(7, Some(1)).unwrap();
        let shown = Limit { uid: Some(7), max_devices: Some(1), devices: 11, pools: 2, max_pools: Some(3) };
        assert_eq!(ledger.list()[1], shown);
        drop((devices, last));
        assert!(ledger.quotas.charge(7).is_ok());
        assert!(ledger.take(7, Some(2), 8).is_err());
    }

    #[test]
    fn keeps_pools_for_other_users_and_root() {
        let ledger = Ledger::new(Defaults { devices: 10, pools: 10_000 }, Quotas::default());
        let mut charge = Vec::new();
        for uid in 1..=30 {
            while let Ok(one) = ledger.take(uid, None, 8) {
                charge.push(one);
            }
        }
        charge.push(ledger.take(31, None, 8).unwrap());
        assert!(charge.len() < POOLS_MAX - ROOT_POOLS);
        ledger.take(0, None, 8).unwrap();
    }

    #[test]
    fn root_overrides_limits_of_the_configuration() {
        let ledger = ledger();
        let configure = |limits: &[(u32, Option<u32>, Option<u32>)]| {
            let limit = |&(uid, devices, pools)| (uid, UserLimit { devices, pools });
            ledger.configure(&limits.iter().map(limit).collect());
        };
        let shown = |uid| {
            let limits = ledger.list();
            let own = limits.iter().find(|limit| limit.uid == Some(uid))?;
            Some((own.max_devices, own.max_pools))
        };
        configure(&[(7, Some(20), None), (8, None, Some(1)), (0, None, Some(0))]);
        assert_eq!((shown(7), shown(8)), (Some((Some(20), Some(3))), Some((Some(10), Some(1)))));
        let _pool = ledger.take(8, None, 8).unwrap();
        assert!(ledger.take(8, None, 8).unwrap_err().message().contains("has 1 pools"));
        assert!(ledger.take(0, None, 8).unwrap_err().message().contains("has 0 pools"));
        // A limit of root holds until the configuration changes.
        ledger.set(7, Some(30)).unwrap();
        configure(&[(7, Some(20), Some(5))]);
        assert_eq!((shown(7), shown(8)), (Some((Some(30), Some(5))), Some((Some(10), Some(3)))));
        ledger.set(7, None).unwrap();
        assert_eq!(shown(7), Some((Some(20), Some(5))));
        configure(&[(7, Some(21), None)]);
        assert_eq!(shown(7), Some((Some(21), Some(3))));
        configure(&[]);
        assert_eq!(shown(7), None);
        assert!(ledger.take(7, Some(11), 8).is_err());
    }

    #[test]
    fn limits_root_only_if_root_sets_a_limit() {
        let ledger = ledger();
        let _many = ledger.take(0, Some(1000), 8).unwrap();
        ledger.set(0, Some(999)).unwrap();
        assert!(ledger.take(0, Some(1000), 8).is_err());
    }
}
