// SPDX-License-Identifier: Apache-2.0 OR MIT
//! devtmpfs in root's `run`: the command's own /dev in its place.
//!
//! The kernel has one devtmpfs for the whole machine. Builders mount it on /dev of a root
//! directory, where it would have the machine's devices, and neither devices nor mappings of the
//! command. So the mounter binds the command's /dev there. mount(8) from util-linux 2.39 on calls
//! fsopen(2) first, and falls back to mount(2) if the kernel lacks it: ENOSYS.
//!
//! This confines nobody: a caller that changes the name concurrently gets what root may mount
//! anyway. Does not know how the bind mount is made.

use std::sync::Arc;

use rustix::io::Errno;

use super::caller::{Administrators, CallerThread};
use super::calls::CallAction;
use super::filter::Abi;
use super::mounts::{MountHandler, MountRequest, address, read_c_string};
use crate::loops::Answer;
use crate::sys::process::ProcFds;

/// The file system.
pub const DEVTMPFS: &str = "devtmpfs";

/// Passes only mounts of devtmpfs on; the kernel serves the others.
#[derive(Debug)]
pub struct DevtmpfsOnly<H>(pub Arc<H>);

impl<H: MountHandler> MountHandler for DevtmpfsOnly<H> {
    fn serves(&self, request: &MountRequest) -> bool {
        request.kind == DEVTMPFS
    }

    fn mount(
        &self,
        request: &MountRequest,
        proc_fds: ProcFds,
        is_waiting: &dyn Fn() -> bool,
    ) -> Answer<Option<()>> {
        self.0.mount(request, proc_fds, is_waiting)
    }
}

/// Serves an intercepted fsopen(2).
pub(super) fn fsopen(
    thread: &CallerThread<'_>,
    abi: Abi,
    args: &[u64; 6],
    administrators: Administrators,
) -> CallAction {
    let name = read_c_string(thread, address(abi, args, 0), DEVTMPFS.len() + 1);
    match name.is_some_and(|name| name == DEVTMPFS.as_bytes()) && thread.is_admin(administrators) {
        true => CallAction::Answer(Err(Errno::NOSYS)),
        false => CallAction::Pass,
    }
}
