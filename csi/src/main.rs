// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The program `loopengine-csi`: the CSI driver of a node.

use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use clap::Parser;
use loopengine_csi::{Driver, Settings, server};
use tokio::signal::unix::{SignalKind, signal};

/// Provide volumes to Kubernetes: images that the engine of this node serves.
///
/// Runs once per node, beside a node-driver-registrar and an external-provisioner with
/// '--node-deployment'. All its state is in its directory: a restart touches no volume.
#[derive(Debug, Parser)]
#[command(name = "loopengine-csi", version)]
struct Args {
    /// Socket for the kubelet and the sidecars.
    #[arg(long, value_name = "unix://PATH", env = "CSI_ENDPOINT")]
    endpoint: String,

    /// Name of this node, 1 to 63 characters, as in a label's value.
    #[arg(long, value_name = "NAME", env = "NODE_NAME")]
    node: String,

    /// Directory of the volumes.
    #[arg(long, value_name = "DIR", default_value = "/var/lib/loopengine/csi")]
    directory: PathBuf,

    /// Directory of the engine's sockets.
    #[arg(long, value_name = "DIR", env = "LOOPENGINE_RUN_DIR", default_value = "/run/loopengine")]
    run_dir: PathBuf,

    /// Maximum number of attached volumes.
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=4096))]
    max_volumes: u32,

    /// Let the node alone expand volumes: for an external-resizer that does not run on each node.
    #[arg(long)]
    node_expansion: bool,
}

fn main() -> ExitCode {
    let filter = tracing_subscriber::EnvFilter::try_from_env("LOOPENGINE_LOG");
    let filter = filter.unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).without_time().init();
    match run(Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("loopengine-csi: {message}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: Args) -> Result<(), String> {
    let Args { endpoint, node, directory, run_dir, max_volumes, node_expansion } = args;
    if !is_node(&node) {
        return Err(format!("--node: {node:?} cannot be a label's value"));
    }
    let socket = PathBuf::from(endpoint.strip_prefix("unix://").unwrap_or(&endpoint));
    if !socket.is_absolute() {
        return Err(format!("--endpoint: {endpoint:?} is not unix:// and an absolute path"));
    }
    let driver = Arc::new(Driver::new(Settings { node, directory, run_dir, max_volumes, node_expansion })?);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let runtime = runtime.map_err(|error| format!("cannot start an async runtime: {error}"))?;
    let cannot = |error: std::io::Error| format!("cannot listen on {}: {error}", socket.display());
    let served = runtime.block_on(async {
        let listener = listen(&socket).map_err(cannot)?;
        let mut end = signal(SignalKind::terminate()).map_err(cannot)?;
        tracing::info!("serving {}", socket.display());
        tokio::select! {
            failed = server::serve(driver, listener) => failed.map(drop).map_err(cannot),
            _ = end.recv() => Ok(()),
        }
    });
    // Calls that run end first: what they hold has no other owner.
    drop(runtime);
    let _ = std::fs::remove_file(&socket);
    served
}

/// Binds the socket; one that an ended driver left is replaced. The lock of the directory is held.
fn listen(socket: &Path) -> std::io::Result<tokio::net::UnixListener> {
    if std::fs::symlink_metadata(socket).is_ok_and(|meta| meta.file_type().is_socket()) {
        std::fs::remove_file(socket)?;
    }
    let listener = tokio::net::UnixListener::bind(socket)?;
    std::fs::set_permissions(socket, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

fn is_node(name: &str) -> bool {
    let ends = |c: char| c.is_ascii_alphanumeric();
    name.len() <= 63
        && name.starts_with(ends)
        && name.ends_with(ends)
        && name.chars().all(|c| ends(c) || "-_.".contains(c))
}
