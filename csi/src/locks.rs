// SPDX-License-Identifier: Apache-2.0 OR MIT
//! One call at a time for a volume or snapshot.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use tonic::Status;

/// Who holds what: the number of readers, or `WRITER`.
type Holders = Mutex<HashMap<String, u32>>;
const WRITER: u32 = u32::MAX;

/// The locks of all volumes and snapshots.
#[derive(Debug, Default)]
pub struct Locks(Arc<Holders>);

/// Held until it is dropped.
#[derive(Debug)]
pub struct Lock {
    holders: Arc<Holders>,
    key: String,
}

impl Locks {
    /// Takes `key` for a call that changes it.
    pub fn write(&self, key: String) -> Result<Lock, Status> {
        self.take(key, |held| (held == 0).then_some(WRITER))
    }

    /// Takes `key` for a call that reads it, beside others that do.
    pub fn read(&self, key: String) -> Result<Lock, Status> {
        self.take(key, |held| (held < WRITER - 1).then(|| held + 1))
    }

    fn take(&self, key: String, next: impl FnOnce(u32) -> Option<u32>) -> Result<Lock, Status> {
        let mut holders = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let held = holders.get(&key).copied().unwrap_or(0);
        let Some(next) = next(held) else {
            return Err(Status::aborted(format!("another call for the {key} is running; try again later")));
        };
        holders.insert(key.clone(), next);
        Ok(Lock { holders: Arc::clone(&self.0), key })
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        let mut holders = self.holders.lock().unwrap_or_else(PoisonError::into_inner);
        match holders.get_mut(&self.key) {
            Some(held) if *held != WRITER && *held > 1 => *held -= 1,
            _ => drop(holders.remove(&self.key)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_writer_is_alone_and_readers_are_not() {
        let locks = Locks::default();
        let writer = locks.write("a".into()).unwrap();
        assert_eq!(locks.write("a".into()).unwrap_err().code(), tonic::Code::Aborted);
        assert!(locks.read("a".into()).is_err());
        drop((locks.write("b".into()).unwrap(), writer));
        let readers = [locks.read("a".into()).unwrap(), locks.read("a".into()).unwrap()];
        assert!(locks.write("a".into()).is_err());
        drop(readers);
        drop(locks.write("a".into()).unwrap());
        assert!(locks.0.lock().unwrap().is_empty());
    }
}
