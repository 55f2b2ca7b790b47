// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A deadline for system calls that may block.
//!
//! Each call has a thread for itself: a new one, or one whose call has ended. A thread waits with a
//! condition variable. A channel yields the CPU before it sleeps, which costs time slices where
//! others compute.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::error::{Error, Kind, Result};

/// Deadline of a system call that may depend on our own threads, or on the file system of an image.
const CALL_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a thread waits for another call.
const IDLE_TIMEOUT: Duration = Duration::from_millis(500);

type Call = Box<dyn FnOnce() + Send>;

/// The threads that wait for a call.
static IDLE: Mutex<Vec<Arc<Mailbox<Call>>>> = Mutex::new(Vec::new());

/// Passes one value to another thread.
struct Mailbox<T> {
    value: Mutex<Option<T>>,
    filled: Condvar,
}

impl<T> Mailbox<T> {
    fn new() -> Arc<Mailbox<T>> {
        Arc::new(Mailbox { value: Mutex::new(None), filled: Condvar::new() })
    }

    fn put(&self, value: T) {
        *lock(&self.value) = Some(value);
        self.filled.notify_one();
    }

    fn take(&self, timeout: Duration) -> Option<T> {
        let waited = self.filled.wait_timeout_while(lock(&self.value), timeout, |value| value.is_none());
        waited.unwrap_or_else(PoisonError::into_inner).0.take()
    }
}

/// Makes a system call on another thread. If it hangs, so does the thread, but not the caller.
pub(super) fn with_timeout<T: Send + 'static>(
    what: &str,
    call: impl FnOnce() -> T + Send + 'static,
) -> Result<T> {
    let done = Mailbox::new();
    let its = Arc::clone(&done);
    let call: Call = Box::new(move || its.put(call()));
    let idle = lock(&IDLE).pop();
    match idle {
        Some(thread) => thread.put(call),
        None => {
            let thread = std::thread::Builder::new().name("driver call".to_owned());
            let started = thread.spawn(move || serve(call));
            started.map_err(|error| Error::os(error, "cannot start a thread"))?;
        }
    }
    done.take(CALL_TIMEOUT).ok_or_else(|| {
        Error::new(Kind::Deadline, format!("{what} took more than {} s", CALL_TIMEOUT.as_secs()))
    })
}

fn serve(first: Call) {
    first();
    let calls = Mailbox::new();
    loop {
        lock(&IDLE).push(Arc::clone(&calls));
        let call = calls.take(IDLE_TIMEOUT).or_else(|| {
            let mut idle = lock(&IDLE);
            let before = idle.len();
            idle.retain(|other| !Arc::ptr_eq(other, &calls));
            let is_chosen = idle.len() == before;
            drop(idle);
            // A caller has chosen this thread, and is about to pass its call.
            is_chosen.then(|| calls.take(CALL_TIMEOUT)).flatten()
        });
        match call {
            Some(call) => call(),
            None => return,
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A call that hangs keeps its thread, and delays no other.
    #[test]
    fn calls_have_threads_of_their_own() {
        let (hangs, running) = (Mailbox::<()>::new(), Mailbox::new());
        let (its, its_running) = (Arc::clone(&hangs), Arc::clone(&running));
        let caller = std::thread::spawn(move || {
            with_timeout("a call", move || {
                its_running.put(());
                its.take(CALL_TIMEOUT)
            })
        });
        assert_eq!(running.take(CALL_TIMEOUT), Some(()));
        for number in 0..100 {
            assert_eq!(with_timeout("another", move || number).unwrap(), number);
        }
        hangs.put(());
        assert_eq!(caller.join().unwrap().unwrap(), Some(()));
    }

    /// A thread ends when no call follows; the next call gets another.
    #[test]
    fn outlives_idle_threads() {
        for pause in [0, 499, 500, 501, 600] {
            assert_eq!(with_timeout("a call", || 1).unwrap(), 1);
            std::thread::sleep(Duration::from_millis(pause));
        }
    }
}
