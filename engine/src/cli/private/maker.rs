//! The process that has the kernel mount for tenants. Knows where its orders come from, and no more.

use crate::error::Result;
use crate::kernel_mounts::maker;

/// Takes orders for mounts by the kernel on its standard input. For `loopengine serve` only.
#[derive(Debug, clap::Args)]
#[command(hide = true)]
pub(crate) struct Args {}

impl Args {
    pub(crate) fn run(self) -> Result<()> {
        // Ctrl-C is for the daemon, with which this ends. Only the first of a group cannot, and need not.
        let _ = rustix::process::setsid();
        maker::serve(rustix::stdio::stdin())
    }
}
