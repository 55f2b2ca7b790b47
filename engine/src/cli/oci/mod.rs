//! `loopengine oci`: what container runtimes are configured with, and what they run.
//!
//! Knows the commands; each file knows one format.

mod cdi;
mod config;
mod hook;
mod place;
pub(super) mod podman;
mod profile;

use std::path::Path;

use crate::error::Result;

/// Configure container runtimes.
///
/// 'loopengine instance mount --container' makes a pool for a container; print-config adds it to the
/// config.json of a runtime's bundle, print-cdi and print-profile describe it to what makes bundles.
#[derive(Debug, clap::Subcommand)]
pub(super) enum Command {
    PrintConfig(config::Config),
    PrintProfile(profile::Profile),
    PrintCdi(cdi::Cdi),
    Hook(hook::Hook),
}

impl Command {
    pub(super) fn run(self, run_dir: &Path) -> Result<()> {
        match self {
            Command::PrintConfig(args) => args.run(run_dir),
            Command::PrintProfile(args) => args.run(run_dir),
            Command::PrintCdi(args) => args.run(run_dir),
            Command::Hook(args) => args.run(run_dir),
        }
    }
}
