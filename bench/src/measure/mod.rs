// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Measurements without fio: the time of attaching, and the cost of idle devices.
//!
//! Starts its own daemons and writes raw files.

mod attach;
mod idle;

use std::path::Path;

use anyhow::Result;

use crate::raw::{ATTACH, IDLE, write};
use crate::site::Site;

/// How much to measure.
#[derive(Clone, Copy, Debug, Default, clap::Args)]
pub struct Extras {
    /// Devices to attach and detach, to measure how long that takes; 0: none
    #[arg(long, value_name = "N", default_value_t = 50)]
    pub attaches: u32,
    /// Other devices that exist during the second series
    #[arg(long, value_name = "N", default_value_t = 100)]
    pub present: u32,
    /// Idle devices, to measure their cost in memory and CPU time; 0: none
    #[arg(long, value_name = "N", default_value_t = 1000)]
    pub idle: u32,
}

/// Measures what `out` does not contain yet.
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
