//! How a subcommand talks to the daemon: a runtime, a connection, some calls.

use std::path::Path;

use crate::control::Client;
use crate::error::{Error, Result};

/// A runtime for one client.
pub(super) fn runtime() -> Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Error::os(error, "cannot start"))
}

/// Connects to the daemon of `run_dir` and lets `work` make its calls.
pub(super) fn ask<T>(run_dir: &Path, work: impl AsyncFnOnce(&mut Client) -> Result<T>) -> Result<T> {
    runtime()?.block_on(async {
        let mut client = Client::connect(run_dir).await?;
        work(&mut client).await
    })
}
