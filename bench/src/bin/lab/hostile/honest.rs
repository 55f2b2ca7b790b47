// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The well-behaved clients, each a process: a tenant with unmodified losetup and mkfs under
//! `loopengine run`, a caller of the private socket, and root on the control socket. They print a
//! line at the start and at the end of each call, which the ledger reads.

use std::fmt::Display;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use clap::ValueEnum;
use serde_json::{Value, json};

use loopbench::sh;

use super::guest;
use super::wire::Peer;

/// A well-behaved client.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Who {
    /// Binds, formats, writes, compares and unbinds under `loopengine run`
    Tenant,
    /// Opens, lists and closes pools
    Caller,
    /// Attaches, writes, compares and detaches; makes and removes instances; sets limits
    Root,
}

impl Who {
    pub(super) fn name(self) -> &'static str {
        match self {
            Who::Tenant => "tenant",
            Who::Caller => "caller",
            Who::Root => "root",
        }
    }

    pub(super) fn uid(self) -> u32 {
        match self {
            Who::Tenant => 1000,
            Who::Caller => 1001,
            Who::Root => 0,
        }
    }
}

/// Timeout of an answer: far beyond the limit, so that a late answer is recorded.
const PATIENCE: Duration = Duration::from_secs(60);
const PAUSE: Duration = Duration::from_millis(100);
const IMAGE_BYTES: usize = 1 << 20;
/// Rounds of a tenant before it restarts.
const TENANT_ROUNDS: u32 = 8;

/// The well-behaved clients end once this file exists.
pub(super) fn stop_file() -> PathBuf {
    Path::new(guest::BASE).join("stop")
}

/// Runs a client until the stop file exists; a tenant at most a few rounds.
pub(super) fn run(who: Who) -> Result<()> {
    std::env::set_current_dir(guest::home(who.uid()))?;
    for number in 0.. {
        if stop_file().exists() || (who == Who::Tenant && number == TENANT_ROUNDS) {
            break;
        }
        let round = match who {
            Who::Tenant => tenant(number),
            Who::Caller => caller(),
            Who::Root => root(number),
        };
        if let Err(error) = round {
            say('!', format!("{error:#}"));
        }
        std::thread::sleep(PAUSE);
    }
    Ok(())
}

fn say(mark: char, what: impl Display) {
    let mut out = std::io::stdout().lock();
    // The reader may have ended.
    let _ = writeln!(out, "{mark} {what}").and_then(|()| out.flush());
}

/// Makes a call, and prints its name and duration.
fn call<T>(name: &str, make: impl FnOnce() -> Result<T>) -> Result<T> {
    timed('>', name, make)
}

/// Does work that consists of many calls.
fn work<T>(name: &str, make: impl FnOnce() -> Result<T>) -> Result<T> {
    timed('~', name, make)
}

fn timed<T>(mark: char, name: &str, make: impl FnOnce() -> Result<T>) -> Result<T> {
    say(mark, name);
    let start = Instant::now();
    let answer = make();
    say('<', start.elapsed().as_micros());
    answer.map_err(|error| error.context(name.to_owned()))
}

fn tenant(number: u32) -> Result<()> {
    File::create("image")?.set_len(IMAGE_BYTES as u64)?;
    let device = call("losetup -f --show", || program(&["losetup", "-f", "--show", "image"]))?;
    work("write and compare", || write_and_compare(Path::new(&device), Path::new("image"), number))?;
    let listed = call("losetup -l", || program(&["losetup", "-n", "-l", "-O", "BACK-FILE", &device]))?;
    ensure!(listed.ends_with("/image"), "losetup -l shows {listed:?}");
    if number.is_multiple_of(4) {
        work("mkfs.ext4", || program(&["mkfs.ext4", "-q", "-F", &device]))?;
        work("e2fsck", || program(&["e2fsck", "-f", "-n", &device]))?;
    }
    call("losetup -d", || program(&["losetup", "-d", &device])).map(drop)
}

