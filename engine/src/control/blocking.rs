//! Threads for calls that may wait for a caller's file, for as long as its file system likes.

use crate::error::{Error, Kind, Result};

/// Runs `work` on a thread that nothing else needs and that the daemon's end does not wait for. The
/// caller's connection counts until it has ended, so that nobody can have many.
pub(crate) async fn apart<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    let (sender, answer) = tokio::sync::oneshot::channel();
    let thread = std::thread::Builder::new().name("operation".into());
    let started = thread.spawn(move || drop(sender.send(work())));
    started.map_err(|error| Error::os(error, "cannot start a thread"))?;
    answer.await.map_err(|_| failed())?
}

/// The answer of a call that panicked.
pub(super) fn failed() -> Error {
    let message = "the daemon failed while it handled this call";
    Error::new(Kind::Internal, message).hint("please report what its log says")
}
