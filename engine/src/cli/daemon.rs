// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The connection of a subcommand to the daemon: a runtime and a client.

use std::path::Path;

use crate::control::Client;
use crate::error::{Error, Result};

/// Creates a runtime for one client.
pub(super) fn runtime() -> Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Error::os(error, "cannot start an async runtime"))
}

/// Connects to the daemon of `run_dir` and runs `work` with the client.
pub(super) fn ask<T>(run_dir: &Path, work: impl AsyncFnOnce(&mut Client) -> Result<T>) -> Result<T> {
    runtime()?.block_on(async {
        let mut client = Client::connect(run_dir).await?;
        work(&mut client).await
    })
}
