// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Roles inside the VM: the campaign, well-behaved clients, hostile clients. Each is a process of
//! this program. Knows the paths in the VM.

use std::path::{Path, PathBuf};

use anyhow::Result;

use super::{campaign, honest, kinds};

/// Memory file system for all files of a campaign.
pub(super) const BASE: &str = "/run/hostile";

/// Run directory of the daemon under test.
pub(super) fn run_dir() -> PathBuf {
    Path::new(BASE).join("run")
}

/// Configuration file of the daemon under test.
pub(super) fn config() -> PathBuf {
    Path::new(BASE).join("config.toml")
}

/// Home directory of a user.
pub(super) fn home(uid: u32) -> PathBuf {
    Path::new(BASE).join(format!("users/{uid}"))
}

/// Role of this process in the VM.
#[derive(clap::Subcommand)]
pub(crate) enum Role {
    /// Start the daemon and all clients, and check the conditions
    Campaign {
        #[arg(long)]
        seed: u64,
        #[arg(long)]
        seconds: u64,
        #[arg(long)]
        only: Option<String>,
    },
    /// A well-behaved client
    Honest { who: honest::Who },
    /// A hostile client
    Client {
        kind: String,
        #[arg(long)]
        seed: u64,
        #[arg(long)]
        uid: u32,
    },
}

/// Runs the role; returns whether it succeeded.
pub(crate) fn run(role: &Role) -> Result<bool> {
    match role {
        Role::Campaign { seed, seconds, only } => campaign::run(*seed, *seconds, only.as_deref()),
        Role::Honest { who } => honest::run(*who).map(|()| true),
        Role::Client { kind, seed, uid } => kinds::run(kind, *seed, *uid).map(|()| true),
    }
}
