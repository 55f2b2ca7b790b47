// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `loopengine oci`: configuration and hooks for container runtimes.
//!
//! This file lists the subcommands; each other file knows one format.

mod cdi;
mod config;
mod hook;
pub(super) mod podman;
mod pool_dir;
mod profile;

use std::path::Path;

use crate::error::Result;

/// Configure container runtimes.
///
/// 'loopengine instance mount --container' creates a pool for containers. 'print-config' adds it to
/// the config.json of a bundle. 'print-cdi' and 'print-profile' describe it to programs that create
/// bundles.
#[derive(Debug, clap::Subcommand)]
pub(super) enum OciCommand {
    PrintConfig(config::PrintConfig),
    PrintProfile(profile::PrintProfile),
    PrintCdi(cdi::PrintCdi),
    Hook(hook::Hook),
}

impl OciCommand {
    pub(super) fn run(self, run_dir: &Path) -> Result<()> {
        match self {
            OciCommand::PrintConfig(args) => args.run(run_dir),
            OciCommand::PrintProfile(args) => args.run(run_dir),
            OciCommand::PrintCdi(args) => args.run(run_dir),
            OciCommand::Hook(args) => args.run(run_dir),
        }
    }
}
