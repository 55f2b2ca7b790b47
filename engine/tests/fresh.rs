// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Interface files and the example configuration are up to date; `src/cli/fresh.rs` checks the rest.
//!
//! `UPDATE=1 cargo test --bin loopengine --test fresh` regenerates all generated files.

mod support;

use std::fs;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use loopengine::control::{rundir::RunDir, server};
use loopengine::loops::{PoolSpec, Quotas};
use loopengine::private::{Defaults, PoolHandle, PoolSource, Registry, TenantEvents};

fn kept(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

fn updating() -> bool {
    std::env::var_os("UPDATE").is_some()
}

/// The interface description of a running daemon equals the interface files.
#[test]
fn interface_is_up_to_date() {
    let daemon = support::Daemon::start();
    let socket = daemon.run_dir().join(loopengine::control::SOCKET);
    check_description(&socket, "io.loopengine", "io.loopengine.varlink");
}

#[test]
fn private_interface_is_up_to_date() {
    let dir = tempfile::tempdir().unwrap();
    let run_dir = RunDir::take(&dir.path().join("run")).unwrap();
    let listener = run_dir.bind_private().unwrap();
    let registry = Arc::new(Registry::start(NoPools, Defaults { devices: 1, pools: 1 }).unwrap());
    let (stop, stopping) = tokio::sync::watch::channel(false);
    let served = registry.clone();
    let thread = std::thread::spawn(move || {
        let runtime = tokio_uring::Runtime::new(&tokio_uring::builder()).unwrap();
        runtime.block_on(async {
            let listener = tokio::net::UnixListener::from_std(listener).unwrap();
            server::serve_private(listener, served, stopping).await;
        });
    });
    let socket = dir.path().join("run").join(loopengine::control::PRIVATE_SOCKET);
    check_description(&socket, "io.loopengine.Private", "io.loopengine.Private.varlink");
    stop.send(true).unwrap();
    thread.join().unwrap();
    registry.shutdown();
}

/// A source without pools.
struct NoPools;

impl PoolSource for NoPools {
    fn quotas(&self) -> Quotas {
        Quotas::default()
    }

    fn open(&self, _: &PoolSpec, _: TenantEvents) -> loopengine::Result<(Arc<dyn PoolHandle>, OwnedFd)> {
        Err(loopengine::Error::new(loopengine::Kind::Unsupported, "no pools here"))
    }
}

fn check_description(socket: &Path, interface: &str, file: &str) {
    use std::io::{BufRead, BufReader, Write};
    let mut socket = std::os::unix::net::UnixStream::connect(socket).unwrap();
    let parameters = serde_json::json!({ "interface": interface });
    let method = "org.varlink.service.GetInterfaceDescription";
    let call = serde_json::json!({ "method": method, "parameters": parameters });
    write!(socket, "{call}\0").unwrap();
    let mut answer = Vec::new();
    BufReader::new(socket).read_until(0, &mut answer).unwrap();
    answer.pop();
    let answer: serde_json::Value = serde_json::from_slice(&answer).unwrap();
    let text = answer["parameters"]["description"].as_str().unwrap();
    let file = kept(file);
    if updating() {
        fs::write(&file, laid_out(text)).unwrap();
    }
    let have = fs::read_to_string(&file).unwrap_or_default();
    // Ignores white space, which the description of zlink lacks.
    let dense = |text: &str| text.split_whitespace().collect::<String>();
    assert!(dense(text) == dense(&have), "run 'UPDATE=1 cargo test --bin loopengine --test fresh'");
}

/// Formats one field per line, with comments above.
fn laid_out(text: &str) -> String {
    let text = text.replace("(#", "(\n#").replace(", #", ",\n#").replace("#  ", "# ");
    let mut out = String::new();
    let mut inside = false;
    for line in text.trim().lines() {
        let line = line.trim();
        let ends = inside && line.ends_with(')') && !line.starts_with('#');
        let line = if ends { line.strip_suffix(')').unwrap() } else { line };
        if !line.is_empty() || !ends {
            let indent = if inside && !line.is_empty() { "  " } else { "" };
            out.push_str(&format!("{indent}{line}\n"));
        }
        if ends {
            out.push_str(")\n");
            inside = false;
        }
        inside |= line.ends_with('(');
    }
    out
}

#[test]
fn the_example_configuration_is_valid() {
    let text = fs::read_to_string(kept("share/loopengine.toml")).unwrap();
    loopengine::config::Config::parse(&text, "as it is").unwrap();
    // Including commented examples.
    let lines = text.lines().map(|line| match line.strip_prefix('#') {
        Some(rest) if !rest.starts_with([' ', '#']) => rest,
        _ => line,
    });
    let all = lines.collect::<Vec<_>>().join("\n");
    let config = loopengine::config::Config::parse(&all, "with examples").unwrap();
    assert_eq!(config.instances().count(), 1);
    assert!(config.tuning().linked_commit);
    let devices: Vec<_> = config.devices().map(|device| (&*device.instance, device.offset)).collect();
    assert_eq!(devices, [("build", 1 << 20)]);
    assert_eq!(config.users().0[&0].pools, Some(32));
}
