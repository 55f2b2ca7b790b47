//! The processes that have the kernel mount for tenants, and attach that in containers. Knows where their
//! orders come from, and no more.

use crate::error::Result;
use crate::kernel_mounts::{attacher, maker};

/// Takes orders for mounts by the kernel on its standard input. For `loopengine serve` only.
#[derive(Debug, clap::Args)]
#[command(hide = true)]
pub(crate) struct Maker {}

/// Takes orders to attach mounts in containers on its standard input. For `loopengine serve` only.
#[derive(Debug, clap::Args)]
#[command(hide = true)]
pub(crate) struct Attacher {}

impl Maker {
    pub(crate) fn run(self) -> Result<()> {
        leave_group();
        maker::serve(rustix::stdio::stdin())
    }
}

impl Attacher {
    pub(crate) fn run(self) -> Result<()> {
        leave_group();
        attacher::serve(rustix::stdio::stdin())
    }
}

/// Ctrl-C is for the daemon, with which this ends. Only the first of a group cannot, and need not.
fn leave_group() {
    let _ = rustix::process::setsid();
}
