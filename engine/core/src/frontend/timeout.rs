// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A deadline for system calls that may block.

use std::time::Duration;

use crossbeam::channel::bounded;

use crate::error::{Error, Kind, Result};

/// Deadline of a system call that may depend on our own threads, or on the file system of an image.
const CALL_TIMEOUT: Duration = Duration::from_secs(10);

/// Makes a system call on a thread of its own. If it hangs, so does the thread, but not the caller.
pub(super) fn with_timeout<T: Send + 'static>(
    what: &str,
    call: impl FnOnce() -> T + Send + 'static,
) -> Result<T> {
    let (done, is_done) = bounded(1);
    std::thread::Builder::new()
        .name("driver call".to_owned())
        .spawn(move || {
            let _ = done.send(call());
        })
        .map_err(|error| Error::os(error, "cannot start a thread"))?;
    is_done.recv_timeout(CALL_TIMEOUT).map_err(|_| {
        Error::new(Kind::Deadline, format!("{what} took more than {} s", CALL_TIMEOUT.as_secs()))
    })
}
