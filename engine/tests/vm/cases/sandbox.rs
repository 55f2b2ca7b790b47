// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Privileges that a running daemon has dropped, read from /proc: doc/threat-model.md promises
//! them.

use std::collections::BTreeMap;

use super::MIB;
use crate::daemon::Daemon;
use crate::harness::{At, Case, Ctx, Needs, Res, case, ensure, fail};
use crate::store::Store;

// linux/capability.h
const DAC_OVERRIDE: u64 = 1 << 1;
const FOWNER: u64 = 1 << 3;
const IPC_LOCK: u64 = 1 << 14;
const SYS_PTRACE: u64 = 1 << 19;
const SYS_ADMIN: u64 = 1 << 21;
const SYS_RESOURCE: u64 = 1 << 24;
const DAEMON: u64 = DAC_OVERRIDE | FOWNER | IPC_LOCK | SYS_PTRACE | SYS_ADMIN | SYS_RESOURCE;

pub(super) fn cases() -> Vec<Case> {
    vec![
        case("sandbox::privileges_are_reduced", Needs::Ublk, 180, privileges_are_reduced),
        case("sandbox::no_sandbox_keeps_privileges", Needs::Ublk, 120, debugging_keeps_privileges),
    ]
}

/// One thread's lines of /proc/PID/task/TID/status that are about privileges; numbers are
/// hexadecimal.
type Status = BTreeMap<String, u64>;

fn threads(daemon: &Daemon) -> Res<Vec<(String, Status)>> {
    let mut threads = Vec::new();
    for task in std::fs::read_dir(format!("/proc/{}/task", daemon.pid()?))?.flatten() {
        // A thread that ends meanwhile does not count.
        let Ok(text) = std::fs::read_to_string(task.path().join("status")) else { continue };
        let line = |line: &str| {
            let (name, value) = line.split_once(":\t")?;
            let wanted = name.starts_with("Cap") || ["NoNewPrivs", "Seccomp"].contains(&name);
            Some((name.to_string(), u64::from_str_radix(value, 16).ok().filter(|_| wanted)?))
        };
        let name = text.lines().next().and_then(|line| line.strip_prefix("Name:\t")).unwrap_or_default();
        threads.push((name.to_string(), text.lines().filter_map(line).collect()));
    }
    ensure!(!threads.is_empty(), "the daemon has no threads");
    Ok(threads)
}

/// The capabilities of this process, and of a daemon without a sandbox.
fn own() -> Res<u64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let own = status.lines().find_map(|line| line.strip_prefix("CapEff:\t")).ok_or("no CapEff")?;
    u64::from_str_radix(own, 16).at("CapEff")
}

fn privileges_are_reduced(ctx: &Ctx) -> Res {
    let store = Store::ext4(ctx)?;
    let image = store.sparse("image", 8 * MIB)?;
    let daemon = Daemon::start(ctx)?;
    let device = daemon.attach(&[&image])?;
    let threads = threads(&daemon)?;
    // If root has fewer capabilities here, so has the daemon.
    let (all, io) = (own()? & DAEMON, own()? & IPC_LOCK);
    let mut io_threads = 0;
    for (name, status) in &threads {
        let of = |field: &str| status.get(field).copied().ok_or_else(|| format!("no {field}"));
        ensure!(of("CapBnd")? & !DAEMON == 0, "{name}: bounding set {status:x?}");
        ensure!((of("CapInh")?, of("CapAmb")?) == (0, 0), "{name}: {status:x?}");
        ensure!((of("NoNewPrivs")?, of("Seccomp")?) == (1, 2), "{name}: {status:x?}");
        ensure!(of("CapEff")? == of("CapPrm")?, "{name}: {status:x?}");
        match of("CapEff")? {
            capabilities if capabilities == io => io_threads += 1,
            capabilities if capabilities == all => {}
            other => fail!("{name} has the capabilities {other:x}"),
        }
    }
    ensure!(io_threads > 0, "no thread is an I/O thread: {threads:x?}");
    let memory = std::fs::metadata(format!("/proc/{}/mem", daemon.pid()?))?;
    ensure!(std::os::unix::fs::MetadataExt::uid(&memory) == 0, "/proc/PID/mem does not belong to root");
    let log = daemon.log();
    ensure!(!log.contains("the daemon cannot"), "{log}");
    daemon.detach(&device)?;
    daemon.stop()
}

/// The control of the other case: without a sandbox, the daemon keeps its capabilities.
fn debugging_keeps_privileges(ctx: &Ctx) -> Res {
    let daemon = Daemon::with(ctx, &["--no-sandbox"])?;
    let own = own()?;
    for (name, status) in threads(&daemon)? {
        ensure!(status.get("CapEff") == Some(&own), "{name}: {status:x?}, not {own:x}");
    }
    ensure!(daemon.log().contains("--no-sandbox"), "no warning in the log");
    daemon.stop()
}
