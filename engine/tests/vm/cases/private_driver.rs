// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Compares private loop devices with the kernel's: one client runs the same steps on both.
//! `private_known` lists the allowed differences.
//!
//! Knows how to load and unload the kernel's driver: all other cases run without it. Does not know
//! the steps (`driver` does).

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use super::private_known::{KNOWN, Known};
use crate::daemon::Daemon;
use crate::driver;
use crate::harness::{At, Case, Ctx, Needs, Res, case, ensure, fail, skip};
use crate::host;
use crate::tools::{self, Running};

pub(super) fn cases() -> Vec<Case> {
    ["64", "32"]
        .map(|bits| {
            case(format!("private::driver::{bits}"), Needs::Private, 580, move |ctx| compare(ctx, bits))
        })
        .into()
}

/// For all steps on one driver.
const CLIENT: Duration = Duration::from_secs(270);

/// Output lines of the client: each step, and its result.
type Lines = BTreeMap<String, String>;

fn compare(ctx: &Ctx, bits: &str) -> Res {
    let client = ctx.path("client");
    std::fs::copy(std::env::current_exe()?, &client).at("copy this program")?;
    let kernel = {
        let driver = Driver::load()?;
        let lines = run(ctx, "kernel", Command::new(&client), bits)?;
        driver.unload()?;
        lines
    };
    let daemon = Daemon::start(ctx)?;
    let mut command = daemon.command_of(&ctx.host.program);
    command.args(["run", "--max", "32", "--", &client]);
    let ours = run(ctx, "pool", command, bits)?;
    daemon.stop()?;
    ctx.note(format!("{} steps", kernel.len()));
    check_differences(&kernel, &ours, bits)
}

/// Runs all steps of the client in a directory of its own.
fn run(ctx: &Ctx, name: &str, mut command: Command, bits: &str) -> Res<Lines> {
    // The same path for both, since it is printed.
    let dir = ctx.dir.join("files");
    std::fs::create_dir(&dir).at("a directory")?;
    command.args([driver::ROLE, bits]).current_dir(&dir);
    let done = Running::start(command)?.finish(CLIENT)?;
    std::fs::remove_dir_all(&dir)?;
    let last = tools::tail(&done.out, 1);
    ensure!(done.code == 0, "{name}: exit status {} after '{last}': {}", done.code, done.err);
    let mut lines = Lines::new();
    for line in done.out.lines() {
        let Some(at) = line.rfind(": ") else { fail!("{name}: a line without a value: {line}") };
        let mut step = line[..at].to_owned();
        while lines.contains_key(&step) {
            step.push_str(" again");
        }
        lines.insert(step, line[at + 2..].to_owned());
    }
    Ok(lines)
}

/// Compares step by step: equal, or a listed difference. Each listed difference must occur.
fn check_differences(kernel: &Lines, ours: &Lines, bits: &str) -> Res {
    let occurs =
        |known: &&Known| (bits == "64" || !known.only_64) && (crate::BACKEND == "ublk" || !known.only_ublk);
    let known = KNOWN.iter().filter(occurs);
    let known: BTreeMap<_, _> = known.flat_map(|known| known.lines).map(|line| (line.0, line)).collect();
    let follows = |step: &str| known.keys().any(|known| step.starts_with(&format!("{known}, ")));
    let mut seen = BTreeSet::new();
    let mut wrong = Vec::new();
    for step in kernel.keys().chain(ours.keys().filter(|step| !kernel.contains_key(*step))) {
        let (theirs, our) = (kernel.get(step), ours.get(step));
        if theirs == our {
            continue;
        }
        let both = (theirs.map_or("nothing", String::as_str), our.map_or("nothing", String::as_str));
        match known.get(step.as_str()) {
            Some((step, as_known, as_ours)) if both == (*as_known, *as_ours) => _ = seen.insert(*step),
            _ if both.0 == "nothing" || both.1 == "nothing" => {
                if !follows(step) {
                    wrong.push(format!("{step}: kernel {}, ours {}", both.0, both.1));
                }
            }
            _ => wrong.push(format!("{step}: kernel '{}', ours '{}'", both.0, both.1)),
        }
    }
    // Programs of 32 bits take fewer steps.
    let taken = |step: &&&str| bits == "64" || kernel.contains_key(**step);
    for step in known.keys().filter(taken).filter(|step| !seen.contains(**step)) {
        wrong.push(format!("{step}: does not differ as listed ({})", why(step)));
    }
    for line in &wrong {
        eprintln!("  {line}");
    }
    ensure!(wrong.is_empty(), "{} steps differ, the first: {}", wrong.len(), wrong[0]);
    Ok(())
}

fn why(step: &str) -> &'static str {
    let knows = |known: &&Known| known.lines.iter().any(|line| line.0 == step);
    KNOWN.iter().find(knows).map_or("", |known| known.why)
}

/// The kernel's driver, loaded.
pub(super) struct Driver;

impl Driver {
    pub(super) fn load() -> Res<Driver> {
        let free = || is_backend() && remove_driver().is_ok();
        if Path::new("/sys/module/loop").exists() && !free() {
            skip!("the kernel's own loop driver is loaded already, and may be in use");
        }
        if tools::run(&["modprobe", "loop", "max_loop=0"])?.code != 0 {
            skip!("this kernel's own loop driver cannot be loaded");
        }
        Ok(Driver)
    }

    pub(super) fn unload(self) -> Res {
        std::mem::forget(self);
        remove_driver()?;
        load_backend()
    }
}

impl Drop for Driver {
    /// After a failure: devices that the client has left.
    fn drop(&mut self) {
        if let Err(error) = remove_driver().and_then(|()| load_backend()) {
            eprintln!("  the kernel's loop driver stays: {error:?}");
        }
    }
}

/// Whether it serves the devices of the daemons under test, on a machine that has no others.
fn is_backend() -> bool {
    crate::BACKEND == "loop" && host::is_virtual()
}

fn load_backend() -> Res {
    if is_backend() { tools::ok(&["modprobe", "loop"]).map(drop) } else { Ok(()) }
}

fn remove_driver() -> Res {
    tools::sh(
        "losetup -D; for i in {1..50}; do modprobe -r loop 2>/dev/null && exit; sleep 0.1; done; exit 1",
    )?;
    Ok(())
}
