// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A container for an OCI runtime: no image, no network, a small root directory in memory, a
//! script.
//!
//! Knows bundles, runtimes and pools for containers; knows no case.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::private_script::WORDS;
use crate::daemon::Daemon;
use crate::harness::{At, Ctx, Res, ensure, fail, skip};
use crate::tools::{self, Done, Running};

/// Deadline for a whole container.
pub(super) const CONTAINER: Duration = Duration::from_secs(100);
/// Until devices of an ended container are unbound: a second, on an idle machine.
pub(super) const UNBOUND: Duration = Duration::from_secs(10);
const PROGRAMS: &str = "bash busybox losetup mount umount findmnt mkfs.ext4 mkfs.xfs e2fsck xfs_repair blkid blockdev \
     truncate stat mknod sfdisk lsblk mkfs.vfat";

/// The bundle of a container.
pub(super) struct Bundle<'a> {
    ctx: &'a Ctx,
    daemon: &'a Daemon,
    runtime: &'static str,
    pub(super) name: String,
    pool: String,
    pub(super) annotations: Vec<(&'static str, &'static str)>,
    pub(super) capabilities: Vec<&'static str>,
}

/// The first runtime that is installed.
pub(super) fn any_runtime() -> Res<&'static str> {
    for runtime in ["crun", "runc"] {
        if tools::run(&["sh", "-c", &format!("command -v {runtime}")])?.code == 0 {
            return Ok(runtime);
        }
    }
    skip!("no container runtime is installed (crun or runc)")
}

