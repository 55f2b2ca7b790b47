// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Who runs inside the VM: the campaign itself, the clients who mean well, the hostile ones. Each is this
//! program again. Knows where things lie there.

use std::path::{Path, PathBuf};

use anyhow::Result;

use super::{campaign, honest, kinds};

/// Memory file system that holds everything of a campaign.
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

/// What this process is in the VM.
#[derive(clap::Subcommand)]
pub(crate) enum Role {
    /// Start the daemon and everybody else, and judge
    Campaign {
        #[arg(long)]
        seed: u64,
        #[arg(long)]
        seconds: u64,
        #[arg(long)]
        only: Option<String>,
    },
    /// A client who means well
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

/// Plays the role; whether all is well.
pub(crate) fn run(role: &Role) -> Result<bool> {
    match role {
        Role::Campaign { seed, seconds, only } => campaign::run(*seed, *seconds, only.as_deref()),
        Role::Honest { who } => honest::run(*who).map(|()| true),
        Role::Client { kind, seed, uid } => kinds::run(kind, *seed, *uid).map(|()| true),
    }
}
