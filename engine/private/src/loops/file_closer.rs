// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Closes the backing files of one user's pools, each on a thread of its own.
//!
//! close(2) may block for ever: a FUSE server may never answer FLUSH. So no thread that others wait
//! for closes a file, and a user with too many files that do not close cannot bind more. Knows
//! nothing of devices.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::limits::CLOSING_MAX;

type FileHolder = Box<dyn Send>;

/// The closing files of one user. Clones share the limit.
#[derive(Clone, Default)]
pub struct FileCloser(Arc<Mutex<CloserState>>);

#[derive(Default)]
struct CloserState {
    running: usize,
    /// Files for which no thread could be started; the next close retries.
    deferred: Vec<FileHolder>,
}

impl FileCloser {
    /// Drops the holder of a backing file. Never blocks.
    pub fn close(&self, holder: impl Send + 'static) {
        let mut state = self.state();
        state.deferred.push(Box::new(holder));
        while let Some(holder) = state.deferred.pop() {
            // A failed spawn drops its closure, so the holder is sent to the thread only after it
            // started.
            let (give, take) = std::sync::mpsc::channel::<FileHolder>();
            let closer = self.clone();
            let close = move || {
                drop(take.recv());
                closer.state().running -= 1;
            };
            if let Err(error) = std::thread::Builder::new().name("close".into()).spawn(close) {
                tracing::warn!(%error, "cannot start a thread to close a backing file: it stays open for now");
                state.deferred.push(holder);
                return;
            }
            state.running += 1;
            // The receiver waits for this.
            let _ = give.send(holder);
        }
    }

    /// Whether too many files are closing to bind more.
    pub fn is_full(&self) -> bool {
        let state = self.state();
        state.running + state.deferred.len() >= CLOSING_MAX
    }

    /// Whether pools of the user have it, or a file is still to be closed.
    pub(super) fn is_needed(&self) -> bool {
        Arc::strong_count(&self.0) > 1 || !self.state().deferred.is_empty()
    }

    fn state(&self) -> MutexGuard<'_, CloserState> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl std::fmt::Debug for FileCloser {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FileCloser").field("running", &self.state().running).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::{Receiver, Sender, channel};
    use std::time::{Duration, Instant};

    /// Stands for a file whose server does not answer.
    struct HangingFile(Receiver<()>);

    impl Drop for HangingFile {
        fn drop(&mut self) {
            let _ = self.0.recv();
        }
    }

    #[test]
    fn limits_files_that_do_not_close() {
        let closer = FileCloser::default();
        let held: Vec<Sender<()>> = (0..CLOSING_MAX)
            .map(|_| {
                assert!(!closer.is_full());
                let (answer, answered) = channel();
                closer.close(HangingFile(answered));
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
