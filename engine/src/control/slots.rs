// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Admission of connections and calls on a socket that everybody may use.
//!
//! Idle connections are cheap and can be ended. When all slots are in use, the account with most
//! slots loses its oldest idle connection to an account with fewer. Calls may block on their
//! caller's files and cannot be ended, so an account begins one only within its share of the free
//! slots. Root has reserved slots. Knows accounts and counts; does not know sockets.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use crate::limits::{CONNECTIONS_MAX, ROOT_CONNECTIONS, USER_CONNECTIONS_MAX};

/// An account may use at most one in this many of the free slots for calls.
const SHARE: usize = 8;

/// All slots of a socket.
#[derive(Clone, Debug, Default)]
pub(super) struct ConnectionSlots(Arc<SlotsInner>);

#[derive(Debug, Default)]
struct SlotsInner {
    table: Mutex<SlotTable>,
    /// A call or a connection has ended.
    freed: Notify,
}

#[derive(Debug, Default)]
struct SlotTable {
    /// By age.
    entries: BTreeMap<u64, SlotEntry>,
    last: u64,
}

#[derive(Debug)]
struct SlotEntry {
    account: u32,
    in_call: bool,
    evicted: bool,
    evict: Arc<Notify>,
}

/// One connection's slot, freed on drop.
#[derive(Debug)]
pub(super) struct ConnectionSlot {
    slots: ConnectionSlots,
    id: u64,
    account: u32,
    evict: Arc<Notify>,
}

impl ConnectionSlots {
    fn table(&self) -> MutexGuard<'_, SlotTable> {
        self.0.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A slot for a connection of `account`; or the reason for refusal.
    pub(super) fn admit(&self, account: u32) -> Result<ConnectionSlot, String> {
        let mut table = self.table();
        let (own, all) = (table.count(account), table.entries.len());
        if account != 0 && own >= USER_CONNECTIONS_MAX {
            return Err(format!("user {account} has {own} connections already"));
        }
        let most = CONNECTIONS_MAX + if account == 0 { ROOT_CONNECTIONS } else { 0 };
        if all >= most && !table.evict(own + 1) {
            return Err(format!("{all} connections are served already"));
        }
        table.last += 1;
        let (id, evict) = (table.last, Arc::new(Notify::new()));
        let entry = SlotEntry { account, in_call: false, evicted: false, evict: Arc::clone(&evict) };
        table.entries.insert(id, entry);
        Ok(ConnectionSlot { slots: self.clone(), id, account, evict })
    }
}

impl SlotTable {
    fn count(&self, account: u32) -> usize {
        self.entries.values().filter(|entry| entry.account == account).count()
    }

    /// Ends the oldest idle connection of the account with most slots, if it has more than `least`.
    fn evict(&mut self, least: usize) -> bool {
        let idle = |entry: &SlotEntry| !entry.in_call && !entry.evicted;
        let accounts: Vec<u32> = self.entries.values().filter(|e| idle(e)).map(|e| e.account).collect();
        let richest = accounts.into_iter().max_by_key(|&account| self.count(account));
        let Some(richest) = richest.filter(|&account| self.count(account) > least) else { return false };
        let mut its = self.entries.values_mut().filter(|entry| entry.account == richest && idle(entry));
        its.next().is_some_and(|entry| {
            entry.evicted = true;
            entry.evict.notify_one();
            true
        })
    }

    /// Whether `account` may begin one more call.
    fn has_share(&self, account: u32) -> bool {
        let calls = || self.entries.values().filter(|entry| entry.in_call);
        let own = calls().filter(|entry| entry.account == account).count();
        let free = CONNECTIONS_MAX.saturating_sub(calls().count());
        account == 0 || own < (free / SHARE).max(1)
    }
}

impl ConnectionSlot {
    /// Completes when another account needs the slot.
    pub(super) async fn evicted(&self) {
        self.evict.notified().await;
    }

    /// Waits until this connection may begin a call.
    pub(super) async fn begin_call(&self) {
        loop {
            let freed = self.slots.0.freed.notified();
            tokio::pin!(freed);
            freed.as_mut().enable();
            {
                let mut table = self.slots.table();
                let may = table.has_share(self.account);
                if let Some(entry) = table.entries.get_mut(&self.id).filter(|entry| may && !entry.evicted) {
                    entry.in_call = true;
                    return;
                }
            }
            freed.await;
        }
    }

    /// The call has ended.
    pub(super) fn end_call(&self) {
        if let Some(entry) = self.slots.table().entries.get_mut(&self.id) {
            entry.in_call = false;
        }
        self.slots.0.freed.notify_waiters();
    }
}

impl Drop for ConnectionSlot {
    fn drop(&mut self) {
        self.slots.table().entries.remove(&self.id);
        self.slots.0.freed.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;
    use tokio::time::timeout;

    async fn begins(slot: &ConnectionSlot) -> bool {
        timeout(Duration::from_millis(5), slot.begin_call()).await.is_ok()
    }

    #[tokio::test]
    async fn evicts_an_idle_connection_of_the_account_with_most() {
        let slots = ConnectionSlots::default();
        let users = u32::try_from(CONNECTIONS_MAX / USER_CONNECTIONS_MAX).unwrap();
        let all = (1..=users).flat_map(|user| (0..USER_CONNECTIONS_MAX).map(move |_| user));
        let mut held: Vec<ConnectionSlot> = all.map(|user| slots.admit(user).unwrap()).collect();
        assert!(slots.admit(1).unwrap_err().contains("user 1 has"));
        let _newcomer = slots.admit(9999).unwrap();
        let mut evicted = 0;
        for slot in &held {
            evicted += usize::from(timeout(Duration::ZERO, slot.evicted()).await.is_ok());
        }
        assert_eq!(evicted, 1);
        let _root = slots.admit(0).unwrap();
        held.truncate(10);
        slots.admit(9998).unwrap();
    }

    #[tokio::test]
    async fn hanging_calls_leave_others_their_share() {
        let slots = ConnectionSlots::default();
        let mut held = Vec::new();
        for user in 1..=30 {
            for _ in 0..USER_CONNECTIONS_MAX {
                let Ok(slot) = slots.admit(user) else { break };
                if !begins(&slot).await {
                    break;
                }
                held.push(slot);
            }
        }
        let newcomer = slots.admit(9999).unwrap();
        assert!(begins(&newcomer).await, "{} calls hang", held.len());
        let waiting = slots.admit(30).unwrap();
        assert!(!begins(&waiting).await, "more than its share");
        held.truncate(1);
        assert!(begins(&waiting).await);
        waiting.end_call();
    }
}