fn caller() -> Result<()> {
    let socket = guest::run_dir().join("private");
    let method = |name: &str| format!("io.loopengine.Private.{name}");
    let peer = call("connect", || Ok(Peer::new(&socket, PATIENCE)?))?;
    let (reply, mounts) = call("Open", || peer.call(&method("Open"), &json!({ "spec": { "max": 2 } }), &[]))?;
    let name = reply["name"].as_str().unwrap_or_default();
    let (list, _) = call("List", || peer.call(&method("List"), &json!({}), &[]))?;
    let found = list["pools"].as_array().is_some_and(|all| all.iter().any(|pool| pool["name"] == name));
    ensure!(found, "List does not show {name}: {list}");
    call("Close", || peer.call(&method("Close"), &json!({ "name": name }), &[]))?;
    drop(mounts);
    Ok(())
}

fn root(number: u32) -> Result<()> {
    let control = guest::run_dir().join("control");
    let peer = call("connect", || Ok(Peer::new(&control, PATIENCE)?))?;
    let ask = |name: &str, parameters: Value| {
        call(name, || peer.call(&format!("io.loopengine.{name}"), &parameters, &[])).map(|(reply, _)| reply)
    };
    let instance = json!({ "name": "honest", "maxDevices": 4, "workers": 1, "cpus": null });
    ask("CreateInstance", json!({ "spec": instance }))?;
    let image = guest::home(0).join("image");
    let file = OpenOptions::new().create(true).truncate(true).read(true).write(true).open(&image)?;
    file.set_len(IMAGE_BYTES as u64)?;
    let spec = json!({ "spec": {
        "instance": "honest", "path": image, "number": null, "readOnly": false, "offset": 0, "sizeLimit": 0,
        "blockSize": 0, "buffered": false, "queues": 0, "depth": 0, "ioMode": null,
    }});
    let attach = || peer.call("io.loopengine.Attach", &spec, &[file.as_fd()]);
    let (reply, _) = call("Attach", attach)?;
    let device = reply["device"]["path"].as_str().unwrap_or_default().to_owned();
    let listed = ask("ListDevices", json!({ "instance": "honest" }))?;
    let count = listed["devices"].as_array().map(Vec::len);
    let outcome = work("write and compare", || write_and_compare(Path::new(&device), &image, number));
    ask("Detach", json!({ "device": device }))?;
    ask("RemoveInstance", json!({ "name": "honest", "force": false }))?;
    ensure!(count == Some(1), "ListDevices shows {listed}");
    outcome?;
    let private = call("connect", || Ok(Peer::new(&guest::run_dir().join("private"), PATIENCE)?))?;
    let limit = json!({ "uid": 5000, "max_devices": 1 + number % 60 });
    call("SetLimit", || private.call("io.loopengine.Private.SetLimit", &limit, &[]))?;
    call("private List", || private.call("io.loopengine.Private.List", &json!({}), &[])).map(drop)
}

/// Writes the whole device, and compares device and image with the data.
fn write_and_compare(device: &Path, image: &Path, number: u32) -> Result<()> {
    let written: Vec<u8> =
        (0..IMAGE_BYTES / 4).flat_map(|at| (at as u32 ^ number << 20).to_le_bytes()).collect();
    let open = OpenOptions::new().read(true).write(true).open(device)?;
    open.write_all_at(&written, 0)?;
    open.sync_all()?;
    for file in [open, File::open(image)?] {
        let mut found = vec![0; IMAGE_BYTES];
        file.read_exact_at(&mut found, 0)?;
        if let Some(at) = found.iter().zip(&written).position(|(found, written)| found != written) {
            bail!("DATA DIFFER at byte {at} of {}", device.display());
        }
    }
    Ok(())
}

fn program(words: &[&str]) -> Result<String> {
    // `sh::capture` polls every 50 ms, which is too coarse here.
    let output = Command::new(sh::which(words[0])?).args(&words[1..]).output()?;
    let said = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    ensure!(output.status.success(), "{}: {}", output.status, said(&output.stderr));
    Ok(said(&output.stdout))
}
