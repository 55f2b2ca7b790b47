// SPDX-License-Identifier: Apache-2.0 OR MIT
//! One daemon with several backends: instances and private pools that choose their own, and a
//! restart with another default.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;

use super::MIB;
use crate::daemon::Daemon;
use crate::disk::same;
use crate::harness::{At, Case, Ctx, Needs, Res, case, ensure, fail, skip};
use crate::model::pattern;
use crate::store::Store;
use crate::tools;

pub(super) fn cases() -> Vec<Case> {
    vec![
        case("backends::instances_choose", Needs::Ublk, 120, instances_choose),
        case("backends::pools_choose", Needs::Ublk, 120, pools_choose),
    ]
}

/// A backend that a daemon with the default backend under test can have, too.
const OTHER: &str = if matches!(crate::BACKEND.as_bytes(), b"loop") { "ublk" } else { "loop" };

/// An instance with the other backend; `skip` where the kernel lacks its driver.
fn create(daemon: &Daemon, name: &str) -> Res {
    let created = daemon.cli(&["instance", "create", name, "--backend", OTHER])?;
    match created.err.contains("cannot open /dev/ublk-control") || created.err.contains("is missing") {
        true => skip!("{}", created.err.trim()),
        false => created.ok().map(drop),
    }
}

/// The kernel's loop driver, loaded for a case: others run without it.
struct LoopModule;

impl LoopModule {
    fn load() -> Res<Option<LoopModule>> {
        if std::path::Path::new("/dev/loop-control").exists() {
            return Ok(None);
        }
        match tools::run(&["modprobe", "loop"])?.code {
            0 => Ok(Some(LoopModule)),
            _ => skip!("the kernel's loop driver cannot be loaded"),
        }
    }
}

impl Drop for LoopModule {
    fn drop(&mut self) {
        let _ = tools::sh("for i in {1..50}; do modprobe -r loop && exit; sleep 0.1; done; exit 1");
    }
}

fn check(device: &str, seed: u64) -> Res {
    let mut found = vec![0; 1 << 20];
    OpenOptions::new().read(true).open(device).at(device)?.read_exact_at(&mut found, 0)?;
    same(device, &found, &pattern(seed, 1 << 20))
}

/// Devices of two backends under one daemon keep their backends and data over restarts, also with
/// another default.
fn instances_choose(ctx: &Ctx) -> Res {
    let store = Store::ext4(ctx)?;
    let _loaded = LoopModule::load()?;
    let mut daemon = Daemon::leaving(ctx)?;
    create(&daemon, "other")?;
    let devices = [
        daemon.attach(&[&store.sparse("a", 8 * MIB)?])?,
        daemon.attach(&["-i", "other", &store.sparse("b", 8 * MIB)?])?,
    ];
    for (device, seed) in devices.iter().zip(1..) {
        let file = OpenOptions::new().write(true).open(device).at(device)?;
        file.write_all_at(&pattern(seed, 1 << 20), 0)?;
        file.sync_all()?;
    }
    let backends = |daemon: &Daemon| -> Res<Vec<(String, String)>> {
        let instances = daemon.json(&["instance", "list"])?;
        let words = |name: &str| {
            instances
                .as_array()
                .into_iter()
                .flatten()
                .map(|one| one[name].as_str().unwrap_or_default().to_owned())
                .collect::<Vec<_>>()
        };
        Ok(words("name").into_iter().zip(words("backend")).collect())
    };
    let expected = [("default", crate::BACKEND), ("other", OTHER)]
        .map(|(name, backend)| (name.to_owned(), backend.to_owned()));
    ensure!(backends(&daemon)? == expected, "{:?}", backends(&daemon)?);
    if crate::BACKEND == "fuse" {
        // Files end with their daemon.
        daemon.kill()?;
        daemon.restart()?;
        check(&devices[1], 2)?;
        daemon.ok(&["detach", "--all"])?;
        return daemon.stop();
    }
    for default in [crate::BACKEND, OTHER, crate::BACKEND] {
        daemon.terminate()?;
        daemon.set_backend(default);
        daemon.restart()?;
        ensure!(backends(&daemon)? == expected, "with --backend {default}: {:?}", backends(&daemon)?);
        check(&devices[0], 1)?;
        check(&devices[1], 2)?;
    }
    daemon.kill()?;
    // A record that cannot be read, in each instance.
    for instance in ["default", "other"] {
        fs::write(ctx.path(&format!("run/.state/{instance}/loop0.json")), "{").at("spoil a record")?;
    }
    daemon.set_backend(OTHER);
    daemon.restart()?;
    ensure!(backends(&daemon)? == expected, "without records: {:?}", backends(&daemon)?);
    for (device, image) in devices.iter().zip(["a", "b"]) {
        ensure!(daemon.info(device)?["state"] == "stuck", "{device} is not stuck");
        daemon.ok(&["recover", device, "--image", &store.path(image)])?;
    }
    check(&devices[0], 1)?;
    check(&devices[1], 2)?;
    daemon.ok(&["detach", "--all"])?;
    // Without devices, the instance takes the daemon's default.
    daemon.terminate()?;
    daemon.restart()?;
    let now = backends(&daemon)?;
    ensure!(now.first().is_some_and(|(_, backend)| backend == OTHER), "{now:?}");
    let files = daemon.cli(&["instance", "create", "files", "--backend", "fuse"])?;
    ensure!(files.code != 0 && files.err.contains("--backend fuse and its own --run-dir"), "{files:?}");
    daemon.stop()
}

/// A pool has the backend that its opener asks for, or a reason why not.
fn pools_choose(ctx: &Ctx) -> Res {
    let store = Store::ext4(ctx)?;
    let image = store.sparse("image", MIB)?;
    let _loaded = LoopModule::load()?;
    let program = &ctx.host.program;
    let daemon = Daemon::start(ctx)?;
    let mut served = 0;
    for backend in ["loop", "ublk"] {
        let script = format!(
            "dev=$(losetup -f --show {image}) && losetup -d $dev && \
             {program} list --all --json | grep -E '\"backend\": ?\"{backend}\"'"
        );
        let done = daemon.cli(&["run", "--backend", backend, "--", "sh", "-c", &script])?;
        match done.code {
            0 => served += 1,
            _ if done.err.contains("need Linux 6.9") => skip!("{}", done.err.trim()),
            _ if backend == "ublk" && done.err.contains("ublk") => ctx.note(done.err.trim()),
            _ => fail!("{backend}: {done:?}"),
        }
    }
    ensure!(served > 0, "no backend serves pools");
    let files = daemon.cli(&["run", "--backend", "fuse", "true"])?;
    ensure!(files.code != 0 && files.err.contains("block devices, not files"), "{files:?}");
    daemon.stop()
}
