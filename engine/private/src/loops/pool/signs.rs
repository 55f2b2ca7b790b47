// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Where signs of last closes come from: the nodes of a pool, and the mounts of its users.

use std::os::fd::{AsFd, BorrowedFd};

use super::Pool;
use crate::loops::LoopCaller;

impl Pool {
    /// Watches for closes of the nodes in its directory.
    pub fn watch_nodes(&self, directory: BorrowedFd<'_>) {
        let notices = &self.allocator.notices;
        let Some(signs) = notices.closes.get() else { return };
        if let Err(error) = signs.watch_nodes(directory, notices.waker.clone()) {
            tracing::debug!("pool {} is polled often: {error}", self.spec.name);
        }
    }

    /// Watches for unmounts where a caller may mount a device.
    pub(super) fn watch_unmounts(&self, caller: &dyn LoopCaller) {
        let Some(signs) = self.allocator.notices.closes.get() else { return };
        if let Some(namespace) = caller.mount_namespace() {
            signs.watch_unmounts(namespace.as_fd());
        }
    }
}
