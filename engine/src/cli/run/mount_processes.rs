// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The processes that mount for tenants: one has the kernel mount, one attaches mounts in
//! containers. They read requests from standard input.

use crate::error::Result;
use crate::kernel_mounts::{mount_attacher, mount_maker};

/// Serves requests for kernel mounts on standard input. For `loopengine serve` only.
#[derive(Debug, clap::Args)]
#[command(hide = true)]
pub(crate) struct MountMaker {}

/// Serves requests to attach mounts in containers on standard input. For `loopengine serve` only.
#[derive(Debug, clap::Args)]
#[command(hide = true)]
pub(crate) struct MountAttacher {}

impl MountMaker {
    pub(crate) fn run(self) -> Result<()> {
        leave_group();
        mount_maker::serve(rustix::stdio::stdin())
    }
}

impl MountAttacher {
    pub(crate) fn run(self) -> Result<()> {
        leave_group();
        mount_attacher::serve(rustix::stdio::stdin())
    }
}

/// Ctrl-C signals only the daemon, and this process ends with it. setsid(2) fails only for a group
/// leader, which needs no new session.
fn leave_group() {
    let _ = rustix::process::setsid();
}