/// A root directory with the programs of the scripts, and their libraries; created once for all
/// cases.
pub(super) fn root() -> Res<String> {
    let root = format!("{}/container", crate::SCRATCH);
    if !Path::new(&root).exists() {
        tools::run_for(
            Duration::from_secs(120),
            &[
                "bash",
                "-euo",
                "pipefail",
                "-c",
                &format!(
                    "mkdir -p {root}/bin {root}/lib {root}/lib64 {root}/work {root}/proc {root}/sys {root}/dev {root}/tmp
                    for name in {PROGRAMS}; do cp -L $(command -v $name) {root}/bin/; done
                    for name in dd cat head tail tr sleep sort seq rm ls mkdir id grep readlink touch ln cp chmod chown sed; do ln -s busybox {root}/bin/$name; done
                    for file in {root}/bin/*; do ldd $file 2>/dev/null || :; done |
                        sed -n 's,.*[ \\t]\\(/[^ ]*\\.so[^ ]*\\) (.*,\\1,p' | sort -u | xargs cp -L -t {root}/lib
                    cp -L /lib64/ld-linux-x86-64.so.2 {root}/lib64/"
                ),
            ],
        )?
        .ok()
        .at("a root directory for containers")?;
    }
    Ok(root)
}

impl<'a> Bundle<'a> {
    pub(super) fn new(
        ctx: &'a Ctx,
        daemon: &'a Daemon,
        runtime: &'static str,
        name: &str,
        pool: &str,
    ) -> Res<Bundle<'a>> {
        if tools::run(&["sh", "-c", &format!("command -v {runtime}")])?.code != 0 {
            skip!("{runtime} is not installed");
        }
        let (annotations, capabilities) = (Vec::new(), Vec::new());
        let bundle = Bundle {
            ctx,
            daemon,
            runtime,
            name: name.to_owned(),
            pool: pool.to_owned(),
            annotations,
            capabilities,
        };
        for dir in [bundle.path(""), bundle.work("")] {
            std::fs::create_dir_all(&dir).at(&dir)?;
        }
        Ok(bundle)
    }

    fn path(&self, name: &str) -> String {
        self.ctx.path(&format!("bundle-{}/{name}", self.name))
    }

    /// A file of the directory that the container may write to, /work.
    pub(super) fn work(&self, name: &str) -> String {
        self.ctx.path(&format!("work-{}/{name}", self.name))
    }

    fn runtime(&self, words: &[&str]) -> Command {
        let mut command = Command::new(self.runtime);
        command.args(["--root", &self.ctx.path("runtime")]).args(words);
        command
    }

    pub(super) fn control(&self, words: &[&str]) -> Res<Done> {
        Running::start(self.runtime(words))?.finish(tools::SHORT)
    }

    /// The runtime's default configuration, with a script, a writable directory, and a pool.
    pub(super) fn config(&self, script: &str) -> Res<Value> {
        let file = self.path("config.json");
        let _ = std::fs::remove_file(&file);
        self.control(&["spec", "--bundle", &self.path("")])?.ok()?;
        let mut config: Value = serde_json::from_str(&std::fs::read_to_string(&file)?).at(&file)?;
        let script = format!("{WORDS}\ncd /work || exit 1\n{script}\nexit $bad\n");
        config["process"]["terminal"] = json!(false);
        config["process"]["args"] = json!(["/bin/bash", "-c", script]);
        config["process"]["env"] = json!(["PATH=/bin", "HOME=/tmp"]);
        for set in ["bounding", "effective", "permitted"] {
            let all = config["process"]["capabilities"][set].as_array_mut().ok_or("no capabilities")?;
            all.extend(self.capabilities.iter().map(|name| json!(name)));
        }
        config["root"]["path"] = json!(root()?);
        let mounts = config["mounts"].as_array_mut().ok_or("no mounts")?;
        mounts.push(json!({ "destination": "/work", "type": "bind", "source": self.work(""), "options": ["bind", "rw"] }));
        for (name, value) in &self.annotations {
            config["annotations"][name] = json!(value);
        }
        std::fs::write(&file, config.to_string()).at(&file)?;
        let with = self.daemon.ok(&["oci", "print-config", "--pool", &self.pool, &file])?;
        serde_json::from_str(&with).at("print-config")
    }

    pub(super) fn start(&self, script: &str) -> Res<Running> {
        let config = self.config(script)?;
        self.start_as(&config)
    }

    pub(super) fn start_as(&self, config: &Value) -> Res<Running> {
        let file = self.path("config.json");
        std::fs::write(&file, config.to_string()).at(&file)?;
        for name in std::fs::read_dir(self.work(""))?.flatten().map(|entry| entry.path()) {
            if name.extension().is_some_and(|kind| kind == "there" || kind == "on") {
                std::fs::remove_file(&name)?;
            }
        }
        Running::start(self.runtime(&["run", "--bundle", &self.path(""), &self.name]))
    }

    pub(super) fn run(&self, script: &str) -> Res {
        end(self.start(script)?)
    }

    /// Waits until the script reaches `pause NAME`.
    pub(super) fn wait(&self, container: &mut Running, name: &str) -> Res {
        let there = self.work(&format!("{name}.there"));
        let come = tools::until(CONTAINER, || {
            let come = Path::new(&there).exists();
            (come || !container.alive()).then_some(come)
        });
        ensure!(come == Some(true), "the container {} did not reach '{name}'", self.name);
        Ok(())
    }

    pub(super) fn resume(&self, name: &str) -> Res {
        std::fs::write(self.work(&format!("{name}.on")), "").at("a script's file")
    }
}

pub(super) fn end(container: Running) -> Res {
    let done = container.finish(CONTAINER)?;
    ensure!(
        done.code == 0,
        "exit status {}:\n{}{}",
        done.code,
        tools::tail(&done.err, 30),
        tools::tail(&done.out, 10)
    );
    Ok(())
}

/// A pool for containers, until it is dropped.
pub(super) struct Pool {
    pub(super) dir: String,
}

impl Pool {
    pub(super) fn new(ctx: &Ctx, daemon: &Daemon, name: &str, max: u32) -> Res<Pool> {
        Pool::with(ctx, daemon, name, max, &[])
    }

    /// A pool whose containers may mount these file systems with the kernel.
    pub(super) fn with_mounts(ctx: &Ctx, daemon: &Daemon, name: &str, max: u32, mounts: &str) -> Res<Pool> {
        Pool::with(ctx, daemon, name, max, &["--mount", mounts])
    }

    /// The same, owned by this user: root of containers with a user namespace.
    pub(super) fn owned_by(ctx: &Ctx, daemon: &Daemon, name: &str, root: u32, mounts: &str) -> Res<Pool> {
        let root = root.to_string();
        Pool::with(ctx, daemon, name, 2, &["--uid", &root, "--gid", &root, "--mount", mounts])
    }

    fn with(ctx: &Ctx, daemon: &Daemon, name: &str, max: u32, more: &[&str]) -> Res<Pool> {
        let dir = ctx.path(&format!("pool-{name}"));
        std::fs::create_dir(&dir).at(&dir)?;
        let max = max.to_string();
        let words = ["instance", "mount", "--container", "--name", name, "--max", &max, &dir];
        daemon.ok(&[&words, more].concat())?;
        Ok(Pool { dir })
    }

    /// Removes it, and checks that no devices are left.
    pub(super) fn end(self, daemon: &Daemon) -> Res {
        tools::ok(&["umount", "-R", &self.dir])?;
        let gone = tools::until(UNBOUND, || daemon.ublk_ids().is_empty().then_some(()));
        ensure!(gone.is_some(), "devices of an unmounted pool are left: {:?}", daemon.ublk_ids());
        std::fs::remove_dir(&self.dir).at(&self.dir)
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        let _ = tools::run(&["umount", "-Rl", &self.dir]);
    }
}

/// Waits until the pool is unused and all devices are unbound. Returns how long that took.
pub(super) fn unbound(daemon: &Daemon, pool: &str) -> Res<Duration> {
    let begin = Instant::now();
    let listed = || daemon.ok(&["losetup", "--pool", pool, "-n", "-O", "NAME"]);
    match tools::until(UNBOUND, || listed().ok()?.trim().is_empty().then_some(())) {
        Some(()) => Ok(begin.elapsed()),
        None => fail!("still bound: {}", listed()?),
    }
}

pub(super) fn image(path: &str, text: &str) -> Res {
    let mut bytes = text.as_bytes().to_vec();
    bytes.resize(1 << 20, 0);
    std::fs::write(path, bytes).at(path)
}
