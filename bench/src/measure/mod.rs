// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What fio does not measure: how long attaching takes, and what devices cost that nobody uses.
//!
//! Starts daemons of its own and leaves raw files.

mod attach;
mod idle;

use std::path::Path;

use anyhow::Result;

use crate::raw::{ATTACH, IDLE, write};
use crate::site::Site;

/// How much of it.
#[derive(Clone, Copy, Debug, Default, clap::Args)]
pub struct Extras {
    /// Devices that are attached to see how long it takes; 0: none
    #[arg(long, value_name = "N", default_value_t = 50)]
    pub attaches: u32,
    /// Devices that are there meanwhile, the second time
    #[arg(long, value_name = "N", default_value_t = 100)]
    pub present: u32,
    /// Idle devices whose memory and CPU time are measured; 0: none
    #[arg(long, value_name = "N", default_value_t = 1000)]
    pub idle: u32,
}

/// Measures them, unless that was done before.
pub fn run(extras: &Extras, site: &Site, out: &Path) -> Result<()> {
    if extras.attaches > 0 && !out.join(ATTACH).exists() {
        let figures = attach::run(extras, site)?;
        write(out, ATTACH, &figures)?;
    }
    if extras.idle > 0 && !out.join(IDLE).exists() {
        let figures = idle::run(extras.idle, site)?;
        write(out, IDLE, &figures)?;
    }
    Ok(())
}
