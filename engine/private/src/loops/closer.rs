//! Closes the backing files of one user's pools, each on a thread of its own.
//!
//! close(2) blocks as long as the file system likes: a FUSE server may never answer FLUSH. So no thread that others
//! wait for closes a file, and a user with too many files that do not close binds no more. Knows nothing of devices.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::limits::CLOSING_MAX;

type Holder = Box<dyn Send>;

/// See the module. Clones count together.
#[derive(Clone, Default)]
pub struct Closer(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    running: usize,
    /// Those for which no thread could be started; the next close takes them along.
    postponed: Vec<Holder>,
}

impl Closer {
    /// Drops what holds a backing file. Never blocks.
    pub fn close(&self, holder: impl Send + 'static) {
        let mut state = self.state();
        state.postponed.push(Box::new(holder));
        while let Some(holder) = state.postponed.pop() {
            // A thread that cannot be started drops its closure: the holder stays here until it can.
            let (give, take) = std::sync::mpsc::channel::<Holder>();
            let closer = self.clone();
            let close = move || {
                drop(take.recv());
                closer.state().running -= 1;
            };
            if let Err(error) = std::thread::Builder::new().name("close".into()).spawn(close) {
                tracing::warn!(%error, "cannot start a thread to close a backing file: it stays open for now");
                state.postponed.push(holder);
                return;
            }
            state.running += 1;
            // The receiver waits for this.
            let _ = give.send(holder);
        }
    }

    /// So many files are closing that no more may be bound.
    pub fn is_full(&self) -> bool {
        let state = self.state();
        state.running + state.postponed.len() >= CLOSING_MAX
    }

    /// Pools of the user have it, or there is something to close yet.
    pub(super) fn is_needed(&self) -> bool {
        Arc::strong_count(&self.0) > 1 || !self.state().postponed.is_empty()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl std::fmt::Debug for Closer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Closer").field("running", &self.state().running).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::{Receiver, Sender, channel};
    use std::time::{Duration, Instant};

    /// As a file whose server does not answer.
    struct Hangs(Receiver<()>);

    impl Drop for Hangs {
        fn drop(&mut self) {
            let _ = self.0.recv();
        }
    }

    #[test]
    fn files_that_do_not_close_have_a_limit() {
        let closer = Closer::default();
        let held: Vec<Sender<()>> = (0..CLOSING_MAX)
            .map(|_| {
                assert!(!closer.is_full());
                let (answer, answered) = channel();
                closer.close(Hangs(answered));
                answer
            })
            .collect();
        assert!(closer.is_full());
        drop(held);
        let until = Instant::now() + Duration::from_secs(10);
        while closer.is_full() {
            assert!(Instant::now() < until, "nothing was closed");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}
