// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `lab hostile`: runs hostile clients of all kinds in a VM, beside well-behaved clients.
//!
//! ```text
//!  mod ── boots the VM ──► guest ─┬─ campaign ── plan, ledger, health
//!                                 ├─ honest: tenant, caller, root
//!                                 └─ kinds ── messages, descriptors, tenants, host (wire, fuse)
//! ```
//! This file knows the command line and the VM. Everything else runs inside the VM, and uses the
//! public program, its sockets and system calls, never internals of the engine.

mod campaign;
mod descriptors;
mod fuse;
pub(crate) mod guest;
mod health;
mod honest;
mod host;
mod kinds;
mod ledger;
mod messages;
mod plan;
mod tenants;
mod wire;

use std::time::Duration;

use anyhow::Result;
use clap::builder::PossibleValuesParser;

use crate::kernel::Line;
use crate::vm::{self, Mode, Vm};
use crate::{programs, setup};

/// What to run.
#[derive(clap::Args)]
pub(crate) struct HostileOptions {
    /// Minutes for which the hostile clients run
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u64).range(1..=600))]
    pub(crate) minutes: u64,
    /// Seed of the plan: the same seed gives the same plan [default: random, printed]
    #[arg(long, value_name = "N")]
    pub(crate) seed: Option<u64>,
    /// Run hostile clients of this kind only
    #[arg(long, value_name = "KIND", value_parser = PossibleValuesParser::new(kinds::names()))]
    pub(crate) only: Option<String>,
}

/// Time for boot, warm-up, waits for the daemon's resources, and the stop.
const BESIDES: Duration = Duration::from_secs(600);

/// Boots the VM and runs the campaign; returns whether it passed.
pub(crate) fn run(options: &HostileOptions) -> Result<bool> {
    let lab = setup::ensure()?;
    let programs = programs::build()?;
    let seconds = options.minutes * 60;
    let seed = options.seed.unwrap_or_else(|| fastrand::u64(..1 << 32));
    let limit = Duration::from_secs(seconds) + BESIDES;
    let machine = Vm { limit, ..Vm::new(lab.kernel(Line::Seven)?, Mode::Smp) };
    let mut line = format!("lab hostile-guest campaign --seed {seed} --seconds {seconds}");
    if let Some(kind) = &options.only {
        line.push_str(&format!(" --only {kind}"));
    }
    println!("hostile: seed {seed}, {} min", options.minutes);
    Ok(machine.run(&lab, &programs, &line, &mut vm::to_stdout)? == 0)
}
