// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Sockets that the service manager has opened for this process: sd_listen_fds(3).

use std::io;
use std::os::fd::{FromRawFd, OwnedFd};

/// Takes them, once: they are not passed on, and a second call finds none. None: there is no such manager.
/// Call it before the first other thread.
pub fn take_sockets() -> io::Result<Vec<OwnedFd>> {
    // SAFETY: the manager left these open for this process by its number, and the crate has seen that they
    // are. Nothing else here owns them: the variables that name them are gone.
    Ok(sd_notify::listen_fds()?.map(|number| unsafe { OwnedFd::from_raw_fd(number) }).collect())
}
