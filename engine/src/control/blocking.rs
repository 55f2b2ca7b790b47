// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Threads for calls that may block on a caller's file, as long as its file system does.

use crate::error::{Error, Kind, Result};

/// Runs `work` on its own thread, for which the daemon's end does not wait. The caller's connection
/// counts until it has ended, which limits such threads.
pub async fn run_blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    let (sender, answer) = tokio::sync::oneshot::channel();
    let thread = std::thread::Builder::new().name("operation".into());
    let started = thread.spawn(move || drop(sender.send(work())));
    started.map_err(|error| Error::os(error, "cannot start a thread"))?;
    answer.await.map_err(|_| failed())?
}

/// The error of a call that panicked.
pub(super) fn failed() -> Error {
    let message = "the daemon failed while it handled this call";
    Error::new(Kind::Internal, message).hint("please report what its log says")
}
